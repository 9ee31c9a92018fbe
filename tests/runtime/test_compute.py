"""One thread does all the work, in fair turns, and no task can hurt another."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from mistudio_engine.api.errors import Cancelled
from mistudio_engine.api.events import Signal
from mistudio_engine.runtime.compute import ComputeLane
from mistudio_engine.runtime.io_lane import IOLane
from mistudio_engine.runtime.task import Task


@pytest.fixture
def lane() -> Iterator[ComputeLane]:
    """Not started yet: a test fills the queue first and then sees in which order it is worked off."""
    lane = ComputeLane()
    yield lane
    assert lane.stop()


def steps(name: str, n: int, order: list[str]) -> Generator[str, Signal, str]:
    for _ in range(n):
        order.append(name)
        yield name
    return f"{name} done"


def finish(*tasks: Task[Any]) -> list[Any]:
    return [task.result(30) for task in tasks]


def test_heavy_work_runs_by_priority_then_first_in_first_out(lane: ComputeLane) -> None:
    order: list[str] = []
    tasks = [
        lane.heavy(steps(name, 2, order), priority=priority)
        for name, priority in [("a", 0), ("b", 0), ("urgent", 5), ("later", -1)]
    ]
    lane.start()
    assert finish(*tasks) == ["a done", "b done", "urgent done", "later done"]
    assert order == ["urgent"] * 2 + ["a"] * 2 + ["b"] * 2 + ["later"] * 2


def test_a_higher_priority_is_next_but_does_not_preempt(lane: ComputeLane) -> None:
    order: list[str] = []
    running, queued = threading.Event(), threading.Event()

    def first() -> Generator[None, Signal, None]:
        running.set()
        assert queued.wait(30)
        yield
        order.append("first")

    lane.start()
    tasks = [lane.heavy(first()), lane.heavy(steps("waiting", 1, order))]
    assert running.wait(30)
    tasks.append(lane.heavy(steps("urgent", 1, order), priority=9))
    queued.set()
    finish(*tasks)
    assert order == ["first", "urgent", "waiting"]


def test_between_two_heavy_steps_there_is_one_interactive_step_in_fair_turns(lane: ComputeLane) -> None:
    order: list[str] = []
    tasks = [lane.heavy(steps("H", 7, order))]
    tasks += [lane.interactive(steps(name, n, order)) for name, n in [("a", 3), ("b", 2), ("c", 1)]]
    lane.start()
    finish(*tasks)
    turns = "".join(order)
    assert turns.startswith("HaHbHcHaHb")
    assert turns.replace("H", "") == "abcaba"


def test_run_gives_back_results_and_exceptions_of_the_compute_thread(lane: ComputeLane) -> None:
    lane.start()
    assert lane.run(lambda: threading.current_thread().name) == "mistudio-compute"
    assert lane.run(lambda: lane.is_here) and not lane.is_here
    with pytest.raises(ZeroDivisionError):
        lane.run(lambda: 1 / 0)
    assert lane.run(lambda: 42) == 42


def test_interactive_work_waits_for_one_heavy_step_only(lane: ComputeLane) -> None:
    def endless() -> Generator[None, Signal, None]:
        while True:
            yield

    lane.start()
    heavy = lane.heavy(endless())
    for n in range(20):
        assert lane.run(lambda n=n: n) == n
    heavy.cancel()
    with pytest.raises(Cancelled):
        heavy.result(30)


def test_the_compute_thread_cannot_submit_to_itself(lane: ComputeLane) -> None:
    lane.start()

    def submit(how: str) -> None:
        if how == "run":
            lane.run(lambda: None)
        elif how == "stop":
            lane.stop()
        else:
            getattr(lane, how)(steps("x", 1, []))

    for how in ("run", "heavy", "interactive", "stop"):
        with pytest.raises(RuntimeError, match="cannot submit work to itself"):
            lane.run(lambda how=how: submit(how))
    with pytest.raises(RuntimeError, match="only the thread 'mistudio-compute'"):
        lane.require_here()
    lane.run(lane.require_here)


def test_a_fault_in_a_step_ends_that_task_only(lane: ComputeLane) -> None:
    order: list[str] = []

    def faulty() -> Generator[None, Signal, None]:
        yield
        raise ValueError("broken")

    def misbehaved_observer(_: Any) -> None:
        raise LookupError("observer")

    tasks = [lane.heavy(faulty()), lane.heavy(steps("observed", 1, []), on_step=misbehaved_observer)]
    good = lane.heavy(steps("good", 1, order))
    lane.start()
    with pytest.raises(ValueError, match="broken"):
        tasks[0].result(30)
    with pytest.raises(LookupError):
        tasks[1].result(30)
    assert finish(good) == ["good done"]


def test_signals_reach_the_generator_once_and_stop_outranks_checkpoint(lane: ComputeLane) -> None:
    received: list[Signal] = []

    def listening() -> Generator[int, Signal, None]:
        for n in range(4):
            received.append((yield n))

    def on_step(n: int) -> None:
        if n == 1:
            task.signal(Signal.CHECKPOINT)
        if n == 2:
            task.signal(Signal.STOP)
            task.signal(Signal.CHECKPOINT)

    task = lane.interactive(listening(), on_step=on_step)
    lane.start()
    finish(task)
    assert received == [Signal.GO, Signal.CHECKPOINT, Signal.STOP, Signal.GO]


def test_cancelling_closes_the_generator_on_the_compute_thread(lane: ComputeLane) -> None:
    closed_on: list[str] = []
    stepped = threading.Event()

    def careful() -> Generator[None, Signal, None]:
        try:
            while True:
                stepped.set()
                yield
        finally:
            closed_on.append(threading.current_thread().name)

    lane.start()
    task = lane.heavy(careful())
    assert stepped.wait(30)
    task.cancel()
    with pytest.raises(Cancelled):
        task.result(30)
    assert closed_on == ["mistudio-compute"]


def test_stopping_closes_what_is_left_and_refuses_what_comes_later() -> None:
    lane = ComputeLane()
    started, order = threading.Event(), []

    def endless() -> Generator[None, Signal, None]:
        try:
            while True:
                started.set()
                yield
        finally:
            order.append("closed")

    lane.start()
    tasks = [lane.heavy(endless()), lane.heavy(steps("waiting", 1, order))]
    assert started.wait(30)
    assert lane.stop()
    for task in tasks:
        with pytest.raises(Cancelled, match="The engine is stopping"):
            task.result(0)
    assert order == ["closed"]
    with pytest.raises(Cancelled):
        lane.run(lambda: None)


def test_the_io_lane_runs_several_tasks_at_once_and_no_more_than_its_threads() -> None:
    lane = IOLane(n_threads=3)
    together = threading.Barrier(3, timeout=30)
    names: set[str] = set()

    def meet() -> Generator[None, Signal, int]:
        names.add(threading.current_thread().name)
        yield
        return together.wait()

    tasks = [lane.submit(meet()) for _ in range(6)]
    assert sorted(finish(*tasks)) == [0, 0, 1, 1, 2, 2]
    assert names == {"mistudio-io-1", "mistudio-io-2", "mistudio-io-3"}
    assert lane.close()


def test_a_closing_io_lane_ends_its_tasks_after_their_step() -> None:
    lane = IOLane(n_threads=1)
    stepping, go_on = threading.Event(), threading.Event()

    def endless() -> Generator[None, Signal, None]:
        while True:
            stepping.set()
            assert go_on.wait(30)
            yield

    tasks = [lane.submit(endless()), lane.submit(endless())]
    assert stepping.wait(30)
    assert not lane.close(seconds=0)
    go_on.set()
    assert lane.close()
    for task in tasks:
        with pytest.raises(Cancelled):
            task.result(30)
    with pytest.raises(Cancelled):
        lane.submit(endless())
