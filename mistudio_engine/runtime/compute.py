"""The compute lane: one thread owns the accelerator, and all work for it passes here in small steps.

Heavy work (training, extraction) runs one at a time, by priority, then first in, first out; between two of its steps at
most one interactive step (steering, features on a text) gets its turn, round robin among the interactive tasks. With
only one thread there are no locks around torch. It does not know torch, nor jobs, nor memory.

A heavy task is not preempted by one of a higher priority that comes later: that one is next. Swapping two trainings in
and out of memory would cost more than it gains; whoever is in a hurry pauses the running job.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from mistudio_engine.api.errors import Cancelled
from mistudio_engine.api.events import Signal
from mistudio_engine.runtime.task import Task, once

__all__ = ["ComputeLane"]

T = TypeVar("T")

log = logging.getLogger("mistudio.compute")


class ComputeLane:
    """`start` starts the thread, `stop` ends it; work may be submitted before. Submitting is for other threads."""

    def __init__(self, name: str = "mistudio-compute") -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, Task[Any]]] = []  # a heap by (-priority, order of arrival)
        self._arrivals = itertools.count()
        self._heavy: Task[Any] | None = None
        self._interactive: deque[Task[Any]] = deque()
        self._heavy_stepped_last = False
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def heavy(
        self,
        generator: Generator[Any, Signal, T],
        *,
        priority: int = 0,
        name: str = "",
        on_step: Callable[[Any], None] | None = None,
    ) -> Task[T]:
        """Queues long work; higher priority first, then first in, first out."""
        task = Task(generator, name=name, on_step=on_step)
        self._submit(task, lambda: heapq.heappush(self._waiting, (-priority, next(self._arrivals), task)))
        return task

    def interactive(
        self, generator: Generator[Any, Signal, T], *, name: str = "", on_step: Callable[[Any], None] | None = None
    ) -> Task[T]:
        """Queues work that somebody waits for; it shares the thread with the heavy task step by step."""
        task = Task(generator, name=name, on_step=on_step)
        self._submit(task, lambda: self._interactive.append(task))
        return task

    def run(self, fn: Callable[[], T]) -> T:
        """Calls `fn` on the compute thread as one interactive step and returns what it returns, or raises."""
        return self.interactive(once(fn), name=getattr(fn, "__name__", "")).result()

    @property
    def is_here(self) -> bool:
        """Is the caller on the compute thread?"""
        return threading.current_thread() is self._thread

    def require_here(self) -> None:
        """Raises RuntimeError unless the caller is on the compute thread."""
        if not self.is_here:
            raise RuntimeError(f"only the thread {self._thread.name!r} may do this; pass it to ComputeLane.run")

    def require_elsewhere(self) -> None:
        """Raises RuntimeError on the compute thread, which would wait for itself for ever."""
        if self.is_here:
            raise RuntimeError("the compute thread cannot submit work to itself or wait for it: yield instead")

    def close(self) -> None:
        """Begins no further step, from any thread and without waiting; what has not ended is closed and Cancelled."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def stop(self, seconds: float = 10.0) -> bool:
        """Ends the thread after its present step; what has not ended is closed and raises Cancelled.

        True when the thread ended within `seconds`; being a daemon, it does not keep the process alive otherwise.
        """
        self.require_elsewhere()
        self.close()
        if self._thread.ident is None:
            self._cancel_all()
        else:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _submit(self, task: Task[Any], enqueue: Callable[[], None]) -> None:
        self.require_elsewhere()
        with self._changed:
            if self._closing:
                raise Cancelled("The engine is stopping.", fix="Connect again, which starts it.")
            enqueue()
            self._changed.notify()

    def _work(self) -> None:
        while self._turn():
            pass
        self._cancel_all()

    def _turn(self) -> bool:
        """One step of whoever is due; False when the lane is closing. Keeps nothing: an idle lane holds no task."""
        task = self._next()
        if task is None:
            return False
        if not task.advance():
            self._forget(task)
        return True

    def _next(self) -> Task[Any] | None:
        """The task that is due for a step; waits for one; None when the lane is closing."""
        with self._changed:
            while not (self._closing or self._heavy or self._waiting or self._interactive):
                self._changed.wait()
            if self._closing:
                return None
            if self._heavy is None and self._waiting:
                self._heavy = heapq.heappop(self._waiting)[2]
            if self._interactive and (self._heavy is None or self._heavy_stepped_last):
                self._heavy_stepped_last = False
                self._interactive.rotate(-1)  # round robin: the first one now stands last
                return self._interactive[-1]
            self._heavy_stepped_last = True
            return self._heavy

    def _forget(self, task: Task[Any]) -> None:
        with self._changed:
            if task is self._heavy:
                self._heavy = None
            else:
                self._interactive.remove(task)

    def _cancel_all(self) -> None:
        with self._changed:
            waiting = [task for _, _, task in sorted(self._waiting)]
            tasks = [*([self._heavy] if self._heavy else []), *self._interactive, *waiting]
            self._heavy, self._waiting = None, []
            self._interactive.clear()
        for task in tasks:
            task.cancel("The engine is stopping.")
            task.advance()
