"""Where the engine lives, how it is found, and how it is started when none runs.

A data directory holds `engine.json` (url, token, pid, version, epoch), renamed into place once the engine's socket
listens, and `engine.log`. An engine is *there* when the file, its process and its `/ping` agree; each of them alone can
be a left-over. One starter at a time holds `start.lock`, so six clients that start at once make one engine.

This file knows nothing of what an engine does. It loads neither torch nor the HTTP client until it has to ask, so that
the command line, the MCP door and the Jupyter extension begin fast. Linux and macOS: it needs `flock`.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mistudio_engine.api.errors import EngineBusy, EngineMissing

__all__ = [
    "EXIT_BUSY",
    "EXIT_DEVICE_LOST",
    "EngineFile",
    "LockHolder",
    "data_dir",
    "engine_file_path",
    "ensure_engine",
    "lock_holder",
    "lock_path",
    "log_path",
    "make_data_dir",
    "missing_packages",
    "probe",
    "process_alive",
    "read_engine_file",
    "remove_engine_file",
    "start_engine",
    "tail",
    "write_engine_file",
]

EXIT_BUSY = 75
"""Exit status of an engine that found another one on its directory (EX_TEMPFAIL of sysexits.h)."""

EXIT_DEVICE_LOST = 74
"""Exit status of an engine whose device was lost: another process can go on (EX_IOERR of sysexits.h)."""

ENGINE_PACKAGES = ("torch", "transformers", "lancedb", "uvicorn")
"""What the extra `[engine]` brings and the base install does not."""

LOG_CAP_BYTES = 16 * 1024 * 1024
"""An `engine.log` larger than this is set aside as `engine.log.1` at the next start."""

POLL_SECONDS = 0.05


class EngineFile(BaseModel):
    """What `engine.json` says. The token is left out of its printed form."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="ignore")

    url: str
    """Base address, such as `http://127.0.0.1:8741`, without a slash at its end."""

    token: str = Field(repr=False)
    """What `Authorization: Bearer` must carry; a fresh one for each engine."""

    pid: int
    version: str
    epoch: str
    """A name that no other engine ever had; `/ping` answers with the same."""

    started_at: float
    """Seconds since 1970."""


class LockHolder(NamedTuple):
    """Who holds `engine.lock`, as it says itself."""

    pid: int
    url: str | None


def data_dir(home: Path | str | None = None) -> Path:
    """The data directory, absolute: the one given, else MISTUDIO_HOME, else the user's data folder. Makes nothing."""
    if home is None:
        home = os.environ.get("MISTUDIO_HOME") or None
    if home is None:
        import platformdirs  # 40 ms that an explicit home saves

        return platformdirs.user_data_path("mistudio", appauthor=False)
    return Path(os.path.abspath(Path(home).expanduser()))


def make_data_dir(home: Path | str | None = None) -> Path:
    """The data directory, made with mode 0700 where it is missing; an existing one keeps its mode."""
    path = data_dir(home)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def engine_file_path(home: Path | str | None = None) -> Path:
    """Path of `engine.json`."""
    return data_dir(home) / "engine.json"


def log_path(home: Path | str | None = None) -> Path:
    """Path of `engine.log`, which a started engine writes its output to."""
    return data_dir(home) / "engine.log"


def lock_path(home: Path | str | None = None) -> Path:
    """Path of `engine.lock`, which an engine holds for life."""
    return data_dir(home) / "engine.lock"


def lock_holder(home: Path | str | None = None) -> LockHolder | None:
    """Who the lock file names, or None when it names nobody or its process is gone. Says nothing of the lock itself."""
    try:
        said = json.loads(lock_path(home).read_bytes())
        holder = LockHolder(int(said["pid"]), said["url"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return holder if process_alive(holder.pid) else None


def read_engine_file(home: Path | str | None = None) -> EngineFile | None:
    """What `engine.json` says, or None when it is missing, torn or from something else."""
    try:
        return EngineFile.model_validate_json(engine_file_path(home).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def write_engine_file(home: Path | str | None, engine: EngineFile) -> Path:
    """Write `engine.json`: renamed into place (nobody sees half of it), mode 0600 from the start."""
    path = engine_file_path(home)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)  # O_CREAT would keep the mode of one that a crash left behind
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(engine.model_dump(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


def remove_engine_file(home: Path | str | None, epoch: str | None = None) -> bool:
    """Remove `engine.json`; with an epoch only if it is that engine's. True when it was removed."""
    if epoch is not None:
        engine = read_engine_file(home)
        if engine is None or engine.epoch != epoch:
            return False
    try:
        engine_file_path(home).unlink()
    except FileNotFoundError:
        return False
    return True


def process_alive(pid: int) -> bool:
    """Whether a process with this id exists, whoever owns it."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def probe(home: Path | str | None = None, timeout: float = 2.0) -> EngineFile | None:
    """The engine of this directory, if one answers: its file is there, its process lives, its `/ping` has its epoch.

    Proxies of the environment are not asked: the engine is on this machine. Takes at most about `timeout` seconds.
    """
    engine = read_engine_file(home)
    if engine is None or not process_alive(engine.pid):
        return None
    import httpx  # 150 ms, and only needed when there is somebody to ask

    try:
        with httpx.Client(trust_env=False, timeout=timeout) as client:
            answer = client.get(f"{engine.url}/ping", headers={"Authorization": f"Bearer {engine.token}"})
        pong = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None
    return engine if isinstance(pong, dict) and pong.get("epoch") == engine.epoch else None


def missing_packages() -> list[str]:
    """Packages an engine needs and this interpreter lacks; looks without importing them."""
    return [name for name in ENGINE_PACKAGES if importlib.util.find_spec(name) is None]


def ensure_engine(home: Path | str | None = None, wait_seconds: float = 30.0) -> EngineFile:
    """The engine of this directory, started if none answers. Raises as `start_engine`."""
    return probe(home) or start_engine(home, wait_seconds=wait_seconds)


def start_engine(
    home: Path | str | None = None, *, wait_seconds: float = 30.0, arguments: Sequence[str] = ()
) -> EngineFile:
    """Start an engine that outlives us and wait until it answers; one that answers already is taken as it is.

    Args:
        home: the data directory, as for `data_dir`.
        wait_seconds: how long it may take to answer.
        arguments: more of the command line of `mistudio serve`, such as `["--port", "8741"]`.

    Raises:
        EngineMissing: its packages are not installed, or it died at its start (with the last lines of its log).
        EngineBusy: another engine owns the directory and does not answer, or the start takes longer than we wait.
    """
    home = make_data_dir(home)
    deadline = time.monotonic() + wait_seconds
    with _one_starter(home, deadline):
        running = probe(home)
        if running is not None:
            return running
        _require_packages()
        log, offset = _open_log(home)
        try:
            while True:
                child = _spawn(home, arguments, log)
                engine = _wait_for(home, child, deadline, wait_seconds, offset)
                if engine is not None:
                    return engine
        finally:
            os.close(log)


def _require_packages() -> None:
    missing = missing_packages()
    if missing:
        raise EngineMissing(
            f"The engine needs {', '.join(missing)}, which {sys.executable} does not have.",
            why="The base install of miStudio is the client only.",
            fix=f'Install the engine: {sys.executable} -m pip install "mistudio[engine]"',
        )


@contextmanager
def _one_starter(home: Path, deadline: float) -> Iterator[None]:
    """Hold `start.lock`; whoever waits for it finds the engine that the holder started."""
    descriptor = os.open(home / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EngineBusy(
                        f"Somebody else has been starting an engine on {home} for too long.",
                        fix=f"Look into {log_path(home)}, then try again.",
                    ) from None
                time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)  # closing lets go of the lock


def _open_log(home: Path) -> tuple[int, int]:
    """A descriptor that appends to `engine.log`, and where the coming output begins."""
    path = log_path(home)
    if path.exists() and path.stat().st_size > LOG_CAP_BYTES:
        os.replace(path, path.with_name("engine.log.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    return descriptor, os.fstat(descriptor).st_size


def _spawn(home: Path, arguments: Sequence[str], log: int) -> subprocess.Popen[bytes]:
    # -P and cwd: the engine must neither import a torch.py that lies in somebody's folder nor keep that folder busy.
    command = [sys.executable, "-P", "-m", "mistudio_engine.server", "serve", "--home", str(home), *arguments]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=home,
        env=os.environ | _python_path(),
        start_new_session=True,
    )
    # Somebody has to collect its exit status: left as a zombie it would look alive to whoever asks by pid.
    threading.Thread(target=child.wait, name="mistudio-engine-reaper", daemon=True).start()
    return child


def _python_path() -> dict[str, str]:
    """PYTHONPATH for a child in another folder: ours made absolute, and a checkout that is not installed."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    root = str(Path(__file__).resolve().parents[2])
    if root != sysconfig.get_path("purelib"):
        paths.append(root)
    return {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}


def _wait_for(
    home: Path, child: subprocess.Popen[bytes], deadline: float, wait_seconds: float, offset: int
) -> EngineFile | None:
    """The engine that answers; None when ours gave way to one that has ended since, or is about to be started again."""
    while True:
        # Ours, or one that `mistudio serve` started beside us: either is the engine of this directory.
        engine = probe(home, timeout=1.0)
        if engine is not None:
            return engine
        status = child.poll()
        if status not in (None, EXIT_BUSY):
            raise EngineMissing(
                f"The engine ended at its start with status {status}.",
                why=_last_words(home, offset),
                fix=f"The whole log is {log_path(home)}; `mistudio doctor` checks the installation.",
            )
        owner = lock_holder(home)
        if status == EXIT_BUSY and time.monotonic() > deadline:
            raise EngineBusy(
                f"Another engine (pid {owner.pid}) owns {home} and does not answer."
                if owner
                else "The engine gave way at its start.",
                why=_last_words(home, offset),
                fix="Stop the other with `mistudio engine stop`, or set MISTUDIO_HOME to another directory.",
            )
        if status == EXIT_BUSY and owner is None:
            return None
        if time.monotonic() > deadline:
            raise EngineBusy(
                f"The engine (pid {child.pid}) did not answer within {wait_seconds:g} s.",
                why=_last_words(home, offset),
                fix="It is still starting: try again in a moment, or look into `mistudio engine logs`.",
            )
        time.sleep(POLL_SECONDS)


def _last_words(home: Path, offset: int) -> str:
    words = tail(log_path(home), n_lines=8, start=offset)
    return f"Its last lines:\n{words}" if words else "It wrote nothing into its log."


def tail(path: Path, n_lines: int, start: int = 0) -> str:
    """The last lines of a text file, at most 16 KiB of them, beginning no earlier than byte `start`; "" without one."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - 16 * 1024))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-n_lines:])
