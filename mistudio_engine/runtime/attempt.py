"""One attempt of a job: from the moment a lane takes it up until it rests again, whatever ends it.

It steps the job's generator, obeys the orders that reach it between two steps, writes down how far it is and how it
ended. It does not know the queue, nor which thread steps it.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel

from mistudio_engine.api.errors import DiskFull, Internal, MistudioError, Unreachable
from mistudio_engine.api.events import Event, Progress, Signal
from mistudio_engine.api.records import Job, JobState
from mistudio_engine.runtime.faults import Faults, first_line
from mistudio_engine.runtime.files import disk_full, is_disk_full
from mistudio_engine.runtime.job_book import JobBook, rebuilt

__all__ = ["Attempt", "Ending", "Host", "JobContext", "Order", "Runner", "interruption"]

log = logging.getLogger("mistudio.jobs")

NOTE_SECONDS = 0.25
"""At least this long between two writes of a job's progress, each of which waits for the disk."""

PAUSE_SECONDS = 5.0
"""A job that was told to pause and reports no checkpoint within this time is closed; it goes on from its last one."""


class JobContext(NamedTuple):
    """What a job is given to work with."""

    job: Job
    """As it was when this attempt began; `job.checkpoint` is set when there is one to go on from."""

    folder: Path
    """Its own folder, for checkpoints; empty at the start unless the job resumes from a checkpoint, and removed when it
    completes or is cancelled."""

    publish: Callable[..., Event]
    """`Bus.publish(channel, event, data, transient=False)`."""

    @property
    def attempt(self) -> int:
        """1, and one more with each retry."""
        return self.job.attempt


class Runner(NamedTuple):
    """How the jobs of one operation are carried out."""

    run: Callable[[Any, JobContext], Generator[Progress, Signal, BaseModel | None]]
    """From the operation and the context to the generator. A checkpoint is what `folder` holds when the generator
    yields `Progress(checkpointed=True)`. A job can be killed between its last write and its completion, so writing
    its results must be repeatable."""

    lane: Literal["compute", "interactive", "io"] = "compute"
    """The heavy queue of the compute thread, turns beside it, or threads of its own."""

    resumes: Literal["checkpoint", "start", "never"] = "start"


class Order(Enum):
    """What an attempt is to do next; a later one replaces an earlier one, except CANCEL."""

    GO = "go"
    STOP = "stop"
    PAUSE = "pause"
    INTERRUPT = "interrupt"
    CANCEL = "cancel"


class Ending(NamedTuple):
    """How an attempt ended."""

    state: str
    """The job's next state."""

    changes: Mapping[str, Any]
    """What else to write into its record."""

    again_after_seconds: float | None = None
    """When to try again by itself, for a passing fault."""

    device_lost: str | None = None
    """Why nothing can run in this process any more, if so."""


class Host(Protocol):
    """Who runs attempts. `begin` and `end` are called within the transaction that changes the job's state."""

    @property
    def closing(self) -> bool:
        """Is nothing to be begun any more?"""
        ...

    @property
    def faults(self) -> Faults:
        """How errors of libraries are to be taken."""
        ...

    def begin(self, attempt: Attempt) -> None:
        """It takes up its job."""
        ...

    def end(self, attempt: Attempt, ending: Ending) -> None:
        """It lays its job down."""
        ...

    def patience_seconds(self, slug: str) -> float | None:
        """How long to wait before a job that met a passing fault is tried again; None when that was tried enough."""
        ...


@dataclass
class Pace:
    """How fast this attempt is: enough for an estimate of the time left."""

    began_at: float
    first_fraction: float | None = None

    def eta_seconds(self, fraction: float | None, now: float) -> float | None:
        """Seconds left if it goes on as since the start of this attempt; None while that is not known."""
        if fraction is None:
            return None
        if self.first_fraction is None:
            self.began_at, self.first_fraction = now, fraction
        done = fraction - self.first_fraction
        return (now - self.began_at) * (1 - fraction) / done if done > 0 else None


class Attempt:
    """One attempt of the job `slug`, with `folder` to work in."""

    def __init__(
        self, host: Host, book: JobBook, slug: str, runner: Runner, folder: Path, publish: Callable[..., Event]
    ) -> None:
        self.slug = slug
        self.resumes = runner.resumes
        self._host = host
        self._book = book
        self._runner = runner
        self._folder = folder
        self._publish = publish
        self._order = Order.GO
        self._patience_ends = 0.0
        self._noted_at = float("-inf")
        self._changes: dict[str, Any] = {}
        self._latest: dict[str, float] = {}
        self._pace = Pace(0.0)

    def command(self, order: Order, patience_seconds: float | None = None) -> None:
        """Takes an order, from any thread; it is obeyed before the next step."""
        if self._order is not Order.CANCEL:
            patience = PAUSE_SECONDS if patience_seconds is None else patience_seconds
            self._patience_ends = time.monotonic() + patience
            self._order = order

    def steps(self) -> Generator[None, Any, None]:
        """The attempt itself; what is sent in is ignored, orders come through `command`.

        Yields between the job's steps. Does nothing when the job is not queued any more: it was cancelled, or another
        attempt has taken it up. Closing it interrupts the job.
        """
        job = self._claim()
        if job is None:
            return
        try:
            ending = yield from self._until_the_end(job)
        except GeneratorExit:
            self._settle(self._interrupted())
            raise
        except BaseException as error:  # the edge between the engine and its jobs: a fault ends the job and no more
            ending = self._failure(job, error)
        self._settle(ending)

    def _claim(self) -> Job | None:
        with self._book.store.transaction():
            if self._host.closing:
                return None
            started_at = self._book.store.get(Job, self.slug).started_at or time.time()
            changes = {"started_at": started_at, "message": "", "error": None}
            job = self._book.move(self.slug, JobState.RUNNING, since=[JobState.QUEUED], **changes)
            if job is not None:
                self._host.begin(self)
                if self._book.asked(self.slug) == "stop":  # before the engine died
                    self._order = Order.STOP
            return job

    def _until_the_end(self, job: Job) -> Generator[None, Any, Ending]:
        if self.resumes != "checkpoint":
            shutil.rmtree(self._folder, ignore_errors=True)  # it begins anew: nothing half done may mislead it
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pace, self._latest = Pace(time.monotonic()), dict(job.metrics)
        work = self._runner.run(rebuilt(job), JobContext(job, self._folder, self._publish))
        step = partial(next, work)
        progress = Progress()
        try:
            while (ending := self._ordered(progress)) is None:
                try:
                    progress = step()
                except StopIteration as end:
                    return self._completed(end.value)
                self._note(job, progress)
                yield
                step = partial(self._send, work)
            return ending
        finally:
            work.close()

    def _send(self, work: Generator[Progress, Signal, Any]) -> Progress:
        """One step. While a checkpoint is wanted, each step says so: a stage that cannot make one ignores it."""
        signals = {Order.STOP: Signal.STOP, Order.PAUSE: Signal.CHECKPOINT, Order.INTERRUPT: Signal.CHECKPOINT}
        return work.send(signals.get(self._order, Signal.GO))

    def _ordered(self, progress: Progress) -> Ending | None:
        """The end that an order asks for, once it can be had; `progress` is the last step's."""
        if self._order is Order.CANCEL:
            return Ending(JobState.CANCELLED, {"message": ""})
        if self._order not in (Order.PAUSE, Order.INTERRUPT):
            return None
        safe = progress.checkpointed or self.resumes != "checkpoint"
        if not safe and time.monotonic() < self._patience_ends:
            return None
        return self._interrupted() if self._order is Order.INTERRUPT else Ending(JobState.PAUSED, {"message": ""})

    def _interrupted(self) -> Ending:
        return Ending(JobState.INTERRUPTED, {"message": interruption("The engine stopped.", self.resumes)})

    def _completed(self, result: BaseModel | None) -> Ending:
        outcome = None if result is None else result.model_dump(mode="json")
        return Ending(JobState.COMPLETED, {"result": outcome, "progress": 1.0, "message": ""})

    def _failure(self, job: Job, error: BaseException) -> Ending:
        """What an exception means for the job."""
        if self._host.faults.is_device_lost(error):
            return self._device_lost(job, error)
        if self._order is Order.CANCEL:
            return Ending(JobState.CANCELLED, {"message": ""})
        if is_disk_full(error):
            error = disk_full(job.ref, self._folder)
        elif (ours := self._host.faults.in_our_words(error, job.ref)) is not None:
            log.warning("%s: %s", job.ref, first_line(error))
            traceback.clear_frames(error.__traceback__)  # frames hold tensors, and memory is what is missing
            error = ours
        if isinstance(error, DiskFull):
            message = f"{error.what} The job waits: make space, then resume it."
            return Ending(JobState.PAUSED, {"message": message, "error": error.body})
        if isinstance(error, Unreachable):
            if self._order is Order.INTERRUPT:
                return self._interrupted()
            if self._order is Order.PAUSE:
                return Ending(JobState.PAUSED, {"message": str(error), "error": error.body})
            if (seconds := self._host.patience_seconds(self.slug)) is not None:
                message = f"{error} It is tried again in {seconds:.0f} s."
                changes = {"message": message, "error": error.body, "attempt": job.attempt + 1}
                return Ending(JobState.QUEUED, changes, seconds)
        if isinstance(error, MistudioError):
            return Ending(JobState.FAILED, {"error": error.body, "message": str(error)})
        log.error("%s failed by a fault of ours", job.ref, exc_info=error)
        traceback.clear_frames(error.__traceback__)  # frames hold tensors
        fault = Internal(
            f"{job.ref} failed by a fault of ours: {type(error).__name__}.",
            fix="The trace is in engine.log; please report it. A retry goes on from its last checkpoint, if any.",
        )
        return Ending(JobState.FAILED, {"error": fault.body, "message": str(fault)})

    def _device_lost(self, job: Job, error: BaseException) -> Ending:
        """The job rests, and it is not its fault alone: the host ends the process."""
        log.critical("%s: the device is lost", job.ref, exc_info=error)
        why = first_line(error)
        if self._order is Order.CANCEL:
            return Ending(JobState.CANCELLED, {"message": ""}, device_lost=why)
        return Ending(
            JobState.INTERRUPTED,
            {"message": interruption(f"The device was lost ({why}).", self.resumes)},
            device_lost=why,
        )

    # Writing down

    def _note(self, job: Job, progress: Progress) -> None:
        """Writes down what a step reported: metrics always, the rest at most four times a second or at a checkpoint."""
        now = time.monotonic()
        said = progress.model_dump(include={"fraction", "stage", "rate", "unit", "eta_seconds"}, exclude_none=True)
        if "fraction" in said:
            said["progress"] = min(max(said.pop("fraction"), 0.0), 1.0)
        said.setdefault("eta_seconds", self._pace.eta_seconds(said.get("progress"), now))
        self._changes.update(said)
        if progress.metrics:
            self._book.measure(job, progress.metrics)
            self._latest |= {name: value for name, value in progress.metrics.items() if math.isfinite(value)}
            self._changes["metrics"] = dict(self._latest)
        if progress.checkpointed:
            self._changes["checkpoint"] = f"jobs/{self.slug}"
        if progress.checkpointed or now - self._noted_at >= NOTE_SECONDS:
            self._write(checkpointed=progress.checkpointed)
            self._noted_at = now

    def _write(self, *, checkpointed: bool = False) -> None:
        if self._changes:
            self._book.record(self.slug, self._changes, checkpointed=checkpointed)
            self._changes = {}

    def _settle(self, ending: Ending) -> None:
        """Writes the end, in one transaction with what was not yet written before it."""
        if ending.state == JobState.CANCELLED:
            # Before it is said to be cancelled: a retry that begins at once must not lose its new folder.
            shutil.rmtree(self._folder, ignore_errors=True)
        changes: dict[str, Any] = {"eta_seconds": None, **ending.changes}
        if ending.state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED):
            changes["finished_at"] = time.time()
        if ending.state == JobState.CANCELLED:
            changes["checkpoint"] = None
        with self._book.store.transaction():
            self._write()
            self._host.end(self, ending)
            self._book.move(self.slug, ending.state, since=[JobState.RUNNING, JobState.PAUSING], **changes)
        if ending.state == JobState.COMPLETED:
            shutil.rmtree(self._folder, ignore_errors=True)


def interruption(what: str, resumes: str) -> str:
    """What happened to a job, and what will become of it."""
    return (
        what
        + {
            "checkpoint": " The job goes on from its last checkpoint when the engine starts again.",
            "start": " The job begins again when the engine starts again.",
            "never": " This kind of job cannot go on by itself: retry it, or cancel it.",
        }[resumes]
    )
