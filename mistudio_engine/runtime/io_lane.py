"""The I/O lane: a few threads for work that waits for the network or the disk, beside the compute lane.

Downloads, labelling by an LLM and exports run here, several at a time, by priority, then first in, first out. They
never touch the accelerator. It does not know what they do.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from mistudio_engine.api.errors import Cancelled
from mistudio_engine.api.events import Signal
from mistudio_engine.runtime.task import Task, once

__all__ = ["IOLane"]

T = TypeVar("T")


class IOLane:
    """At most `n_threads` tasks at once; threads start when they are first needed."""

    def __init__(self, n_threads: int = 4) -> None:
        self._n_threads = n_threads
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, Task[Any]]] = []  # a heap by (-priority, order of arrival)
        self._arrivals = itertools.count()
        self._threads: list[threading.Thread] = []
        self._n_free = 0
        self._closing = False

    def submit(
        self,
        generator: Generator[Any, Signal, T],
        *,
        priority: int = 0,
        name: str = "",
        on_step: Callable[[Any], None] | None = None,
    ) -> Task[T]:
        """Queues work and returns its task."""
        task = Task(generator, name=name, on_step=on_step)
        with self._changed:
            if self._closing:
                raise Cancelled("The engine is stopping.", fix="Connect again, which starts it.")
            heapq.heappush(self._waiting, (-priority, next(self._arrivals), task))
            if self._n_free < len(self._waiting) and len(self._threads) < self._n_threads:
                # Daemons: a connection that hangs must not keep a stopping engine alive.
                thread = threading.Thread(target=self._work, name=f"mistudio-io-{len(self._threads) + 1}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return task

    def call(self, fn: Callable[[], T]) -> Future[T]:
        """Calls `fn` on a thread of the lane, in one step."""
        return self.submit(once(fn)).future

    def close(self, seconds: float = 10.0) -> bool:
        """Ends the threads after their present steps; what has not ended raises Cancelled. True when all have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """One task from its start to its end; False when the lane is closing."""
        task = self._next()
        if task is None:
            return False
        while task.advance():
            if self._closing:
                task.cancel("The engine is stopping.")
        return True

    def _next(self) -> Task[Any] | None:
        with self._changed:
            self._n_free += 1
            while not (self._closing or self._waiting):
                self._changed.wait()
            self._n_free -= 1
            if not self._waiting:
                return None
            task = heapq.heappop(self._waiting)[2]
            if self._closing:
                task.cancel("The engine is stopping.")
            return task
