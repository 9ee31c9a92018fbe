"""One engine per data directory: `engine.lock`, held from start to end.

The lock is `flock` on an open file, so the system lets go of it when its process ends, however it ends: a lock is never
stale, and nobody has to guess from a pid. What the file *says* (pid, url) is only for the message to whoever comes
second. Linux and macOS; `flock` on a network file system needs one that supports it.

It does not know what an engine is, nor how one is found (`mistudio_engine.api.home`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from mistudio_engine.api.errors import EngineBusy, Unsupported
from mistudio_engine.api.home import lock_holder, lock_path, make_data_dir, remove_engine_file

__all__ = ["EngineLock"]

HOLDER_WAIT_SECONDS = 0.5
"""A holder writes its pid right after it has the lock; how long a second one waits to read it."""


class EngineLock:
    """The right to be the engine of a data directory.

        with EngineLock.acquire(home) as lock:
            ...                      # bind the socket
            lock.describe(url)       # so that a second engine can name us

    A forked child does not keep it: otherwise a data loader's orphan would hold the directory of a killed engine.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        _held.add(self)

    @classmethod
    def acquire(cls, home: Path | str | None = None) -> EngineLock:
        """Take the lock and remove what a dead engine left in `engine.json`.

        Raises:
            EngineBusy: another engine holds it; known within a second, and named.
            Unsupported: the file system has no locks.
        """
        path = lock_path(make_data_dir(home))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise _busy(path) from None
            raise Unsupported(
                f"{path.parent} lies on a file system without locks.",
                why=str(error),
                fix="Set MISTUDIO_HOME to a local disk.",
            ) from error
        lock = cls(path, descriptor)
        lock.describe(None)
        remove_engine_file(path.parent)
        return lock

    @property
    def held(self) -> bool:
        """False once it was released."""
        return self._descriptor is not None

    def describe(self, url: str | None) -> None:
        """Write our pid and address into the lock file, for the message to a second engine."""
        if self._descriptor is None:
            raise ValueError(f"{self.path} was released")
        text = json.dumps({"pid": os.getpid(), "url": url}).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text, 0)

    def release(self) -> None:
        """Let go. The file stays: unlinking it would let two engines lock two files of one name."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _drop_in_child(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_held: weakref.WeakSet[EngineLock] = weakref.WeakSet()


def _drop_all_in_child() -> None:
    for lock in list(_held):
        lock._drop_in_child()


os.register_at_fork(after_in_child=_drop_all_in_child)


def _busy(path: Path) -> EngineBusy:
    deadline = time.monotonic() + HOLDER_WAIT_SECONDS
    holder = lock_holder(path.parent)
    while holder is None and time.monotonic() < deadline:
        time.sleep(0.01)
        holder = lock_holder(path.parent)
    who = f"the engine with pid {holder.pid}" if holder else "another process"
    where = f" at {holder.url}" if holder and holder.url else ""
    return EngineBusy(
        f"{path.parent} is in use by {who}{where}.",
        fix="Use that engine (`mistudio engine status`), stop it (`mistudio engine stop`), or set MISTUDIO_HOME to "
        "another directory.",
    )
