"""A blocking transfer in a thread of its own, followed and stopped from a job's generator.

The meter is written by the thread and read by the generator. A thread cannot be killed: it ends at the next chunk after
it was told to, or when its connection gives up. It does not know what is transferred, nor by which protocol.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from mistudio_engine.api.errors import Cancelled
from mistudio_engine.api.events import Progress, Signal

__all__ = ["Meter", "Transfer"]

T = TypeVar("T")

STEP_SECONDS = 0.25

CANCEL_SECONDS = 4.0
"""How long a cancelled transfer waits for its thread, which may hang in a dead connection."""


class Stopped(Exception):
    """The transfer was told to stop."""


class Meter:
    """How far a transfer is, and whether it is to go on."""

    def __init__(self, n_bytes: int | None = None) -> None:
        self.n_bytes = n_bytes
        """How many there will be; None while that is not known."""

        self.n_done = 0
        self.stage = "starting"
        self.stop = False
        self._began: tuple[float, int] | None = None

    def require_going_on(self) -> None:
        """Called by the thread where it can stop."""
        if self.stop:
            raise Stopped

    def have(self, n_bytes: int) -> None:
        """So many bytes more are here; fewer, when they have to be fetched again."""
        self.require_going_on()
        self.n_done += n_bytes

    def arrived(self, n_bytes: int) -> None:
        """Bytes came from the network: these make the rate."""
        if self._began is None:
            self._began = time.monotonic(), self.n_done
        self.have(n_bytes)

    def progress(self) -> Progress:
        """As it is now."""
        rate = eta = None
        if self._began is not None:
            seconds = time.monotonic() - self._began[0]
            rate = max(0.0, self.n_done - self._began[1]) / seconds if seconds > 0 else None
            eta = (self.n_bytes - self.n_done) / rate if rate and self.n_bytes else None
        fraction = min(1.0, self.n_done / self.n_bytes) if self.n_bytes else None
        return Progress(fraction=fraction, stage=self.stage, rate=rate, unit="bytes", eta_seconds=eta)

    def bar(self) -> type[tqdm]:
        """A class of progress bar that shows nothing and tells this meter, for libraries that want one."""
        meter = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **keywords: Any) -> None:
                super().__init__(*args, **{**keywords, "disable": True})

            def update(self, n: float | None = 1) -> None:
                meter.arrived(int(n or 0))

        return Bar


class Transfer(Generic[T]):
    """`work`, which tells `meter` how far it is, done in a thread."""

    def __init__(self, work: Callable[[], T], meter: Meter) -> None:
        self._work, self._meter = work, meter
        self._done = threading.Event()
        self._outcome: list[T] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="mistudio-transfer", daemon=True)

    @property
    def running(self) -> bool:
        """Whether the thread is still there."""
        return self._thread.is_alive()

    def follow(self) -> Generator[Progress, Signal, T]:
        """Start it, yield how far it is, return or raise what it ends with. Closing this stops it.

        Raises Cancelled when it is told to stop early: a part of a transfer is of no use.
        """
        yield self._meter.progress()
        self._thread.start()
        try:
            while not self._done.wait(STEP_SECONDS):
                if (yield self._meter.progress()) is Signal.STOP:
                    raise Cancelled(
                        "The transfer was stopped.", fix="Start it again: it goes on from what has arrived."
                    )
        finally:
            self._meter.stop = True
            self._thread.join(CANCEL_SECONDS)
        if self._failure is not None:
            raise self._failure
        return self._outcome[0]

    def _run(self) -> None:
        try:
            self._outcome.append(self._work())
        except BaseException as error:  # raised again where it is followed
            self._failure = error
        finally:
            self._done.set()
