"""No job is lost and none runs twice, whatever is told to it and whenever the engine dies."""

from __future__ import annotations

import asyncio
import errno
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import counting
import pytest
from counting import Count, Counted, Machine, Other, Puppet, count_up

from mistudio_engine.api.errors import (
    BadInput,
    Cancelled,
    Conflict,
    DiskFull,
    Internal,
    NotFound,
    Unreachable,
    Unsupported,
)
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.base import OPERATIONS
from mistudio_engine.api.records import Job, JobState, ModelRecord, TrainingRecord
from mistudio_engine.runtime import attempt, jobs
from mistudio_engine.runtime.job_states import POSSIBLE, TRANSITIONS, Action, check_action
from mistudio_engine.runtime.jobs import Runner

SECONDS = 30
"""Bound of every wait; none is expected to take long."""


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, "count", Count)
    monkeypatch.setitem(OPERATIONS, "other", Other)


@pytest.fixture
def puppet() -> Puppet:
    return Puppet()


Boot = Callable[..., Machine]


@pytest.fixture
def boot(tmp_path: Path, puppet: Puppet) -> Iterator[Boot]:
    """Starts machines, each in `home-N`; with `after_a_kill_of`, on what that machine has on the disk."""
    machines: list[Machine] = []

    def boot(
        resumes: Any = "checkpoint",
        lane: Any = "compute",
        *,
        run: Any = None,
        after_a_kill_of: Machine | None = None,
        home: Path | None = None,
        **options: Any,
    ) -> Machine:
        home = home or tmp_path / f"home-{len(machines)}"
        if after_a_kill_of is not None:
            after_a_kill_of.copy_as_after_a_kill(home)
        runner = Runner(run or puppet.run, lane, resumes)
        machines.append(Machine(home, {"count": runner, "other": runner}, **options))
        return machines[-1]

    yield boot
    for _ in range(20):
        puppet.finish()
    for machine in machines:
        machine.close()


def running(machine: Machine, puppet: Puppet, **fields: Any) -> Job:
    """A job that is inside its first step."""
    job = machine.jobs.submit(Count(**fields))
    assert puppet.started.get(timeout=SECONDS).job.slug == job.slug
    return job


def states(machine: Machine, job: Job) -> list[str]:
    return machine.events(f"jobs/{job.slug}", *TRANSITIONS)


def test_a_job_runs_to_its_result_and_every_state_is_an_event(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = machine.jobs.submit(Count(n_units=3, wait_s=7), subject="training/stories", author="agent:x", priority=2)
    assert (job.slug, job.state, job.arguments) == ("count-0001", "queued", {"n_units": 3, "text": ""})
    context = puppet.started.get(timeout=SECONDS)
    assert context.folder == machine.home / "jobs" / job.slug and context.folder.is_dir()
    assert (context.attempt, context.job.state) == (1, "running")
    puppet.step(Progress(fraction=0.5, stage="counting", rate=10, unit="units"))
    puppet.finish(3)
    done = machine.jobs.wait(job.slug, SECONDS)
    assert (done.state, done.result, done.progress, done.stage) == ("completed", {"n_units": 3}, 1.0, "counting")
    assert done.started_at and done.finished_at and done.started_at <= done.finished_at
    machine.lane.run(lambda: None)  # the folder goes after the acknowledgement
    assert not context.folder.exists()
    assert states(machine, job) == ["queued", "running", "completed"]
    assert machine.events("trainings/stories") == ["queued", "running", "completed"]
    completed = machine.bus.after(0, ["trainings/stories"])[-1]
    assert completed.data["result"] == {"n_units": 3} and completed.data["job"] == job.slug


@pytest.mark.parametrize("lane", ["compute", "interactive", "io"])
def test_every_lane_runs_jobs_and_obeys(boot: Boot, puppet: Puppet, lane: str) -> None:
    machine = boot(lane=lane)
    job = running(machine, puppet)
    puppet.step()
    machine.jobs.control(job.slug, "stop")
    puppet.step()
    assert {puppet.signals.get(timeout=SECONDS) for _ in range(2)} >= {Signal.STOP}
    puppet.finish(1)
    assert machine.jobs.wait(job.slug, SECONDS).state == "completed"


def test_metrics_are_kept_without_a_gap_while_progress_is_thinned(boot: Boot) -> None:
    n_steps = 400

    def flood(operation: Count, context: Any) -> Any:
        for n in range(n_steps):
            loss = float("nan") if n == n_steps - 1 else 1 / (n + 1)
            yield Progress(fraction=n / n_steps, metrics={"n": n, "loss": loss})
        return Counted()

    machine = boot(run=flood)
    progress = []
    machine.bus.publish("x", "warm up", {})

    class Listener:
        """A subscription without a loop: counts what passes."""

        def _take(self, entries: Any) -> bool:
            progress.extend(entry.event for entry in entries if entry.event.event == "progress")
            return True

    machine.bus._subscriptions.add(Listener())  # type: ignore[arg-type]
    job = machine.jobs.submit(Count(), subject="training/t")
    done = machine.jobs.wait(job.slug, SECONDS)
    for channel in ("trainings/t", f"jobs/{job.slug}"):
        metrics = [event.data["metrics"] for event in machine.store.events_after(0, [channel], names=["metrics"])]
        assert [each["n"] for each in metrics] == list(range(n_steps))
        assert metrics[-1]["loss"] is None
    assert done.metrics == {"n": n_steps - 1, "loss": 1 / (n_steps - 1)}
    took = (done.finished_at or 0) - (done.started_at or 0)
    assert 1 <= len(progress) / 2 <= 4 * took + 3


def test_the_time_left_is_estimated_from_the_progress_of_this_attempt() -> None:
    pace = attempt.Pace(0.0)
    assert pace.eta_seconds(None, 5.0) is None
    assert pace.eta_seconds(0.5, 10.0) is None  # it resumed at one half: that was not done now
    assert pace.eta_seconds(0.6, 20.0) == pytest.approx(40.0)


def test_one_idempotency_key_starts_one_job_however_many_ask(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    call = Count(n_units=1, idempotency_key="k")
    with ThreadPoolExecutor(8) as pool:
        started = list(pool.map(lambda _: machine.jobs.submit(call), range(16)))
    assert {job.slug for job in started} == {"count-0001"}
    assert machine.jobs.with_key(Count(n_units=1, idempotency_key="k", wait_s=5)) == machine.jobs.get("count-0001")
    for other in (Count(n_units=2, idempotency_key="k"), Other(n_units=1, idempotency_key="k")):
        with pytest.raises(Conflict, match="'k' belongs to job/count-0001"):
            machine.jobs.submit(other)
    puppet.finish()
    machine.jobs.wait("count-0001", SECONDS)
    assert machine.jobs.submit(call).state == "completed"
    assert puppet.started.qsize() == 1
    assert machine.jobs.submit(Count()).slug == "count-0002"


def test_a_job_that_stands_in_the_queue_twice_runs_once(boot: Boot, puppet: Puppet) -> None:
    machine = boot(lane="io")
    job = running(machine, puppet)
    for state in ("running", "pausing"):
        if state == "pausing":
            machine.jobs.control(job.slug, "pause")
        again = machine.jobs._enqueue(machine.jobs.get(job.slug))
        assert again is not None and again.result(SECONDS) is None
        assert machine.jobs.get(job.slug).state == state
    puppet.finish()
    assert machine.jobs.wait(job.slug, SECONDS).state == "completed"
    again = machine.jobs._enqueue(job)
    assert again is not None and again.result(SECONDS) is None
    assert puppet.started.empty() and puppet.closed.qsize() == 1


def test_a_cancelled_waiting_job_never_runs(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    first = running(machine, puppet)
    second = machine.jobs.submit(Count())
    assert machine.jobs.control(second.slug, "cancel").state == "cancelled"
    puppet.finish()
    machine.jobs.wait(first.slug, SECONDS)
    machine.lane.run(lambda: None)
    assert puppet.started.empty()
    assert machine.jobs.get(second.slug).state == "cancelled"


def test_a_running_job_is_cancelled_after_its_present_step(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = running(machine, puppet)
    folder = machine.home / "jobs" / job.slug
    assert machine.jobs.control(job.slug, "cancel").state == "running"
    puppet.step()
    done = machine.jobs.wait(job.slug, SECONDS)
    assert (done.state, done.checkpoint) == ("cancelled", None)
    assert puppet.closed.get(timeout=SECONDS) == job.slug
    assert puppet.signals.empty(), "it did no further step"
    assert not folder.exists()
    assert machine.jobs.control(job.slug, "cancel").state == "cancelled"


def test_a_cancelled_job_that_fails_while_closing_is_cancelled_all_the_same(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = running(machine, puppet)
    machine.jobs.control(job.slug, "cancel")
    puppet.steps.put(ValueError("on the way out"))
    assert machine.jobs.wait(job.slug, SECONDS).state == "cancelled"


def test_pausing_waits_for_a_checkpoint_and_resuming_goes_on_from_it(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = running(machine, puppet)
    puppet.step()
    assert puppet.signals.get(timeout=SECONDS) is Signal.GO
    assert machine.jobs.control(job.slug, "pause").state == "pausing"
    puppet.step()  # a stage that cannot make a checkpoint yet
    puppet.step(Progress(fraction=0.5, checkpointed=True))
    paused = machine.jobs.wait(job.slug, SECONDS)
    assert (paused.state, paused.checkpoint, paused.attempt) == ("paused", f"jobs/{job.slug}", 1)
    assert puppet.signals.get(timeout=SECONDS) is Signal.CHECKPOINT
    assert puppet.closed.get(timeout=SECONDS) == job.slug
    (machine.home / "jobs" / job.slug / "state").write_text("half")
    assert machine.jobs.control(job.slug, "pause").state == "paused"

    assert machine.jobs.control(job.slug, "resume").state == "queued"
    context = puppet.started.get(timeout=SECONDS)
    assert (context.attempt, context.job.checkpoint) == (1, f"jobs/{job.slug}")
    assert (context.folder / "state").read_text() == "half"
    puppet.finish()
    assert machine.jobs.wait(job.slug, SECONDS).state == "completed"
    assert states(machine, job) == ["queued", "running", "pausing", "paused", "queued", "running", "completed"]


def test_a_paused_job_leaves_the_lane_to_the_next(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    first = running(machine, puppet)
    second = machine.jobs.submit(Count())
    machine.jobs.control(first.slug, "pause")
    puppet.step(Progress(checkpointed=True))
    assert machine.jobs.wait(first.slug, SECONDS).state == "paused"
    assert puppet.started.get(timeout=SECONDS).job.slug == second.slug


def test_a_job_that_begins_anew_pauses_at_once_and_finds_an_empty_folder(boot: Boot, puppet: Puppet) -> None:
    machine = boot(resumes="start")
    job = running(machine, puppet)
    (machine.home / "jobs" / job.slug / "half done").touch()
    machine.jobs.control(job.slug, "pause")
    puppet.step()
    assert machine.jobs.wait(job.slug, SECONDS).state == "paused"
    machine.jobs.control(job.slug, "resume")
    assert list(puppet.started.get(timeout=SECONDS).folder.iterdir()) == []


def test_a_job_that_makes_no_checkpoint_is_paused_when_patience_ends(
    boot: Boot, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "PAUSE_SECONDS", 0.0)
    machine = boot()
    job = running(machine, puppet)
    machine.jobs.control(job.slug, "pause")
    puppet.step()
    assert machine.jobs.wait(job.slug, SECONDS).state == "paused"


def test_resuming_before_the_pause_takes_it_back(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = running(machine, puppet)
    machine.jobs.control(job.slug, "pause")
    assert machine.jobs.control(job.slug, "resume").state == "running"
    puppet.step(Progress(checkpointed=True))
    assert puppet.signals.empty() or puppet.signals.get() is Signal.GO
    puppet.finish()
    assert machine.jobs.wait(job.slug, SECONDS).state == "completed"
    assert puppet.started.empty()


def test_a_job_that_cannot_go_on_cannot_be_paused(boot: Boot, puppet: Puppet) -> None:
    machine = boot(resumes="never")
    job = running(machine, puppet)
    with pytest.raises(Conflict, match=r"cannot be told to pause.*cannot go on later.*Possible now: cancel, stop"):
        machine.jobs.control(job.slug, "pause")


def test_what_the_state_forbids_is_a_conflict_that_says_what_is_possible(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = running(machine, puppet)
    with pytest.raises(
        Conflict, match=r"job/count-0001 is running and cannot be told to retry. Possible now: cancel, pause"
    ):
        machine.jobs.control(job.slug, "retry")
    with pytest.raises(NotFound):
        machine.jobs.control("nobody", "cancel")
    puppet.finish()
    machine.jobs.wait(job.slug, SECONDS)
    with pytest.raises(Conflict, match="Make the call again for a new job"):
        machine.jobs.control(job.slug, "cancel")


@pytest.mark.parametrize("state", TRANSITIONS)
def test_every_action_in_every_state_is_either_possible_or_a_conflict(state: Any) -> None:
    job = Job(slug="j", operation="count", state=state)
    leads_to = {"cancel": "cancelled", "pause": "paused", "resume": "queued", "retry": "queued"}
    for action in get_args(Action):
        if action in POSSIBLE[state]:
            assert check_action(job, action) is POSSIBLE[state][action]
            if POSSIBLE[state][action] and action in leads_to and state not in ("running", "pausing"):
                assert leads_to[action] in TRANSITIONS[state]
        else:
            with pytest.raises(Conflict):
                check_action(job, action)


def test_a_typed_error_fails_the_job_with_its_body(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = running(machine, puppet)
    puppet.steps.put(BadInput("k is 0.", fix="Use k=32.", next_call=("describe", {"ref": "sae/x"})))
    done = machine.jobs.wait(job.slug, SECONDS)
    assert done.state == "failed" and done.error is not None
    assert (done.error.code, done.error.fix, done.message) == ("bad_input", "Use k=32.", "k is 0. Use k=32.")
    assert machine.bus.after(0, [f"jobs/{job.slug}"])[-1].data["error"]["code"] == "bad_input"


def test_a_fault_of_ours_fails_the_job_only_and_its_trace_goes_to_the_log_only(
    boot: Boot, puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    machine = boot()
    job = running(machine, puppet)
    next_job = machine.jobs.submit(Count())
    puppet.steps.put(ValueError("the secret of the frame"))
    done = machine.jobs.wait(job.slug, SECONDS)
    assert done.error is not None and done.error.code == "internal" and "ValueError" in done.error.what
    assert "secret" not in done.model_dump_json()
    assert "the secret of the frame" in caplog.text
    assert puppet.started.get(timeout=SECONDS).job.slug == next_job.slug


def test_a_job_that_wants_to_end_the_process_ends_itself_only(boot: Boot) -> None:
    def leaves(operation: Count, context: Any) -> Any:
        yield Progress()
        sys.exit("goodbye")

    machine = boot(run=leaves)
    job = machine.jobs.submit(Count())
    done = machine.jobs.wait(job.slug, SECONDS)
    assert done.error is not None and "SystemExit" in done.error.what
    assert machine.lane.run(lambda: "alive") == "alive"


def test_a_retry_is_the_next_attempt_and_goes_on_from_the_checkpoint(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = running(machine, puppet)
    (machine.home / "jobs" / job.slug / "state").write_text("half")
    puppet.step(Progress(fraction=0.5, checkpointed=True))
    puppet.steps.put(BadInput("no"))
    machine.jobs.wait(job.slug, SECONDS)
    again = machine.jobs.control(job.slug, "retry")
    assert (again.slug, again.attempt, again.progress) == (job.slug, 2, 0.5)
    context = puppet.started.get(timeout=SECONDS)
    assert (context.attempt, (context.folder / "state").read_text()) == (2, "half")
    puppet.finish()
    done = machine.jobs.wait(job.slug, SECONDS)
    assert (done.state, done.error, done.message) == ("completed", None, "")


def test_what_was_settled_stays_with_the_job_until_it_is_retried(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    agreed = {"model": "m"}
    job = machine.jobs.submit(Count(), settled=agreed)
    assert puppet.started.get(timeout=SECONDS).job.settled == agreed
    machine.jobs.control(job.slug, "pause")
    puppet.step(Progress(checkpointed=True))
    assert machine.jobs.wait(job.slug, SECONDS).state == "paused"
    machine.jobs.control(job.slug, "resume")
    assert puppet.started.get(timeout=SECONDS).job.settled == agreed
    puppet.steps.put(BadInput("no", fix="Yes."))
    assert machine.jobs.wait(job.slug, SECONDS).state == "failed"
    machine.jobs.control(job.slug, "retry")
    assert puppet.started.get(timeout=SECONDS).job.settled == {}, "it is the same call again"
    machine.jobs.settle(job.slug, {"model": "n"})
    puppet.finish()
    assert machine.jobs.wait(job.slug, SECONDS).settled == {"model": "n"}


def test_a_retry_of_a_cancelled_job_begins_anew(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = running(machine, puppet)
    (machine.home / "jobs" / job.slug / "state").write_text("half")
    puppet.step(Progress(fraction=0.5, checkpointed=True, metrics={"loss": 1}))
    assert puppet.signals.get(timeout=SECONDS)
    machine.jobs.control(job.slug, "cancel")
    puppet.step()
    machine.jobs.wait(job.slug, SECONDS)
    again = machine.jobs.control(job.slug, "retry")
    assert (again.attempt, again.progress, again.metrics) == (2, None, {})
    assert list(puppet.started.get(timeout=SECONDS).folder.iterdir()) == []


def test_a_passing_fault_is_tried_again_three_times(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = running(machine, puppet)
    for attempt_number in (2, 3, 4):
        puppet.steps.put(Unreachable("The hub does not answer."))
        assert puppet.started.get(timeout=SECONDS).attempt == attempt_number
    puppet.steps.put(Unreachable("The hub does not answer."))
    done = machine.jobs.wait(job.slug, SECONDS)
    assert (done.state, done.attempt, done.message) == ("failed", 4, "The hub does not answer.")
    machine.jobs.control(job.slug, "retry")
    assert puppet.started.get(timeout=SECONDS).attempt == 5
    puppet.steps.put(Unreachable("Still not."))  # the count began anew
    assert puppet.started.get(timeout=SECONDS).attempt == 6


def test_a_job_that_waits_to_be_tried_again_can_be_cancelled(boot: Boot, puppet: Puppet) -> None:
    machine = boot(backoff_seconds=(3600.0,))
    job = running(machine, puppet)
    puppet.steps.put(Unreachable("The hub does not answer."))
    assert puppet.closed.get(timeout=SECONDS)
    machine.lane.run(lambda: None)
    waiting = machine.jobs.get(job.slug)
    assert (waiting.state, waiting.message) == ("queued", "The hub does not answer. It is tried again in 3600 s.")
    assert machine.jobs.control(job.slug, "cancel").state == "cancelled"


@pytest.mark.parametrize(
    "error", [DiskFull.of("A checkpoint", 5 << 30, 1 << 30), OSError(errno.ENOSPC, "No space left")]
)
def test_a_full_disk_pauses_the_job_until_there_is_space(boot: Boot, puppet: Puppet, error: Exception) -> None:
    machine = boot()
    job = running(machine, puppet)
    puppet.steps.put(error)
    paused = machine.jobs.wait(job.slug, SECONDS)
    needs = "needs 5.0 GiB of disk and 1.0 GiB is free" if isinstance(error, DiskFull) else "needs more than the"
    assert paused.state == "paused" and needs in paused.message and "resume it" in paused.message
    machine.jobs.control(job.slug, "resume")
    puppet.finish()
    done = machine.jobs.wait(job.slug, SECONDS)
    assert (done.state, done.attempt, done.error) == ("completed", 1, None)


def test_a_job_and_the_records_of_its_caller_are_written_together(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    with pytest.raises(ZeroDivisionError), machine.store.transaction():
        machine.store.insert(ModelRecord(slug="m", source="x"))
        machine.jobs.submit(Count())
        raise ZeroDivisionError
    assert machine.jobs.active() == []
    with machine.store.transaction():
        job = machine.jobs.submit(Count())
        machine.store.insert(ModelRecord(slug="m", source="x"))
        assert puppet.started.empty()
    assert puppet.started.get(timeout=SECONDS).job.slug == job.slug == "count-0001"


def test_whoever_listens_for_changes_writes_in_the_same_transaction(
    boot: Boot, puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    machine = boot()
    machine.store.insert(TrainingRecord(slug="t", model="m", tokens="k", hook_name="h", architecture="topk"))

    def follow(job: Job) -> None:
        machine.store.update(TrainingRecord, "t", status=job.state)
        if job.state == "completed":
            raise LookupError("a fault of the listener")

    machine.jobs.on_change(follow)
    job = running(machine, puppet)
    assert machine.store.get(TrainingRecord, "t").status == "running"
    puppet.finish()
    assert machine.jobs.wait(job.slug, SECONDS).state == "completed"
    assert machine.store.get(TrainingRecord, "t").status == "completed"
    assert "a fault of the listener" in caplog.text


def test_waiting_ends_with_the_job_for_many_at_once_and_without_threads(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    job = running(machine, puppet)

    async def wait_together() -> list[Job]:
        waits = [asyncio.create_task(machine.jobs.wait_async(job.slug, SECONDS)) for _ in range(100)]
        await asyncio.sleep(0)
        n_threads = threading.active_count()
        early = await machine.jobs.wait_async(job.slug, 0.0)
        assert early.state == "running"
        puppet.finish()
        done = await asyncio.gather(*waits)
        assert threading.active_count() <= n_threads
        return done

    assert {done.state for done in asyncio.run(wait_together())} == {"completed"}
    assert machine.jobs.wait(job.slug, SECONDS).state == "completed"
    assert machine.jobs.wait(job.slug, 0).state == "completed"
    with pytest.raises(NotFound):
        machine.jobs.wait("nobody", 1)
    assert machine.jobs._book._waiting == {}


def test_the_compute_thread_neither_submits_nor_waits(boot: Boot) -> None:
    machine = boot()
    for act in (
        lambda: machine.jobs.submit(Count()),
        lambda: machine.jobs.wait("x", 1),
        lambda: machine.jobs.control("x", "cancel"),
        lambda: machine.jobs.shutdown(),
    ):
        with pytest.raises(RuntimeError, match="cannot submit work to itself"):
            machine.lane.run(act)
    assert machine.jobs.active() == []


def test_running_and_waiting_jobs_are_listed_and_counted(boot: Boot, puppet: Puppet) -> None:
    machine = boot()
    first = running(machine, puppet)
    second = machine.jobs.submit(Count())
    assert [job.slug for job in machine.jobs.active()] == [first.slug, second.slug]
    assert machine.jobs.counts() == {"running": 1, "queued": 1}


def test_an_operation_that_nothing_carries_out_is_a_fault_of_ours(boot: Boot) -> None:
    machine = boot()

    class Unheard(Count):
        tool = "unheard"

    with pytest.raises(Internal, match="Nothing here carries out 'unheard'"):
        machine.jobs.submit(Unheard())


def test_a_hundred_cancelled_jobs_leave_nothing_behind(boot: Boot) -> None:
    class Big:
        """Stands for a tensor in the frame of a job."""

    alive: list[weakref.ref[Big]] = []
    begun = threading.Semaphore(0)

    def endless(operation: Count, context: Any) -> Any:
        big = Big()
        alive.append(weakref.ref(big))
        begun.release()
        while True:
            yield Progress()
            if operation.text == "fails":
                raise ValueError("its traceback leads to the frame")

    machine = boot(run=endless)
    for n in range(100):
        job = machine.jobs.submit(Count(text="fails" if n % 10 == 0 else ""))
        assert begun.acquire(timeout=SECONDS)
        if n % 10:
            machine.jobs.control(job.slug, "cancel")
        machine.jobs.wait(job.slug, SECONDS)
    machine.lane.run(lambda: None)
    gc.collect()
    assert len(alive) == 100 and not any(ref() for ref in alive)
    assert machine.jobs._live == {} and not list((machine.home / "jobs").glob("count-*2"))


# The engine dies


def test_a_killed_engine_s_job_goes_on_by_itself_from_its_checkpoint(boot: Boot, puppet: Puppet) -> None:
    first = boot()
    job = running(first, puppet)
    (first.home / "jobs" / job.slug / "state").write_text("half")
    puppet.step(Progress(fraction=0.5, checkpointed=True))
    assert puppet.signals.get(timeout=SECONDS)
    second = boot(after_a_kill_of=first)
    (found,) = second.jobs.recover()
    assert (found.slug, found.state, found.attempt) == (job.slug, "queued", 1)
    context = puppet.started.get(timeout=SECONDS)
    assert context.job.checkpoint and (context.folder / "state").read_text() == "half"
    assert states(second, job) == ["queued", "running", "interrupted", "queued", "running"]


def test_a_killed_engine_s_job_begins_anew_or_says_what_to_do(boot: Boot, puppet: Puppet) -> None:
    anew = boot(resumes="start")
    job = running(anew, puppet)
    (anew.home / "jobs" / job.slug / "half done").touch()
    second = boot(resumes="start", after_a_kill_of=anew)
    second.jobs.recover()
    assert list(puppet.started.get(timeout=SECONDS).folder.iterdir()) == []

    never = boot(resumes="never")
    job = running(never, puppet)
    fourth = boot(resumes="never", after_a_kill_of=never)
    (found,) = fourth.jobs.recover()
    assert found.state == "interrupted"
    assert found.message == "The engine was killed. This kind of job cannot go on by itself: retry it, or cancel it."
    assert fourth.jobs.control(job.slug, "retry").attempt == 2
    assert puppet.started.get(timeout=SECONDS).attempt == 2


def test_waiting_jobs_wait_on_and_paused_ones_stay_paused(boot: Boot, puppet: Puppet) -> None:
    first = boot()
    paused, waiting = running(first, puppet), first.jobs.submit(Count())
    first.jobs.control(paused.slug, "pause")
    puppet.step(Progress(checkpointed=True))
    first.jobs.wait(paused.slug, SECONDS)
    assert puppet.started.get(timeout=SECONDS).job.slug == waiting.slug
    third = first.jobs.submit(Count())
    second = boot(after_a_kill_of=first)
    assert [job.slug for job in second.jobs.recover()] == [waiting.slug]
    assert puppet.started.get(timeout=SECONDS).job.slug == waiting.slug
    assert second.jobs.get(paused.slug).state == "paused"
    assert second.jobs.get(third.slug).state == "queued"


def test_what_a_job_was_told_before_the_kill_still_counts(boot: Boot, puppet: Puppet) -> None:
    for action, state in [("cancel", "cancelled"), ("pause", "paused"), ("stop", "queued")]:
        first, later = boot(), Puppet()
        job = running(first, puppet)
        first.jobs.control(job.slug, action)
        second = boot(run=later.run, after_a_kill_of=first)
        (found,) = second.jobs.recover()
        assert found.state == state, action
        if action == "stop":
            later.step()
            assert later.signals.get(timeout=SECONDS) is Signal.STOP
            later.finish(1)
            assert second.jobs.wait(job.slug, SECONDS).result == {"n_units": 1}
        else:
            second.lane.run(lambda: None)
            assert later.started.empty()


def test_a_job_that_kills_the_engine_again_and_again_is_left_alone(
    boot: Boot, puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_CRASHES", 2)
    machine = boot()
    job = running(machine, puppet)
    machine = boot(after_a_kill_of=machine)
    assert machine.jobs.recover()[0].state == "queued"
    assert puppet.started.get(timeout=SECONDS)
    for _ in range(2):
        machine = boot(after_a_kill_of=machine)
        (found,) = machine.jobs.recover()
        assert found.state == "interrupted" and "killed 2 times under this job" in found.message
    machine.jobs.control(job.slug, "resume")
    assert puppet.started.get(timeout=SECONDS)
    machine = boot(after_a_kill_of=machine)
    assert machine.jobs.recover()[0].state == "queued", "an order of a person begins the count anew"


def test_a_job_of_another_version_fails_with_its_reason(boot: Boot, puppet: Puppet) -> None:
    first = boot()
    running(first, puppet)
    for _ in range(3):
        first.jobs.submit(Count())
    first.jobs.control("count-0004", "pause")
    first.store.update(Job, "count-0001", operation="forgotten")
    first.store.update(Job, "count-0002", operation="forgotten")
    first.store.update(Job, "count-0003", arguments={"n_tokens": 3})
    first.store.update(Job, "count-0004", operation="forgotten")
    second = boot(after_a_kill_of=first)
    second.jobs.recover()
    for slug in ("count-0001", "count-0002", "count-0003"):
        done = second.jobs.wait(slug, SECONDS)
        assert done.state == "failed" and done.error is not None and done.error.code == "unsupported"
    with pytest.raises(Unsupported, match="Nothing here carries out 'forgotten'"):
        second.jobs.control("count-0004", "resume")
    assert second.jobs.get("count-0004").state == "paused"


def test_folders_of_jobs_that_are_over_are_swept_at_the_start(boot: Boot, puppet: Puppet) -> None:
    first = boot()
    job = running(first, puppet)
    puppet.steps.put(BadInput("no"))
    first.jobs.wait(job.slug, SECONDS)
    done = running(first, puppet)
    puppet.finish()
    first.jobs.wait(done.slug, SECONDS)
    for slug in (done.slug, "of-nobody"):
        (first.home / "jobs" / slug).mkdir(exist_ok=True)
    second = boot(after_a_kill_of=first)
    second.jobs.recover()
    assert [folder.name for folder in (second.home / "jobs").iterdir()] == [job.slug]


def test_a_shutdown_takes_a_checkpoint_and_the_next_engine_goes_on(boot: Boot, puppet: Puppet) -> None:
    first = boot()
    job, waiting = running(first, puppet), first.jobs.submit(Count())
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(first.close)
        while puppet.signals.empty() or puppet.signals.get() is Signal.GO:
            puppet.step()
        puppet.step(Progress(checkpointed=True))
        stopping.result(SECONDS)
    while not puppet.steps.empty():
        puppet.steps.get()
    second = boot(home=first.home)
    assert second.jobs.get(job.slug).state == "interrupted"
    assert "goes on from its last checkpoint when the engine starts again" in second.jobs.get(job.slug).message
    assert second.jobs.get(waiting.slug).state == "queued"
    second.jobs.recover()
    assert puppet.started.get(timeout=SECONDS).job.checkpoint is not None
    puppet.finish()
    assert second.jobs.wait(job.slug, SECONDS).state == "completed"
    assert puppet.started.get(timeout=SECONDS).job.slug == waiting.slug


def test_a_shutdown_does_not_wait_for_a_step_without_end(boot: Boot, puppet: Puppet) -> None:
    first = boot()
    job = running(first, puppet)
    first.jobs.shutdown(seconds=0.1)
    left = first.jobs.get(job.slug)
    assert left.state == "interrupted" and "in the middle of a step" in left.message
    with pytest.raises(Cancelled, match="The engine is stopping"):
        first.jobs.submit(Count())
    puppet.finish()
    first.lane.run(lambda: None)
    assert first.jobs.get(job.slug).state == "interrupted", "what ends too late changes nothing"


def test_closing_the_lane_under_a_job_interrupts_it(boot: Boot, puppet: Puppet) -> None:
    machine = boot(run=lambda operation, context: iter_forever())
    job = machine.jobs.submit(Count())
    assert machine.lane.run(lambda: True)
    assert machine.lane.run(lambda: True)
    assert machine.lane.stop()
    assert machine.jobs.get(job.slug).state == JobState.INTERRUPTED


def iter_forever() -> Any:
    while True:
        yield Progress()


def start_child(home: Path, n_units: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, counting.__file__, str(home), str(n_units)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def do_units(child: subprocess.Popen[str], n_units: int) -> list[int]:
    """Lets the child do so many units; the numbers that it says."""
    assert child.stdin and child.stdout
    child.stdin.write("\n" * n_units)
    child.stdin.flush()
    return [int(child.stdout.readline().removeprefix("unit ")) for _ in range(n_units)]


def test_kill_9_repeats_less_than_one_checkpoint_interval_and_loses_nothing(tmp_path: Path) -> None:
    n_units = 40
    with start_child(tmp_path, n_units) as child:
        assert do_units(child, 17) == list(range(1, 18))
        child.kill()
    with start_child(tmp_path, n_units) as child:
        assert do_units(child, 16) == list(range(11, 27)), "it goes on from the checkpoint at 10, by itself"
        child.kill()
    with start_child(tmp_path, n_units) as child:
        assert do_units(child, 20) == list(range(21, 41))
        assert child.stdout and child.stdout.readline() == 'completed {"n_units": 40}\n'
        assert child.wait(SECONDS) == 0
    machine = Machine(tmp_path, {"count": Runner(count_up(lambda: None))})
    (job,) = machine.store.all(Job)
    units = [
        int(event.data["metrics"]["unit"])
        for event in machine.store.events_after(0, ["trainings/t"], names=["metrics"])
    ]
    assert units == [*range(1, 18), *range(11, 27), *range(21, 41)], "no number that was said is missing from the log"
    assert (job.state, job.attempt) == ("completed", 1)
    assert not (tmp_path / "jobs" / job.slug).exists()
    machine.close()
