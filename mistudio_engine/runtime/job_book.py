"""The book of jobs: every change of a job's record together with the events that tell of it, in one transaction.

It keeps to the transitions of `job_states` and knows who waits for a job to come to rest. It does not know what runs
where.

Durable events of a job, on `jobs/{slug}` and on the channel of its subject: its new state (`queued`, `running`, …,
`cancelled`) with `job, state, attempt, progress, stage, message` and, at the end, `result` or `error`; `metrics` with
`job, metrics`; `checkpoint` with `job, progress`. Transient: `progress` with `job, progress, stage, rate, unit,
eta_seconds`. On `jobs/{slug}` alone: `asked` with the `action`, `resumed`, `crashed`, `device_lost` with `why`; and
what a job writes down for its next attempt, such as `spent` with `usd`.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from pydantic import ValidationError

from mistudio_engine.api.errors import Conflict, Unsupported
from mistudio_engine.api.operations.base import OPERATIONS, JobOperation
from mistudio_engine.api.records import Job, JobState
from mistudio_engine.runtime.bus import Bus
from mistudio_engine.runtime.job_states import ACTIVE_STATES, TRANSITIONS
from mistudio_engine.runtime.store import NewEvent, Store

__all__ = ["NOT_ARGUMENTS", "JobBook", "arguments_of", "rebuilt"]

log = logging.getLogger("mistudio.jobs")

NOT_ARGUMENTS = frozenset({"dry_run", "idempotency_key", "wait_s"})
"""Fields of a JobOperation that concern the call and not the work."""

ANSWERS = ("resumed", "pausing", "paused", "completed", "failed", "cancelled")
"""Events after which an earlier wish is done or void; a crash and the recovery from it are not among them."""

CRASHES = ("crashed", "device_lost")

ENTITY_CHANNELS = {"model": "models", "dataset": "datasets", "training": "trainings", "sae": "saes"} | {
    "extraction": "extractions",
    "export": "export",  # the documents' name is singular
    "tokens": "tokens",
    "experiment": "experiments",
}
"""Where those listen who follow what a job works on: `{channel}/{slug}` by the kind of its subject."""


class JobBook:
    """The records and events of all jobs."""

    def __init__(self, store: Store, bus: Bus) -> None:
        self.store = store
        self._bus = bus
        self._waiting: dict[str, set[Callable[[], None]]] = defaultdict(set)
        self._waiting_lock = threading.Lock()
        self._callbacks: list[Callable[[Job], None]] = []

    def on_change(self, callback: Callable[[Job], None]) -> None:
        """Calls `callback` with the job at each change of state, within the transaction of that change.

        What it writes to the store is as durable as the change itself. It must be quick, must not control jobs, and
        what it raises is logged and changes nothing.
        """
        self._callbacks.append(callback)

    # Keys

    def with_key(self, operation: JobOperation[Any]) -> Job | None:
        """The job that was started with the operation's idempotency key; raises Conflict if by another call."""
        key = operation.idempotency_key
        if key is None or not (found := self.store.all(Job, idempotency_key=key)):
            return None
        job = found[0]
        if job.operation != operation.tool or not _asks_for(operation, arguments_of(rebuilt(job))):
            raise Conflict(
                f"The idempotency key {key!r} belongs to {job.ref}, which is another call.",
                why=f"That was {job.operation} with other arguments.",
                fix="Use a new key for a new call, or repeat the old call exactly.",
                next_call=("job", {"id": job.ref}),
            )
        return job

    # Changes

    def open(self, job: Job) -> Job:
        """Keeps a new job."""
        with self.store.transaction():
            job = self.store.insert(job)
            self._announce(job)
        return job

    def move(self, slug: str, state: str, *, since: Sequence[str] | None = None, **changes: Any) -> Job | None:
        """Puts a job into another state, if its present one (which must be one of `since`) allows it; None if not.

        The state is compared and set in one transaction: of two that try, one succeeds.
        """
        with self.store.transaction():
            job = self.store.get(Job, slug)
            if state not in TRANSITIONS[job.state] or (since is not None and job.state not in since):
                return None
            job = self.store.update(Job, slug, state=state, **changes)
            self._announce(job)
            if state not in ACTIVE_STATES:
                self.store.after_commit(lambda: self._wake(slug))
        return job

    def ask(self, job: Job, action: str) -> None:
        """Writes down what a running job was told; after a crash it is still to be done."""
        self._bus.publish(f"jobs/{job.slug}", "asked", {"action": action})

    def asked(self, slug: str) -> str | None:
        """What the job was told and has not done: "cancel", "stop" or None."""
        newest = self.store.events_after(0, [f"jobs/{slug}"], 1, names=["asked", *ANSWERS], newest_first=True)
        return newest[0].data["action"] if newest and newest[0].event == "asked" else None

    def crashes(self, slug: str) -> list[str]:
        """How the engine died under this job, each time since its last checkpoint or order, newest first: `crashed`, or
        `device_lost` by the job itself.
        """
        names = [*CRASHES, "checkpoint", "asked", *ANSWERS]
        newest = self.store.events_after(0, [f"jobs/{slug}"], 100, names=names, newest_first=True)
        return [event.event for event in takewhile(lambda event: event.event in CRASHES, newest)]

    def note(self, job: Job, event: str, data: Mapping[str, Any] | None = None) -> None:
        """A durable event about a job on its own channel."""
        self._bus.publish(f"jobs/{job.slug}", event, dict(data or {}))

    def measure(self, job: Job, metrics: Mapping[str, float]) -> None:
        """Adds numbers to the log, every one of them; at once, but without waiting for the disk."""
        data = {"job": job.slug, "metrics": dict(metrics)}
        with self.store.transaction(synced=False):
            self.store.append_events([NewEvent(channel, "metrics", data) for channel in channels_of(job)])

    def record(self, slug: str, changes: Mapping[str, Any], *, checkpointed: bool) -> None:
        """Writes how far a job is, and that there is a checkpoint to go on from."""
        with self.store.transaction():
            job = self.store.update(Job, slug, **changes)
            if checkpointed:
                data = {"job": slug, "progress": job.progress}
                self.store.append_events([NewEvent(channel, "checkpoint", data) for channel in channels_of(job)])
        data = job.model_dump(mode="json", include={"progress", "stage", "rate", "unit", "eta_seconds"})
        for channel in channels_of(job):
            self._bus.publish(channel, "progress", {"job": slug, **data}, transient=True)

    def _announce(self, job: Job) -> None:
        """The event of a new state, on every channel of the job."""
        data = job.model_dump(mode="json", include={"state", "attempt", "progress", "stage", "message"})
        data["job"] = job.slug
        if job.state == JobState.COMPLETED:
            data["result"] = job.result
        if job.error is not None:
            data["error"] = job.error.model_dump(mode="json")
        self.store.append_events([NewEvent(channel, job.state, data) for channel in channels_of(job)])
        for callback in self._callbacks:
            try:
                callback(job)
            except Exception:  # an edge: a listener's fault must not keep a job from ending
                log.exception("a callback for the change of %s failed", job.ref)

    # Waiting

    @contextmanager
    def waiting(self, slug: str, wake: Callable[[], None]) -> Iterator[None]:
        """Calls `wake`, on whatever thread it is, each time the job comes to rest while the block runs."""
        with self._waiting_lock:
            self._waiting[slug].add(wake)
        try:
            yield
        finally:
            with self._waiting_lock:
                self._waiting[slug].discard(wake)
                if not self._waiting[slug]:
                    del self._waiting[slug]

    def _wake(self, slug: str) -> None:
        with self._waiting_lock:
            waiting = list(self._waiting.get(slug, ()))
        for wake in waiting:
            wake()


def arguments_of(operation: JobOperation[Any]) -> dict[str, Any]:
    """What the operation asks for, as JSON."""
    return operation.model_dump(mode="json", exclude=set(NOT_ARGUMENTS))


def _asks_for(operation: JobOperation[Any], arguments: dict[str, Any]) -> bool:
    """Is it the call that a job with these arguments was started by?"""
    said_none = getattr(operation, "template", None) is None and "template" in operation.model_fields_set
    if "template" not in type(operation).model_fields or arguments.get("template") is None or said_none:
        return arguments_of(operation) == arguments
    # What it leaves to its template was filled in then, and the template may have changed since.
    return _is_within(operation.model_dump(mode="json", exclude_unset=True, exclude=set(NOT_ARGUMENTS)), arguments)


def _is_within(some: Any, whole: Any) -> bool:
    if isinstance(some, dict) and isinstance(whole, dict):
        return all(name in whole and _is_within(value, whole[name]) for name, value in some.items())
    if isinstance(some, list) and isinstance(whole, list):
        return len(some) == len(whole) and all(map(_is_within, some, whole))
    return some == whole


def rebuilt(job: Job) -> JobOperation[Any]:
    """The operation that a job carries out; raises Unsupported when this version has none like it."""
    try:
        return OPERATIONS[job.operation].model_validate(job.arguments)  # type: ignore[return-value]
    except (KeyError, ValidationError) as error:
        raise Unsupported(
            f"{job.ref} was started by another version of miStudio.",
            why=f"Its operation {job.operation!r} is unknown here, or has other arguments now: {error}.",
            fix="Make the call again for a new job.",
        ) from error


def channels_of(job: Job) -> list[str]:
    """Where a job's events go: its own channel, and that of what it works on."""
    channels = [f"jobs/{job.slug}"]
    if job.subject:
        kind, _, slug = job.subject.partition("/")
        channels.append(f"{ENTITY_CHANNELS.get(kind, kind)}/{slug}")
    return channels
