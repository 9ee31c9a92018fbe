"""The state of an extraction in one file: named arrays, and what they are the state of.

An uncompressed `.npz` without pickle, whose members carry a CRC; it is written beside its final name, synced and
renamed, so that it is there whole or not at all. It does not know what the arrays mean, only who has them.
"""

from __future__ import annotations

import json
import logging
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.saes.folders import new_file

__all__ = ["Keeper", "read_checkpoint", "write_checkpoint"]

log = logging.getLogger(__name__)

_WHAT = "what"

_WRITE_SHARE = 0.05
"""Of the time, at most, that writing checkpoints may take."""

_WORTH_SECONDS = 5.0
"""Work that is worth a checkpoint at the end of a pass."""


class HasState(Protocol):
    """What a checkpoint is taken of."""

    def state(self) -> dict[str, NDArray]: ...

    def restore(self, state: Mapping[str, NDArray]) -> None: ...


class Keeper:
    """Writes the state of a pass now and then, and finds it again.

    Args:
        path: the file; None keeps nothing.
        seconds: between two checkpoints, or more where they take long to write.
        reader: where the pass is.
        totals: what it has added up.
        what: what they belong to; a checkpoint of anything else is not taken over.
    """

    def __init__(
        self, path: Path | None, seconds: float, reader: HasState, totals: Sequence[HasState], what: Mapping[str, Any]
    ) -> None:
        self._path, self._what, self._seconds = path, what, seconds
        self._parts: dict[str, HasState] = {"reader": reader, **{str(n): each for n, each in enumerate(totals)}}
        self._written_at = time.monotonic()

    def is_wanted(self, now: bool) -> bool:
        """Is it time for the next one, or does somebody want it now?"""
        return self._path is not None and (now or time.monotonic() - self._written_at >= self._seconds)

    @property
    def is_worth_it(self) -> bool:
        """Would more be lost than writing one costs?"""
        return self._path is not None and time.monotonic() - self._written_at >= _WORTH_SECONDS

    def go_on(self) -> None:
        """Take the checkpoint over, if there is one."""
        state = None if self._path is None else read_checkpoint(self._path, self._what)
        if state is None:
            return
        for name, part in self._parts.items():
            start = f"{name}/"
            part.restore({key.removeprefix(start): each for key, each in state.items() if key.startswith(start)})

    def write(self) -> Iterator[None]:
        """Write one, in small steps, between which nothing may be added."""
        assert self._path is not None
        began = time.monotonic()
        arrays = {f"{name}/{key}": each for name, part in self._parts.items() for key, each in part.state().items()}
        yield from write_checkpoint(self._path, arrays, self._what)
        self._written_at = time.monotonic()
        self._seconds = max(self._seconds, (self._written_at - began) / _WRITE_SHARE)


def write_checkpoint(path: Path, arrays: Mapping[str, NDArray], what: Mapping[str, Any]) -> Iterator[None]:
    """Write it, an array a step; it has its name when the iterator ends. `what` is compared when it is read."""
    with new_file(path) as part, zipfile.ZipFile(part, "w") as archive:
        archive.writestr(f"{_WHAT}.json", json.dumps(what, sort_keys=True))
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            yield


def read_checkpoint(path: Path, what: Mapping[str, Any]) -> dict[str, NDArray] | None:
    """The arrays; None where there is no such file, or it is damaged or of something else, which is logged."""
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if json.loads(archive.read(f"{_WHAT}.json")) != json.loads(json.dumps(what)):
                log.warning("%s belongs to an extraction with other settings: it begins anew", path.name)
                return None
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            found = {}
            for name in names:
                with archive.open(name) as member:
                    found[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
                    member.read()  # to its end, where the CRC is compared
            return found
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s): the extraction begins anew", path.name, error)
        return None
