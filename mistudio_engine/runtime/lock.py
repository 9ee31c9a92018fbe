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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from mistudio_engine.api.errors import EngineBusy, Unsupported
from mistudio_engine.api.home import LockHolder, lock_holder, lock_path, make_data_dir, remove_engine_file

__all__ = ["EngineLock"]

HOLDER_WAIT_SECONDS = 0.5
"""A holder writes its pid right after it has the lock, and ends right after its engine; how long a second one waits to
know which it is."""


class EngineLock:
    """The right to be the engine of a data directory.

        with EngineLock.acquire(home) as lock:
            ...                      # bind the socket
            lock.describe(url)       # so that a second engine can name us

    A forked child does not keep it: otherwise a data loader's orphan would hold the directory of a killed engine. Only
    one that is forked inside `shared_with_child` does.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._is_shared = False
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
            _lock(descriptor, path)
        except EngineBusy:
            os.close(descriptor)
            raise
        except OSError as error:
            os.close(descriptor)
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

    @contextmanager
    def shared_with_child(self) -> Iterator[None]:
        """A child forked inside the block holds the lock, too: it is free when both have let go or ended."""
        self._is_shared = True
        try:
            yield
        finally:
            self._is_shared = False

    def release(self) -> None:
        """Let go. The file stays: unlinking it would let two engines lock two files of one name."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _drop_in_child(self) -> None:
        if self._descriptor is not None and not self._is_shared:
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


def _lock(descriptor: int, path: Path) -> None:
    """Lock the file; while whoever holds it is not named, or is just ending, try again for a moment.

    Raises:
        EngineBusy: somebody holds it.
    """
    deadline = time.monotonic() + HOLDER_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        holder = lock_holder(path.parent)
        if holder is not None or time.monotonic() > deadline:
            raise _busy(path, holder) from None
        time.sleep(0.01)


def _busy(path: Path, holder: LockHolder | None) -> EngineBusy:
    who = f"the engine with pid {holder.pid}" if holder else "another process"
    where = f" at {holder.url}" if holder and holder.url else ""
    return EngineBusy(
        f"{path.parent} is in use by {who}{where}.",
        fix="Use that engine (`mistudio engine status`), stop it (`mistudio engine stop`), or set MISTUDIO_HOME to "
        "another directory.",
    )
