"""The job queue: takes operations that take long, runs each exactly as often as it should, and lets people steer them.

A job is its record, so what a call has answered is durable, and a new engine carries on where a killed one stopped. The
work is a generator that a lane steps (`attempt.py`). It does not know what any operation does: a table of runners says.

One lock decides every race, the store's: states are compared and set within transactions, and an order reaches an
attempt within the transaction that writes it down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from mistudio_engine.api.errors import Cancelled, Internal, Unsupported
from mistudio_engine.api.operations.base import JobOperation
from mistudio_engine.api.records import Job, JobState, Plan
from mistudio_engine.runtime.attempt import Attempt, Ending, JobContext, Order, Runner, interruption
from mistudio_engine.runtime.bus import Bus
from mistudio_engine.runtime.compute import ComputeLane
from mistudio_engine.runtime.faults import Faults
from mistudio_engine.runtime.io_lane import IOLane
from mistudio_engine.runtime.job_book import JobBook, arguments_of
from mistudio_engine.runtime.job_states import ACTIVE_STATES, check_action
from mistudio_engine.runtime.store import Store
from mistudio_engine.runtime.task import Task

__all__ = ["JobContext", "Jobs", "Runner"]

log = logging.getLogger("mistudio.jobs")

BACKOFF_SECONDS = (1.0, 5.0, 25.0)
"""Waits before the first, second and third repetition after a passing fault."""

MAX_CRASHES = 10
"""A job under which the engine died this often without a checkpoint in between is not started again by itself: it may
be what kills the engine."""

MAX_LOST_DEVICES = 3
"""The same for a job whose own step lost the device: that is nearly always the same fault again."""

LEAVE_SECONDS = 1.0
"""Of the time that a shutdown has, what is kept for closing jobs that make no checkpoint."""


class Jobs:
    """The queue of one engine.

    Args:
        home: the data directory; each job has `home/jobs/<slug>` to work in.
        runners: by the name of the operation; may be filled until `recover` is called.
        backoff_seconds: waits before repetitions after passing faults; an offline engine passes ().
    """

    def __init__(
        self,
        store: Store,
        bus: Bus,
        compute: ComputeLane,
        home: Path,
        runners: Mapping[str, Runner],
        *,
        backoff_seconds: Sequence[float] = BACKOFF_SECONDS,
    ) -> None:
        self._store = store
        self._bus = bus
        self._compute = compute
        self._folder = Path(home) / "jobs"
        self._runners = runners
        self._backoff_seconds = backoff_seconds
        self._book = JobBook(store, bus)
        self._io = IOLane()
        self._live: dict[str, Attempt] = {}  # guarded by the store's transaction
        self._n_faults: dict[str, int] = {}
        self._timers: set[threading.Timer] = set()
        self._all_ended = threading.Event()
        self._closing = False
        self._device_lost: Callable[[str], object] = self.abandon
        self.faults = Faults()
        """How errors of libraries are to be taken (see `attempt.Host`); set by who knows them."""

    def on_device_lost(self, callback: Callable[[str], object]) -> None:
        """Calls `callback` with the reason, on the thread it happened on, when a job has lost the device.

        It is called within the transaction that writes the job's end, before anybody can read of it.
        """
        self._device_lost = callback

    def on_change(self, callback: Callable[[Job], None]) -> None:
        """Calls `callback` with the job at each change of state, within the transaction of that change.

        What it writes to the store is as durable as the change itself. It must be quick and must not control jobs;
        what it raises is logged and changes nothing.
        """
        self._book.on_change(callback)

    # Starting

    def with_key(self, operation: JobOperation[Any]) -> Job | None:
        """The job that was started with the operation's idempotency key, or None; Conflict if that was another call."""
        return self._book.with_key(operation)

    def submit(
        self,
        op: JobOperation[Any],
        *,
        plan: Plan | None = None,
        settled: Mapping[str, Any] | None = None,
        subject: str | None = None,
        author: str = "person",
        priority: int = 0,
    ) -> Job:
        """Queues an operation; it is durable when this returns. A known idempotency key gives the job that it started.

        Within a `store.transaction()` the job and the caller's own records are written together, and it starts only
        after the commit. Raises Conflict when the key belongs to another call; RuntimeError on the compute thread.
        """
        self._compute.require_elsewhere()
        if self._closing:
            raise Cancelled("The engine is stopping.", fix="Connect again, which starts it, and repeat the call.")
        runner = self._runners.get(op.tool)
        if runner is None:
            raise Internal(f"Nothing here carries out {op.tool!r}.")
        with self._store.transaction():
            if existing := self._book.with_key(op):
                return existing
            job = self._book.open(
                Job(
                    slug=self._store.numbered_slug(Job, op.tool.replace("_", "-")),
                    operation=op.tool,
                    arguments=arguments_of(op),
                    lane=runner.lane,
                    resumes=runner.resumes,
                    priority=priority,
                    subject=subject,
                    author=author,
                    idempotency_key=op.idempotency_key,
                    plan=plan,
                    settled=dict(settled or {}),
                )
            )
            self._store.after_commit(lambda: self._enqueue(job))
        return job

    def _enqueue(self, job: Job) -> Task[None] | None:
        """Hands a queued job to its lane. Twice is harmless: of two attempts the first takes the job up."""
        if self._closing:
            return None  # it stays queued, for the next engine
        runner = self._runners[job.operation]
        attempt = Attempt(self, self._book, job.slug, runner, self._folder / job.slug, self._bus.publish)
        steps = attempt.steps()
        if runner.lane == "compute":
            task = self._compute.heavy(steps, priority=job.priority, name=job.slug)
        elif runner.lane == "interactive":
            task = self._compute.interactive(steps, name=job.slug)
        else:
            task = self._io.submit(steps, priority=job.priority, name=job.slug)
        task.future.add_done_callback(_log_fault)
        return task

    @property
    def closing(self) -> bool:
        """Is the queue shutting down? (See `attempt.Host`.)"""
        return self._closing

    def begin(self, attempt: Attempt) -> None:
        """An attempt takes up its job (see `attempt.Host`)."""
        self._store.after_commit(lambda: self._live.update({attempt.slug: attempt}))

    def end(self, attempt: Attempt, ending: Ending) -> None:
        """An attempt lays its job down (see `attempt.Host`)."""
        slug, seconds = attempt.slug, ending.again_after_seconds
        if self._live.get(slug) is attempt:
            del self._live[slug]
        if seconds is None:
            self._n_faults.pop(slug, None)
        else:
            self._n_faults[slug] = self._n_faults.get(slug, 0) + 1
            self._store.after_commit(lambda: self._enqueue_later(slug, seconds))
        if self._closing and not self._live:
            self._store.after_commit(self._all_ended.set)
        if (why := ending.device_lost) is not None:
            self._book.note(self.get(slug), "device_lost", {"why": why})
            self._device_lost(why)

    def patience_seconds(self, slug: str) -> float | None:
        """How long to wait before a job that met a passing fault is tried again (see `attempt.Host`)."""
        n_faults = self._n_faults.get(slug, 0)
        return self._backoff_seconds[n_faults] if n_faults < len(self._backoff_seconds) else None

    def _enqueue_later(self, slug: str, seconds: float) -> None:
        def enqueue() -> None:
            self._timers.discard(timer)
            if not self._closing:
                self._enqueue(self.get(slug))

        timer = threading.Timer(seconds, enqueue)
        timer.daemon = True
        self._timers.add(timer)
        timer.start()

    # Looking

    def get(self, slug: str) -> Job:
        """The job as it stands; raises NotFound."""
        return self._store.get(Job, slug)

    def active(self) -> list[Job]:
        """The jobs that wait or run, oldest first."""
        return self._store.all(Job, state=ACTIVE_STATES)

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        return self._store.count_by(Job, "state")

    def wait(self, slug: str, seconds: float) -> Job:
        """The job once it rests (ended, paused or interrupted), or as it stands after `seconds`."""
        self._compute.require_elsewhere()
        rests = threading.Event()
        with self._book.waiting(slug, rests.set):
            if self.get(slug).state in ACTIVE_STATES:
                rests.wait(seconds)
        return self.get(slug)

    async def wait_async(self, slug: str, seconds: float) -> Job:
        """`wait` for an asyncio loop; holds no thread."""
        loop, rests = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed while it waited
                loop.call_soon_threadsafe(rests.set)

        with self._book.waiting(slug, wake):
            if self.get(slug).state in ACTIVE_STATES:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await rests.wait()
        return self.get(slug)

    # Steering

    def control(self, slug: str, action: str) -> Job:
        """Tells a job to cancel, pause, resume, stop (end early and keep what is usable) or retry.

        What is answered is durable. A running job obeys after its present step: pausing waits for a checkpoint, at
        most 5 s. Resuming goes on with the same attempt; retrying begins attempt + 1 of the same job, from its last
        checkpoint if it still has one (a cancelled one has none). A retry is the same call again: what its arguments
        leave open is settled anew, so that a corrected setting counts. Asking for what is so already changes nothing.
        Raises NotFound, and Conflict when the state forbids the action; RuntimeError on the compute thread.
        """
        self._compute.require_elsewhere()
        with self._store.transaction():
            job = self.get(slug)
            if not check_action(job, action):
                return job
            steer = {
                "cancel": self._cancel,
                "pause": self._pause,
                "resume": self._resume,
                "stop": self._stop,
                "retry": self._retry,
            }[action]
            steer(job)
            return self.get(slug)

    def _cancel(self, job: Job) -> None:
        attempt = self._live.get(job.slug)
        if attempt is not None:
            self._book.ask(job, "cancel")
            attempt.command(Order.CANCEL)
            return
        self._book.move(job.slug, JobState.CANCELLED, finished_at=time.time(), message="", checkpoint=None)
        self._store.after_commit(lambda: shutil.rmtree(self._folder / job.slug, ignore_errors=True))

    def _pause(self, job: Job) -> None:
        attempt = self._live.get(job.slug)
        if attempt is None:
            self._book.move(job.slug, JobState.PAUSED, message="")
        else:
            self._book.move(job.slug, JobState.PAUSING)
            attempt.command(Order.PAUSE)

    def _stop(self, job: Job) -> None:
        self._book.ask(job, "stop")
        if attempt := self._live.get(job.slug):
            attempt.command(Order.STOP)

    def _resume(self, job: Job) -> None:
        self._book.note(job, "resumed")
        attempt = self._live.get(job.slug)
        if attempt is not None:  # it has not paused yet
            self._book.move(job.slug, JobState.RUNNING)
            attempt.command(Order.GO)
        else:
            self._requeue(job, message="")

    def _retry(self, job: Job) -> None:
        self._book.note(job, "resumed")
        fresh: dict[str, Any] = {"attempt": job.attempt + 1, "settled": {}}
        fresh |= {"result": None, "finished_at": None, "started_at": None}
        if job.checkpoint is None:
            fresh |= {"progress": None, "stage": "", "rate": None, "metrics": {}}
        self._requeue(job, message="", **fresh)

    def _requeue(self, job: Job, **changes: Any) -> None:
        if job.operation not in self._runners:
            raise Unsupported(
                f"{job.ref} was started by another version of miStudio.",
                why=f"Nothing here carries out {job.operation!r}.",
                fix="Make the call again for a new job.",
            )
        queued = job if job.state == JobState.QUEUED else self._book.move(job.slug, JobState.QUEUED, **changes)
        if queued is not None:
            self._store.after_commit(lambda: self._enqueue(queued))

    def settle(self, slug: str, what: Mapping[str, Any]) -> None:
        """Writes down what a retried job settled when it began: its later attempts keep to it (see `Job.settled`)."""
        self._store.update(Job, slug, settled=dict(what))

    # The engine's start and end

    def recover(self) -> list[Job]:
        """Takes over what an earlier engine left, once, at the start; returns the interrupted jobs as it left them.

        A job that was running is queued again when it can go on or begin anew, unless the engine died under it too
        often. What it had been told, cancel, pause or stop, still counts. Waiting jobs wait on, paused ones stay.
        """
        self._sweep()
        found: list[Job] = []
        for left in self._store.all(Job, state=[*ACTIVE_STATES, JobState.INTERRUPTED]):
            with self._store.transaction():
                job = self.get(left.slug)
                if job.slug in self._live or job.state != left.state:
                    continue  # submitted to this engine just now
                try:
                    if job.state == JobState.QUEUED:
                        self._requeue(job)
                        continue
                    self._take_over(job)
                except Unsupported as error:
                    self._book.move(job.slug, JobState.FAILED, error=error.body, message=str(error))
                found.append(self.get(job.slug))
        return found

    def _take_over(self, job: Job) -> None:
        """A job that an earlier engine was running or had interrupted."""
        if self._book.asked(job.slug) == "cancel":
            self._cancel(job)
            return
        if job.state != JobState.INTERRUPTED:  # that engine had no time to say so
            self._book.note(job, "crashed")
            message = interruption("The engine was killed.", job.resumes)
            self._book.move(job.slug, JobState.INTERRUPTED, message=message, eta_seconds=None)
        if job.state == JobState.PAUSING:
            self._book.move(job.slug, JobState.PAUSED, message="The engine was killed while the job paused. Resume it.")
        elif job.resumes == "never":
            return
        elif (crashes := self._book.crashes(job.slug)).count("device_lost") >= MAX_LOST_DEVICES:
            message = f"It lost the device {MAX_LOST_DEVICES} times at this point. Resume it, or cancel it."
            self._store.update(Job, job.slug, message=message)
        elif len(crashes) >= MAX_CRASHES:
            message = f"The engine was killed {MAX_CRASHES} times under this job, maybe by it. Resume it, or cancel it."
            self._store.update(Job, job.slug, message=message)
        else:
            self._requeue(job, message="It goes on after an interruption.")

    def _sweep(self) -> None:
        """Removes the folders of jobs that have ended well or are gone: a kill can come before that."""
        for folder in list(self._folder.iterdir()) if self._folder.is_dir() else ():
            over = (JobState.COMPLETED, JobState.CANCELLED)
            if not self._store.exists(Job, folder.name) or self.get(folder.name).state in over:
                shutil.rmtree(folder, ignore_errors=True)

    def shutdown(self, seconds: float = 10.0) -> None:
        """Interrupts the running jobs, each with a checkpoint if it makes one in time, and returns within `seconds`.

        They go on when the next engine calls `recover`; waiting jobs stay queued.
        """
        self._compute.require_elsewhere()
        ends_at = time.monotonic() + seconds
        with self._store.transaction():
            self._closing = True
            for attempt in self._live.values():
                attempt.command(Order.INTERRUPT, max(0.0, seconds - LEAVE_SECONDS))
            if not self._live:
                self._all_ended.set()
        for timer in list(self._timers):
            timer.cancel()
        self._all_ended.wait(seconds)
        for slug in self._leave("The engine stopped in the middle of a step."):
            log.warning("job/%s did not end its step in time", slug)
        self._io.close(max(0.0, ends_at - time.monotonic()))

    def abandon(self, why: str) -> None:
        """Interrupts the running jobs as they are, from any thread: none may make another step, say on a lost device.

        It waits for nobody. They go on when the next engine calls `recover`; waiting jobs stay queued.
        """
        for timer in list(self._timers):
            timer.cancel()
        self._leave(f"The engine ended because its device was lost ({why}).")

    def _leave(self, what: str) -> list[str]:
        """Writes down that the running jobs are interrupted, whatever they are inside of; their slugs."""
        with self._store.transaction():
            self._closing = True
            left = list(self._live.items())
            for slug, attempt in left:
                message = interruption(what, attempt.resumes)
                self._book.move(slug, JobState.INTERRUPTED, message=message, eta_seconds=None)
            self._live.clear()
            self._all_ended.set()
        return [slug for slug, _ in left]


def _log_fault(future: Future[Any]) -> None:
    """An attempt handles its job's faults; what still comes out is ours, such as a disk too full for the record."""
    error = future.exception()
    if error is not None and not isinstance(error, Cancelled):
        log.critical("a job could not be brought to its end; the next start takes it up again", exc_info=error)
