"""Operations on jobs: look at them, wait for them, steer them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mistudio_engine.api.events import Event
from mistudio_engine.api.operations.base import Operation, WaitSeconds
from mistudio_engine.api.operations.datasets import Limit
from mistudio_engine.api.records import Data, Job, Page
from mistudio_engine.api.refs import slug_of

__all__ = ["ControlJob", "EventPage", "JobRef", "ListEvents", "ListJobs", "ShowJob"]

JobRef = Annotated[str, AfterValidator(lambda text: slug_of("job", text))]


class EventPage(Data):
    """Some of the event log, oldest first."""

    events: list[Event]
    seq: int
    """Ask for what comes after this number next."""

    epoch: str
    """Changes when the engine restarts: transient events before that are gone."""


class ListJobs(Operation[Page[Job]], route="GET /jobs"):
    """List jobs, newest first."""

    state: (
        Literal["queued", "running", "pausing", "paused", "interrupted", "completed", "failed", "cancelled"] | None
    ) = None
    operation: str | None = None
    limit: Limit = 20
    cursor: str | None = None


class ShowJob(Operation[Job], route="GET /jobs/{job}"):
    """One job: state, stage, progress, time left, metrics, result or error; waits for its end at most `wait_s`."""

    job: JobRef
    wait_s: WaitSeconds = 0.0


class ControlJob(Operation[Job], route="POST /jobs/{job}/control", effect="destroy"):
    """Cancel, pause, resume, stop (keep what is usable) or retry a job."""

    job: JobRef
    action: Literal["cancel", "pause", "resume", "stop", "retry"]


class ListEvents(Operation[EventPage], route="GET /events"):
    """Read the event log over HTTP, for when no WebSocket is to be had."""

    after: Annotated[int, Field(ge=0)] = 0
    channels: str | None = None
    """Channels, separated by commas; all by default."""

    limit: Annotated[int, Field(ge=1, le=1000)] = 200
