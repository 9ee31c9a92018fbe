"""One job, live in a notebook: how far it is, what it measures, what came of it, and buttons to cancel, pause or retry.

The widget follows the job from threads of its own, so it moves while a cell is busy, and shows the last known state
while the engine is away. It knows the client only by `StudioLike`; what the browser does when the kernel itself falls
silent is in `js/`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol

import traitlets

from mistudio_engine.api.errors import BadInput, Internal, MistudioError, NotFound
from mistudio_engine.api.events import Event
from mistudio_engine.api.operations.jobs import ControlJob, ShowJob
from mistudio_engine.api.records import Job
from mistudio_widgets._base import Publisher, Widget

__all__ = ["JobProgress", "StudioLike"]

Action = Literal["cancel", "pause", "resume", "stop", "retry"]

WATCH_SECONDS = 2.0
"""The record itself is read at least this often: it is right even if an event was missed."""

RETRY_SECONDS = 1.0
"""Pause before the engine is asked again after it failed to answer."""

SHOWN = {
    "slug", "operation", "state", "subject", "author", "attempt", "progress", "stage", "rate", "unit", "eta_seconds",
    "metrics", "resumes", "error", "message", "created_at", "started_at", "finished_at",
}  # fmt: skip
"""Fields of the record that travel to the browser; arguments and results can be large."""

PROGRESS_FIELDS = {"progress", "stage", "rate", "unit", "eta_seconds"}
"""Fields of the record that a progress event brings."""


class StudioLike(Protocol):
    """What the widget needs of a client, so that any that can do this will do."""

    def call(self, operation: Any) -> Any: ...

    def follow(self, channels: Iterable[str], after: int | None = None) -> Iterator[Event]: ...


class JobProgress(Widget, front_end="job_progress"):
    """A job's progress as a widget.

    >>> progress = JobProgress(studio.train_sae(...), studio)
    >>> progress.job.state, progress.result

    Args:
        job: a job, its slug or its ref (`job/train-0007`); None shows what to do.
        studio: the client; by default the job's own, else `connect()`.
    """

    view = traitlets.Dict().tag(sync=True)
    """All that the browser draws: `{slug, job, error, at, pulse}`; `error` is why the engine is out of reach and `at`
    when it was heard last. After the first one, only the publisher sets it."""

    def __init__(self, job: Job | str | None = None, studio: StudioLike | None = None, **keywords: Any) -> None:
        self._lock = threading.RLock()
        self._connecting = threading.Lock()
        self._record: Job | None = job if isinstance(job, Job) else None
        self._slug = job.slug if isinstance(job, Job) else job.removeprefix("job/") if job else None
        self._studio = studio or getattr(job, "studio", None)
        self._asked_at = float("-inf")
        self._heard_at = 0.0
        self._session: object | None = None  # what the threads that follow the job belong to
        self._publisher: Publisher | None = None
        self._closed = threading.Event()
        super().__init__(view=self._drawn(), **keywords)
        self.on_msg(self._on_message)
        if self._slug and not (self._record and self._record.finished):
            self._start()

    def __repr__(self) -> str:
        if self._slug is None:
            return "JobProgress(no job)"
        job = self._record
        if job is None:
            return f"JobProgress(job/{self._slug})"
        done = "" if job.progress is None else f", {job.progress:.0%}"
        return f"JobProgress(job/{job.slug}: {job.state}{done})"

    @property
    def job(self) -> Job | None:
        """The record as it was known last; None before it is known."""
        return self._record

    @property
    def result(self) -> dict[str, Any] | None:
        """What the job made; None until it has completed."""
        return self._record.result if self._record and self._record.state == "completed" else None

    def cancel(self) -> Job:
        """Stop the job and throw away what it has."""
        return self.control("cancel")

    def pause(self) -> Job:
        """Let it write a checkpoint and wait."""
        return self.control("pause")

    def resume(self) -> Job:
        """Let it go on from its checkpoint."""
        return self.control("resume")

    def retry(self) -> Job:
        """Run it again."""
        return self.control("retry")

    def control(self, action: Action) -> Job:
        """What the buttons do.

        Raises:
            BadInput: there is no job.
            Conflict: its state forbids this.
        """
        if self._slug is None:
            raise BadInput("This widget has no job.", fix="Make it with one: JobProgress(job).")
        asked_at = time.monotonic()
        record = self._client().call(ControlJob(job=self._slug, action=action))
        self._take(record, asked_at)
        if not record.finished:
            self._start()
        return record

    def refresh(self) -> Job | None:
        """Read the record now, and follow the job again if somebody retried it elsewhere."""
        if self._slug is not None:
            self._read(wait_seconds=0.0)
            if self._record is not None and not self._record.finished:
                self._start()
        return self._record

    def close(self) -> None:
        """Stop following; the job goes on."""
        self._closed.set()
        with self._lock:
            self._session = None
            if self._publisher is not None:
                self._publisher.close()
        super().close()

    def _client(self) -> StudioLike:
        with self._connecting:  # of its own: an engine may take half a minute to start
            if self._studio is None:
                from mistudio_engine.api.client import connect

                self._studio = connect()
            return self._studio

    def _start(self) -> None:
        """Follow the job, unless it is being followed."""
        with self._lock:
            if self._session is not None or self._closed.is_set():
                return
            session = self._session = object()
            for work in (self._watch, self._listen):
                threading.Thread(target=work, args=(session,), name=f"mistudio-{self._slug}", daemon=True).start()

    def _watch(self, session: object) -> None:
        """Read the record until the job has ended, and say when the engine is away."""
        wait_seconds = 0.0  # the first answer at once, later ones at the job's end or after a while
        while self._session is session:
            try:
                self._read(wait_seconds=wait_seconds)
                wait_seconds = WATCH_SECONDS
            except NotFound as error:
                self._publish(lost=error)
                return  # asking again would not help
            except MistudioError as error:
                self._publish(lost=error)
                self._closed.wait(RETRY_SECONDS)
            except Exception as error:  # the edge of a thread: whatever it is, a person should see it
                self._publish(lost=Internal(f"The job cannot be followed: {error!r}"))
                self._closed.wait(RETRY_SECONDS)

    def _listen(self, session: object) -> None:
        """Take every event of the job as it comes; a connection that ends is made again."""
        seq: int | None = None
        while self._session is session:
            try:
                for event in self._client().follow([f"jobs/{self._slug}"], after=seq):
                    if event.channel == f"jobs/{self._slug}":
                        seq = event.seq
                        self._hear(event)
                    if self._session is not session:
                        return
            except MistudioError:
                self._closed.wait(RETRY_SECONDS)  # the watcher says so

    def _hear(self, event: Event) -> None:
        if event.event not in ("progress", "metrics"):
            self._read(wait_seconds=0.0)  # its state has changed
            return
        with self._lock:
            record = self._record
            if record is None or record.finished:
                return
            changes = {name: value for name, value in event.data.items() if name in PROGRESS_FIELDS}
            if event.event == "metrics":
                changes = {"metrics": {**record.metrics, **event.data["metrics"]}}
            self._record = record.model_copy(update=changes)
            self._publish()

    def _read(self, *, wait_seconds: float) -> None:
        asked_at = time.monotonic()
        self._take(self._client().call(ShowJob(job=self._slug or "", wait_s=wait_seconds)), asked_at)

    def _take(self, record: Job, asked_at: float) -> None:
        with self._lock:
            if asked_at < self._asked_at:
                return  # an answer that a later question overtook
            self._asked_at, self._record = asked_at, record
            self._publish()

    def _publish(self, lost: MistudioError | None = None) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            if self._publisher is None:
                self._publisher = Publisher(self._show, name=f"mistudio-{self._slug}-publish")
            if (self._record is not None and self._record.finished) or isinstance(lost, NotFound):
                self._session = None
                self._publisher.settle(**self._drawn(lost))
            else:
                self._publisher.put(**self._drawn(lost))

    def _drawn(self, lost: MistudioError | None = None) -> dict[str, Any]:
        """What the browser draws: the job as far as it is known, and whether the engine answers."""
        record = self._record
        job: dict[str, Any] | None = None
        if record is not None:
            job = record.model_dump(mode="json", include=SHOWN) | {"result": _few(record.result)}
        error = lost.body.model_dump(mode="json") if lost else None
        if not lost:
            self._heard_at = time.time()
        return {"slug": self._slug, "job": job, "error": error, "at": self._heard_at}

    def _show(self, view: dict[str, Any]) -> None:
        self.view = view

    def _on_message(self, _: Any, content: dict[str, Any], __: list[Any]) -> None:
        """What the browser asks: every question is answered with its `id`, in whatever thread it arrives."""
        answer: dict[str, Any] = {"id": content.get("id"), "ok": True}
        try:
            kind = content.get("kind")
            if kind == "control":
                self.control(content["action"])
            elif kind == "refresh":
                self.refresh()
            elif kind != "ping":
                raise BadInput(f"The widget does not know the question {kind!r}.")
        except MistudioError as error:
            answer |= {"ok": False, "error": error.body.model_dump(mode="json")}
        except Exception as error:  # the edge: unanswered, the browser would wait for nothing
            answer |= {
                "ok": False,
                "error": Internal(f"The kernel failed to do this: {error!r}").body.model_dump(mode="json"),
            }
        self.send(answer)


def _few(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """The plain values of a result: what fits on one line of the widget."""
    if result is None:
        return None
    plain = {name: value for name, value in result.items() if isinstance(value, (str, int, float, bool))}
    return {name: value if not isinstance(value, str) else value[:120] for name, value in list(plain.items())[:12]}
