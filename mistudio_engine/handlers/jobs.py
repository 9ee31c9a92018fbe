"""Handlers of api/operations/jobs.py: thin views of the job queue and the event log."""

from __future__ import annotations

from mistudio_engine.api.operations.jobs import ControlJob, EventPage, ListEvents, ListJobs, ShowJob
from mistudio_engine.api.records import Job, Page, TrainingRecord
from mistudio_engine.handlers.registry import handles
from mistudio_engine.runtime.engine import Engine


def training_now(engine: Engine, record: TrainingRecord) -> TrainingRecord:
    """The record with its job's latest numbers."""
    if not record.jobs:
        return record
    job = engine.jobs.get(record.jobs[-1])
    return record.model_copy(update={"progress": 100 * (job.progress or 0.0), "metrics": job.metrics})


@handles(ListJobs)
def list_jobs(operation: ListJobs, engine: Engine) -> Page[Job]:
    where = {name: value for name in ("state", "operation") if (value := getattr(operation, name)) is not None}
    return engine.store.page(Job, where=where, limit=operation.limit, cursor=operation.cursor)


@handles(ShowJob)
def show_job(operation: ShowJob, engine: Engine) -> Job:
    return engine.jobs.get(operation.job)


@handles(ControlJob)
def control_job(operation: ControlJob, engine: Engine) -> Job:
    engine.wait_ready()  # a job cannot be carried on before its handlers are there
    return engine.jobs.control(operation.job, operation.action)


@handles(ListEvents)
def list_events(operation: ListEvents, engine: Engine) -> EventPage:
    channels = [name.strip() for name in operation.channels.split(",")] if operation.channels else None
    events = engine.bus.after(operation.after, channels, operation.limit)
    return EventPage(events=events, seq=events[-1].seq if events else operation.after, epoch=engine.epoch)
