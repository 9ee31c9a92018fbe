"""What the queue and the engine do when a library says that its device is lost, or its memory full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from mistudio_engine.api.errors import Cancelled, Internal, OutOfMemory
from mistudio_engine.api.events import Progress
from mistudio_engine.api.operations import OPERATIONS, Status
from mistudio_engine.api.records import Job
from mistudio_engine.runtime.engine import Engine, Registry
from mistudio_engine.runtime.faults import Faults
from mistudio_engine.runtime.jobs import MAX_LOST_DEVICES, Runner
from tests.runtime.counting import Count, Machine, Other, Puppet

SECONDS = 30.0
CUDA = "CUDA error: unspecified launch failure"


class Lost(RuntimeError):
    """As torch would say it."""


def in_our_words(error: BaseException, what: str) -> OutOfMemory | None:
    return OutOfMemory(f"{what} needs more.", fix="Lower it.") if isinstance(error, MemoryError) else None


FAULTS = Faults(lambda error: isinstance(error, Lost), in_our_words)


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, "count", Count)
    monkeypatch.setitem(OPERATIONS, "other", Other)


@pytest.fixture
def puppet() -> Puppet:
    """Runs on the compute thread, with checkpoints."""
    return Puppet()


@pytest.fixture
def beside() -> Puppet:
    """Runs beside it, without."""
    return Puppet()


@pytest.fixture
def boot(tmp_path: Path, puppet: Puppet, beside: Puppet) -> Iterator[Callable[..., Machine]]:
    """Starts machines that know the faults, each in its folder or on what another has on the disk."""
    machines: list[Machine] = []

    def boot(after: Machine | None = None) -> Machine:
        home = tmp_path / f"home-{len(machines)}"
        if after is not None:
            after.copy_as_after_a_kill(home)
        runners = {"count": Runner(puppet.run, "compute", "checkpoint"), "other": Runner(beside.run, "io", "start")}
        machine = Machine(home, runners)
        machine.jobs.faults = FAULTS
        machines.append(machine)
        return machine

    yield boot
    for each in (puppet, beside) * 20:
        each.finish()
    for machine in machines:
        machine.close()


def lose(machine: Machine, puppet: Puppet) -> list[str]:
    """Let the running job lose the device; the states of all jobs as the process would leave them."""
    left: Queue[tuple[str, list[str]]] = Queue()

    def on_lost(why: str) -> None:
        machine.lane.close()
        machine.store.after_commit(lambda: leave(why))

    def leave(why: str) -> None:
        machine.jobs.abandon(why)
        left.put((why, [job.state for job in machine.store.all(Job)]))

    machine.jobs.on_device_lost(on_lost)
    puppet.steps.put(Lost(f"{CUDA}\nand much advice"))
    why, states = left.get(timeout=SECONDS)
    assert why == CUDA
    return states


def test_what_a_library_lacks_ends_a_job_as_our_error(boot: Callable[..., Machine], puppet: Puppet) -> None:
    machine = boot()
    job = machine.jobs.submit(Count())
    puppet.steps.put(MemoryError())
    ended = machine.jobs.wait(job.slug, SECONDS)
    assert ended.state == "failed" and ended.error
    assert (ended.error.code, ended.error.what) == ("out_of_memory", f"{job.ref} needs more.")
    assert machine.jobs.control(job.slug, "retry").state == "queued"


def test_a_lost_device_interrupts_what_runs_and_nothing_is_begun(
    boot: Callable[..., Machine], puppet: Puppet, beside: Puppet
) -> None:
    machine = boot()
    downloading = machine.jobs.submit(Other())
    training = machine.jobs.submit(Count())
    for each in (puppet, beside):
        each.started.get(timeout=SECONDS)
    waiting = machine.jobs.submit(Count())
    puppet.step(Progress(fraction=0.1, checkpointed=True))
    puppet.signals.get(timeout=SECONDS)
    assert lose(machine, puppet) == ["interrupted", "interrupted", "queued"], "durable before the process may end"
    lost, innocent = machine.jobs.get(training.slug), machine.jobs.get(downloading.slug)
    assert CUDA in lost.message and "from its last checkpoint" in lost.message and lost.error is None
    assert "begins again" in innocent.message
    assert puppet.started.empty(), "the next one was not begun"
    with pytest.raises(Cancelled):
        machine.jobs.submit(Count())

    following = boot(after=machine)
    assert {job.slug for job in following.jobs.recover()} == {training.slug, downloading.slug}
    context = puppet.started.get(timeout=SECONDS)
    assert context.job.slug == training.slug and context.job.checkpoint
    assert following.jobs.get(waiting.slug).state == "queued"


def test_a_cancelled_job_that_loses_the_device_is_cancelled(boot: Callable[..., Machine], puppet: Puppet) -> None:
    machine = boot()
    job = machine.jobs.submit(Count())
    puppet.started.get(timeout=SECONDS)
    machine.jobs.control(job.slug, "cancel")
    assert lose(machine, puppet) == ["cancelled"]


def test_a_job_that_loses_the_device_each_time_is_left_alone(boot: Callable[..., Machine], puppet: Puppet) -> None:
    machine = boot()
    job = machine.jobs.submit(Count())
    for _ in range(MAX_LOST_DEVICES):
        puppet.started.get(timeout=SECONDS)
        lose(machine, puppet)
        machine = boot(after=machine)
        machine.jobs.recover()
    left = machine.jobs.get(job.slug)
    assert left.state == "interrupted"
    assert "3 times" in left.message and "Resume it" in left.message
    machine.jobs.control(job.slug, "resume")
    puppet.started.get(timeout=SECONDS)
    puppet.finish(1)
    assert machine.jobs.wait(job.slug, SECONDS).state == "completed"


def test_a_call_that_is_no_job_is_judged_alike(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def handle(_: object, engine: Engine) -> Any:
        if errors:
            engine.compute.run(lambda: _raise(errors.pop()))
        return engine.state

    def load(engine: Engine) -> None:
        engine.jobs.faults = FAULTS

    registry = Registry({Status: handle}, {}, {}, {Status}, load, lambda operation, _: operation, lambda *_: None)
    engine = Engine(tmp_path, registry)
    ended: list[str] = []
    engine.restart = lambda: ended.append(engine.state)
    engine.start()
    engine.wait_ready()
    assert str(engine.call(Status())) == "ready"
    errors.append(MemoryError())
    with pytest.raises(OutOfMemory, match="status needs more"):
        engine.call(Status())
    errors.append(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        engine.call(Status())
    assert not ended
    errors.append(Lost(CUDA))
    with pytest.raises(Internal, match=CUDA):
        engine.call(Status())
    assert ended == ["restarting"]
    with pytest.raises(Cancelled):
        engine.compute.run(lambda: None)
    engine.stop()


def _raise(error: Exception) -> None:
    raise error
