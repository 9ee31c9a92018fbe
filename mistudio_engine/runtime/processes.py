"""Processes for Python-heavy work (spaCy, UMAP), which would hold up every thread of the engine.

Spawned, never forked: a fork of a process with threads and a GPU inherits locks that nobody opens again. They start
when they are first needed, work on plain data, and end with the `with` block, with the engine, and at once when what
they work on is cancelled: a process can be killed in the middle of a step, which a thread cannot. It does not know what
they do.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from multiprocessing import connection
from typing import Any, NamedTuple, Self, TypeVar

from mistudio_engine.api.errors import ErrorBody, Internal, JobFailed, MistudioError, error_from_body

__all__ = ["ProcessPool"]

T = TypeVar("T")

WAIT_SECONDS = 0.2
"""Between two looks whether a process is done: how long a cancel may wait."""

END_SECONDS = 5.0
"""For a killed process to be gone."""

MOST_PROCESSES = 4
"""Each takes half a gigabyte for its libraries."""

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_NICE = 10


class ProcessPool:
    """At most `n_processes` processes, half the cores by default. Use it in a `with` block, on one thread at a time."""

    def __init__(self, n_processes: int | None = None) -> None:
        self.n_processes = n_processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) // 2))
        self._processes: list[_Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._processes = []

    def run(self, function: Callable[..., T], *arguments: Any) -> Generator[None, Any, T]:
        """Calls `function` in a process, and yields every now and then until it has returned; closing kills it.

        The function is one that a fresh process can import; arguments and result are plain data. Raises what it raises
        if that is an error of ours, Internal for any other, JobFailed when the process died.
        """
        work = self.map(function, [arguments])
        try:
            for done in work:
                if done is not None:
                    return done[1]
                yield
        finally:
            work.close()
        raise AssertionError("map ends with a result or raises")

    def map(
        self, function: Callable[..., T], calls: Iterable[tuple[Any, ...]]
    ) -> Generator[tuple[int, T] | None, Any, None]:
        """As `run`, for many calls: yields (number of the call, result) as each is done, None while all are at work."""
        waiting = deque(enumerate(calls))
        busy: dict[_Process, int] = {}
        try:
            while waiting or busy:
                while waiting and (process := self._free(busy)) is not None:
                    number, arguments = waiting.popleft()
                    process.begin(function, arguments)
                    busy[process] = number
                done = connection.wait([process.pipe for process in busy], WAIT_SECONDS)
                for process in [each for each in busy if each.pipe in done]:
                    number = busy.pop(process)
                    yield number, process.result()
                if not done:
                    yield None
        finally:
            for process in busy:  # nobody wants these results any more
                process.kill()
                self._processes.remove(process)

    def _free(self, busy: dict[_Process, int]) -> _Process | None:
        for process in list(self._processes):
            if not process.alive:
                self._processes.remove(process)
            elif process not in busy:
                return process
        if len(self._processes) >= self.n_processes:
            return None
        self._processes.append(_Process())
        return self._processes[-1]


class _Answer(NamedTuple):
    value: Any = None
    error: ErrorBody | None = None


class _Process:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), name="mistudio-worker", daemon=True)
        self._process.start()
        theirs.close()  # or the pipe would not end with the process

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def begin(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            self.pipe.send((function, arguments))
        except OSError as error:  # a broken pipe
            raise self._death() from error

    def result(self) -> Any:
        try:
            answer: _Answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if answer.error is not None:
            raise error_from_body(answer.error)
        return answer.value

    def kill(self) -> None:
        self._process.kill()
        self._process.join(END_SECONDS)
        self.pipe.close()

    def _death(self) -> JobFailed:
        self._process.join(END_SECONDS)
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        why = "The system kills processes when memory runs out." if code == -signal.SIGKILL else ""
        return JobFailed(f"A worker process {how}.", why=why, fix="Retry the job; the engine's log may say more.")


def _work(pipe: connection.Connection) -> None:
    """What a process does: calls, one after another, until its parent closes the pipe or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which ends us in its own time
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(_NICE)  # whoever waits for an answer of the engine comes first
    for name in _ONE_THREAD:  # before anything imports numpy
        os.environ[name] = "1"
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(function, arguments))


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Answer:
    try:
        return _Answer(function(*arguments))
    except MistudioError as error:
        return _Answer(error=error.body)
    except Exception as error:  # the edge of the process: a fault of ours is told, with its trace in the engine's log
        traceback.print_exc()
        fault = Internal(f"{function.__name__} failed by a fault of ours: {type(error).__name__}: {error}.")
        return _Answer(error=fault.body)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
