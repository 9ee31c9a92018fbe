"""Every error that miStudio raises on purpose, in one tree.

    MistudioError
    ├── BadInput            a value that cannot be used: what, which value, what was expected   422
    │   ├── UnknownHook     a hook name that is not one of ours, or lies outside the model      422
    │   ├── WrongShape      tensors or an SAE whose width does not fit                          422
    │   ├── EmptyData       text, tokens or features that are empty                             422
    │   └── Unsupported     understood, but not possible here (device, architecture, format)    422
    ├── NotFound            no such model, dataset, SAE, feature, job, …                        404
    ├── Conflict            it exists already, or its state forbids this                        409
    ├── CorruptFile         a file that is torn, truncated or not what it claims to be          422
    ├── OutOfMemory         needed and free bytes, and what to do                               507
    ├── DiskFull            needed and free bytes                                               507
    ├── JobFailed           a job ended without a result                                        500
    ├── Cancelled           a job was cancelled                                                 409
    ├── EngineMissing       no engine is reachable, or its packages are not installed           503
    ├── EngineBusy          another engine owns the directory, or a port is in use              409
    ├── Unreachable         a hub or a labelling server could not be reached                    502
    ├── Unauthorized        the token is missing or wrong                                       401
    ├── Forbidden           the Origin is foreign, or the path leaves the data directory        403
    ├── WrongHost           the Host header names somebody else                                 421
    ├── TooLarge            the body is over the cap                                            413
    └── Internal            a fault of ours                                                     500

An error says *what* happened, *why* (which value, what was expected) and how to *fix* it; `next_call` is a complete
call that an agent can make next. It knows nothing of HTTP beyond the number of its status, and nothing of MCP.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel

__all__ = [
    "ERRORS",
    "BadInput",
    "Cancelled",
    "Conflict",
    "CorruptFile",
    "DiskFull",
    "EmptyData",
    "EngineBusy",
    "EngineMissing",
    "ErrorBody",
    "Forbidden",
    "Internal",
    "JobFailed",
    "MistudioError",
    "NextCall",
    "NotFound",
    "OutOfMemory",
    "TooLarge",
    "Unauthorized",
    "UnknownHook",
    "Unreachable",
    "Unsupported",
    "WrongHost",
    "WrongShape",
    "error_from_body",
    "human_bytes",
]


class NextCall(BaseModel):
    """A complete call: the tool or operation and its arguments."""

    tool: str
    arguments: dict[str, Any] = {}


class ErrorBody(BaseModel):
    """An error as it travels: the same five fields over REST, WebSocket, MCP and in a job's record."""

    code: str
    what: str
    why: str = ""
    fix: str = ""
    next_call: NextCall | None = None


class MistudioError(Exception):
    """Base of the tree.

    Args:
        what: one sentence, with the value in it.
        why: which value was found and what was expected, if `what` does not say it all.
        fix: what to do next, in words.
        next_call: the name of an operation and its arguments, complete, that helps.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(
        self, what: str, *, why: str = "", fix: str = "", next_call: tuple[str, dict[str, Any]] | NextCall | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix
        if isinstance(next_call, tuple):
            next_call = NextCall(tool=next_call[0], arguments=next_call[1])
        self.next_call = next_call

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.why, self.fix) if part)

    @property
    def body(self) -> ErrorBody:
        """The error as it travels."""
        return ErrorBody(code=self.code, what=self.what, why=self.why, fix=self.fix, next_call=self.next_call)


class BadInput(MistudioError):
    """A value that cannot be used."""

    code, status = "bad_input", 422


class UnknownHook(BadInput):
    """A hook name that is not one of ours, or that lies outside the model."""

    code = "unknown_hook"


class WrongShape(BadInput):
    """Tensors or an SAE whose width does not fit."""

    code = "wrong_shape"


class EmptyData(BadInput):
    """Text, tokens or features that are empty."""

    code = "empty_data"


class Unsupported(BadInput):
    """Understood, but not possible here: a device, an architecture, a format."""

    code = "unsupported"


class NotFound(MistudioError):
    """No such thing; names the ones that exist."""

    code, status = "not_found", 404

    @classmethod
    def of(cls, kind: str, slug: str, known: list[str] | None = None) -> NotFound:
        """There is no `kind` called `slug`; `known` are some that exist."""
        if known:
            why = f"Known: {', '.join(known[:8])}{', …' if len(known) > 8 else ''}."
        else:
            why = f"There is no {kind} yet."
        return cls(
            f"There is no {kind} {slug!r}.",
            why=why,
            fix=f"Use one of them, or list all with find(kind={kind!r}).",
            next_call=("find", {"kind": kind}),
        )


class Conflict(MistudioError):
    """It exists already, or its state forbids this."""

    code, status = "conflict", 409


class CorruptFile(MistudioError):
    """A file that is torn, truncated or not what it claims to be."""

    code, status = "corrupt_file", 422


def human_bytes(n_bytes: float) -> str:
    """Bytes for people, in binary units: 31.2 GiB."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class OutOfMemory(MistudioError):
    """Needed and free memory, and what to do."""

    code, status = "out_of_memory", 507

    @classmethod
    def of(cls, what: str, needed: int, free: int, fix: str) -> OutOfMemory:
        """`what` needs `needed` bytes and `free` bytes are free."""
        return cls(f"{what} needs about {human_bytes(needed)} and {human_bytes(free)} is free.", fix=fix)


class DiskFull(MistudioError):
    """Needed and free disk space."""

    code, status = "disk_full", 507

    @classmethod
    def of(cls, what: str, needed: int, free: int) -> DiskFull:
        """`what` needs `needed` bytes on disk and `free` bytes are free."""
        return cls(
            f"{what} needs {human_bytes(needed)} of disk and {human_bytes(free)} is free.",
            fix="Delete what is no longer needed, or set MISTUDIO_HOME to a larger disk; then retry the job.",
        )


class JobFailed(MistudioError):
    """A job ended without a result."""

    code, status = "job_failed", 500


class Cancelled(MistudioError):
    """A job was cancelled."""

    code, status = "cancelled", 409


class EngineMissing(MistudioError):
    """No engine is reachable, or its packages are not installed."""

    code, status = "engine_missing", 503


class EngineBusy(MistudioError):
    """Another engine owns the data directory, or the port is in use."""

    code, status = "engine_busy", 409


class Unreachable(MistudioError):
    """A hub or another server could not be reached."""

    code, status = "unreachable", 502


class Unauthorized(MistudioError):
    """The token is missing or wrong."""

    code, status = "unauthorized", 401


class Forbidden(MistudioError):
    """A foreign Origin, or a path outside the data directory."""

    code, status = "forbidden", 403


class WrongHost(MistudioError):
    """The Host header names somebody else."""

    code, status = "wrong_host", 421


class TooLarge(MistudioError):
    """The body is over the cap."""

    code, status = "too_large", 413


class Internal(MistudioError):
    """A fault of ours; the engine's log has the trace."""

    code, status = "internal", 500


def _tree(cls: type[MistudioError]) -> dict[str, type[MistudioError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


ERRORS: dict[str, type[MistudioError]] = _tree(MistudioError)
"""Every error by its code, so that a client raises what the engine raised."""


def error_from_body(body: ErrorBody) -> MistudioError:
    """The error that a body describes; an unknown code (a newer engine) gives the base class."""
    cls = ERRORS.get(body.code, MistudioError)
    return cls(body.what, why=body.why, fix=body.fix, next_call=body.next_call)
