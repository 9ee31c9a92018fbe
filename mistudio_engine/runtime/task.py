"""A task: a generator on its way through a lane, and the promise of what it will return.

A lane calls `advance` until it is over; everybody else signals, cancels and waits. It does not know which thread that
is, nor that there are jobs.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from mistudio_engine.api.errors import Cancelled
from mistudio_engine.api.events import Signal

__all__ = ["Task", "once"]

T = TypeVar("T")

log = logging.getLogger("mistudio.task")


def once(fn: Callable[[], T]) -> Generator[None, Signal, T]:
    """A call as a generator of one step."""
    return fn()
    yield


class Task(Generic[T]):
    """One generator and its future.

    `on_step` is called with whatever the generator yields, on the thread that steps it. `future` holds the end: the
    returned value, the exception, or Cancelled.
    """

    def __init__(
        self, generator: Generator[Any, Signal, T], *, name: str = "", on_step: Callable[[Any], None] | None = None
    ) -> None:
        self.name = name
        self.future: Future[T] = Future()
        self._generator = generator
        self._on_step = on_step
        self._started = False
        self._signal = Signal.GO
        self._cancelled: str | None = None

    def signal(self, signal: Signal) -> None:
        """Is sent into the generator with its next step, once; STOP is not replaced by CHECKPOINT."""
        if self._signal is not Signal.STOP:
            self._signal = signal

    def cancel(self, why: str = "It was cancelled.") -> None:
        """Closes the generator before its next step; the future then raises Cancelled."""
        self._cancelled = why

    def result(self, seconds: float | None = None) -> T:
        """Waits for the end; raises what the generator raised, Cancelled, or TimeoutError."""
        return self.future.result(seconds)

    def advance(self) -> bool:
        """Does one step; False when that was the last one. Only the owning lane calls this; it raises nothing."""
        # A lane outlives whatever its tasks do, so this is an edge: every exception belongs to the task alone.
        first, self._started = not self._started, True
        if first and not self.future.set_running_or_notify_cancel():
            self._close()  # whoever waited for it gave up before it began
            return False
        try:
            if self._cancelled is not None:
                raise Cancelled(self._cancelled)
            if first:
                step = next(self._generator)
            else:
                signal, self._signal = self._signal, Signal.GO
                step = self._generator.send(signal)
            if self._on_step is not None:
                self._on_step(step)
            return True
        except StopIteration as end:
            self.future.set_result(end.value)
        except BaseException as error:
            self._close()
            traceback.clear_frames(error.__traceback__)  # a kept exception must not keep the tensors of its frames
            self.future.set_exception(error)
        return False

    def _close(self) -> None:
        try:
            self._generator.close()
        except BaseException:
            log.exception("%s did not close cleanly", self.name or "a task")
