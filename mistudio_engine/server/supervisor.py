"""The process above the engine's: it starts the engine again when its device was lost, and does nothing else.

After a sticky CUDA error nothing but a new process can use the GPU. The engine is a fork of this one, made before
anything heavy is imported, so that it costs no start of an interpreter and needs no command line of its own. The lock
of the data directory and the listening socket stay with us while the engine is away: nobody takes its place, and who
calls meanwhile waits. It does not know what an engine is.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

from mistudio_engine.api.home import EXIT_DEVICE_LOST, remove_engine_file
from mistudio_engine.runtime.lock import EngineLock

__all__ = ["supervise"]

log = logging.getLogger(__name__)

MAX_RESTARTS = 5
WINDOW_SECONDS = 600.0
"""An engine that lost its device more often than this within ten minutes is left alone: a new process does not help."""

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def supervise(lock: EngineLock) -> None:
    """Go on in a child process, and in another one each time a child ends with EXIT_DEVICE_LOST.

    Only children return from here. The process that calls it waits for them, passes signals on, and ends as its last
    child did, through SystemExit where that is possible.
    """
    Supervisor(lock).run()


class Supervisor:
    """The parent's side; `run` returns in the children only."""

    def __init__(self, lock: EngineLock) -> None:
        self._lock = lock
        self._child: int | None = None
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._alive, self._our_end = os.pipe()  # closed by the system when this process ends, however it ends

    def run(self) -> None:
        """Fork, wait, and once more if the child says so."""
        restarts: deque[float] = deque(maxlen=MAX_RESTARTS)
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
                self._handlers[number] = signal.signal(number, self._pass_on)
        while self._fork():
            status = self._wait()
            if status != EXIT_DEVICE_LOST or self._signal is not None:
                _end_like(status)
            self._note(restarts)

    def _pass_on(self, number: int, _frame: Any) -> None:
        self._signal = number
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.kill(self._child, number)

    def _fork(self) -> bool:
        """True here, False in the child."""
        sys.stdout.flush()
        sys.stderr.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # none comes while it is unclear whose it is
        try:
            if self._signal is not None:  # it came while there was no child to pass it on to
                _end_like(-self._signal)
            with self._lock.shared_with_child():
                self._child = os.fork()
            if self._child:
                return True
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.setpgid(0, 0)  # Ctrl-C in a terminal comes to us alone, and from us once
        os.close(self._our_end)
        threading.Thread(target=_end_with_parent, args=[self._alive], name="mistudio-parent", daemon=True).start()
        return False

    def _wait(self) -> int:
        """The child's exit status, negative for a signal."""
        assert self._child
        _, status = os.waitpid(self._child, 0)
        self._child = None
        return os.waitstatus_to_exitcode(status)

    def _note(self, restarts: deque[float]) -> None:
        now = time.monotonic()
        if len(restarts) == MAX_RESTARTS and now - restarts[0] < WINDOW_SECONDS:
            log.critical(
                "The engine lost its device %d times within %.0f minutes and is not started again. `nvidia-smi` says "
                "how the GPU is; `mistudio engine start` tries anew, and the interrupted jobs go on then.",
                MAX_RESTARTS + 1,
                WINDOW_SECONDS / 60,
            )
            sys.exit(EXIT_DEVICE_LOST)
        restarts.append(now)
        log.warning("the engine lost its device and is started again")
        remove_engine_file(self._lock.path.parent)
        self._lock.describe(None)


def _end_with_parent(alive: int) -> None:
    """Whoever kills the process that they started means the engine: it must not hold the directory on its own."""
    os.read(alive, 1)  # returns when the other end is closed
    os.kill(os.getpid(), signal.SIGKILL)


def _end_like(status: int) -> None:
    """End as the child did: with its status, or by the signal that ended it where one asks for an end."""
    if -status in PASSED_ON:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status if status >= 0 else 128 - status)
