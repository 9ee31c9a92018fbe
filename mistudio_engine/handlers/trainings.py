"""Handlers of trainings that are there: listed, watched, stopped, retried, deleted, their checkpoints kept as SAEs."""

from __future__ import annotations

import shutil
from contextlib import suppress
from typing import Any

from mistudio_engine.api.errors import BadInput, Conflict, MistudioError, NotFound
from mistudio_engine.api.operations.datasets import Deleted
from mistudio_engine.api.operations.training import (
    Checkpoint,
    CheckpointPage,
    DeletedTrainings,
    DeleteTraining,
    DeleteTrainings,
    KeepCheckpoint,
    ListTrainings,
    MetricRow,
    MetricsPage,
    RetryTraining,
    ShowTraining,
    StopTraining,
    TrainingCheckpoints,
    TrainingMetrics,
)
from mistudio_engine.api.records import (
    Job,
    JobState,
    Page,
    SAERecord,
    TokensRecord,
    TrainingRecord,
)
from mistudio_engine.handlers.jobs import training_now
from mistudio_engine.handlers.models import remove_folder
from mistudio_engine.handlers.registry import handles
from mistudio_engine.handlers.resources import free_slug
from mistudio_engine.handlers.training_plan import blueprints_of, cache_folder, hooks_of, promised_saes
from mistudio_engine.handlers.training_run import checkpoint_root, keep_sae
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.job_states import ACTIVE_STATES
from mistudio_engine.saes import SAE
from mistudio_engine.training.checkpoints import checkpoints
from mistudio_engine.training.trainer import Trainer

DOCUMENTS_STATES = {"queued": "pending", "pausing": "running", "interrupted": "pending"}
"""Job states that the documents call otherwise."""

OPERATIONS = ("train_sae", "extend_training")
"""Those whose jobs a training has."""


def follow_trainings(engine: Engine) -> None:
    """Keep each training's record in step with its job."""

    def changed(job: Job) -> None:
        if job.operation not in OPERATIONS or not job.subject:
            return
        slug = job.subject.partition("/")[2]
        if not engine.store.exists(TrainingRecord, slug):
            return
        record = engine.store.get(TrainingRecord, slug)
        jobs = record.jobs if job.slug in record.jobs else [*record.jobs, job.slug]
        status = DOCUMENTS_STATES.get(job.state, job.state)
        engine.store.update(TrainingRecord, slug, status=status, jobs=jobs)
        if job.state == JobState.CANCELLED:
            engine.store.after_commit(lambda: _drop_unfinished_cache(engine, record))

    engine.jobs.on_change(changed)


def _drop_unfinished_cache(engine: Engine, record: TrainingRecord) -> None:
    """Remove the activations that a cancelled training was writing, unless another one may go on with them."""
    others = [each for each in engine.store.all(TrainingRecord, tokens=record.tokens) if each.slug != record.slug]
    if any(each.status in ("pending", "running", "paused") for each in others):
        return
    if not engine.store.exists(TokensRecord, record.tokens):
        return
    plans = blueprints_of(record)
    tokens = engine.store.get(TokensRecord, record.tokens)
    folder = cache_folder(engine, tokens, list(hooks_of(plans)), plans[0].hp)
    shutil.rmtree(folder.with_name(f"{folder.name}.part"), ignore_errors=True)


def job_of(engine: Engine, training: str) -> Job:
    record = engine.store.get(TrainingRecord, training)
    if not record.jobs:
        raise Conflict(f"{record.ref} was never started.", fix="Delete it and start it again with train_sae.")
    return engine.jobs.get(record.jobs[-1])


@handles(ListTrainings)
def list_trainings(operation: ListTrainings, engine: Engine) -> Page[TrainingRecord]:
    where = {name: value for name in ("status", "model") if (value := getattr(operation, name)) is not None}
    page = engine.store.page(
        TrainingRecord, query=operation.query, where=where, limit=operation.limit, cursor=operation.cursor
    )
    return page.model_copy(update={"rows": [training_now(engine, record) for record in page.rows]})


@handles(ShowTraining)
def show_training(operation: ShowTraining, engine: Engine) -> TrainingRecord:
    return training_now(engine, engine.store.get(TrainingRecord, operation.training))


@handles(DeleteTraining)
def delete_training(operation: DeleteTraining, engine: Engine) -> Deleted:
    record = engine.store.get(TrainingRecord, operation.training)
    job = engine.jobs.get(record.jobs[-1]) if record.jobs else None
    if job is not None and job.state in ACTIVE_STATES:
        raise Conflict(f"{record.ref} is {record.status}.", fix="Stop or cancel it first.")
    if job is not None and not job.finished:  # paused or interrupted: it must not go on without its record
        engine.jobs.control(job.slug, "cancel")
    with engine.store.transaction():
        for sae in engine.store.all(SAERecord, training=record.slug):
            engine.store.update(SAERecord, sae.slug, training=None)
        engine.store.delete(TrainingRecord, record.slug)
    return Deleted(ref=record.ref, freed_bytes=remove_folder(engine, f"trainings/{record.slug}"))


@handles(DeleteTrainings)
def delete_trainings(operation: DeleteTrainings, engine: Engine) -> DeletedTrainings:
    deleted, refused = [], {}
    for slug in dict.fromkeys(operation.trainings):
        try:
            deleted.append(delete_training(DeleteTraining(training=slug), engine))
        except MistudioError as error:
            refused[f"training/{slug}"] = str(error)
    return DeletedTrainings(deleted=deleted, refused=refused, freed_bytes=sum(each.freed_bytes for each in deleted))


@handles(TrainingMetrics)
def training_metrics(operation: TrainingMetrics, engine: Engine) -> MetricsPage:
    engine.store.get(TrainingRecord, operation.training)
    channel = f"trainings/{operation.training}"
    events = engine.store.events_after(operation.after, [channel], operation.limit, names=["metrics"])
    rows = [MetricRow(seq=event.seq, at=event.at, values=_finite(event.data["metrics"])) for event in events]
    return MetricsPage(
        rows=rows,
        total=engine.store.count_events(channel, "metrics"),
        shown=len(rows),
        next_cursor=str(rows[-1].seq) if len(rows) == operation.limit else None,
    )


def _finite(metrics: dict[str, float | None]) -> dict[str, float]:
    """What JSON could carry: NaN and infinity lie in the log as null."""
    return {name: value for name, value in metrics.items() if value is not None}


@handles(TrainingCheckpoints)
def training_checkpoints(operation: TrainingCheckpoints, engine: Engine) -> CheckpointPage:
    record = engine.store.get(TrainingRecord, operation.training)
    found = checkpoints(checkpoint_root(engine, record.slug))
    best = _best(found)
    rows = []
    for each in found:
        with suppress(FileNotFoundError):  # the training removes old ones meanwhile
            rows.append(
                Checkpoint(
                    name=each.folder.name,
                    step=each.step,
                    n_bytes=sum(file.stat().st_size for file in each.folder.rglob("*") if file.is_file()),
                    created_at=each.folder.stat().st_mtime,
                    score=each.score,
                    is_best=each is best,
                    members=list(each.members),
                )
            )
    return CheckpointPage(rows=rows, total=len(rows), shown=len(rows))


def _best(found: list[Any]) -> Any:
    """The checkpoint with the lowest score, None where none has one."""
    return min((each for each in found if each.score is not None), key=lambda each: each.score, default=None)


@handles(KeepCheckpoint)
def keep_checkpoint(operation: KeepCheckpoint, engine: Engine) -> SAERecord:
    record = engine.store.get(TrainingRecord, operation.training)
    found = checkpoints(checkpoint_root(engine, record.slug))
    wanted = operation.checkpoint
    chosen = {"last": found[0] if found else None, "best": _best(found)}.get(
        wanted, next((each for each in found if each.folder.name == wanted), None)
    )
    if chosen is None:
        names = ", ".join(each.folder.name for each in found) or "none"
        raise NotFound(
            f"{record.ref} has no checkpoint {wanted!r}.",
            why=f"It has {names}." + (" None was judged yet." if wanted == "best" and found else ""),
            fix="Take one of them, or last.",
            next_call=("training_checkpoints", {"training": record.slug}),
        )
    plans = {each.name: each for each in blueprints_of(record)}
    name = operation.member or next(iter(plans))
    if name not in plans or (operation.member is None and len(plans) > 1):
        raise BadInput(
            f"{record.ref} trains {len(plans)} SAEs; say which."
            if operation.member is None
            else f"No member {name!r}.",
            fix=f"Set member to one of {', '.join(plans)}.",
        )
    blueprint = plans[name]
    slug = free_slug(
        engine,
        operation.name or f"{record.slug}-step-{chosen.step}" + ("" if len(plans) == 1 else f"-{name}"),
        SAERecord,
        TrainingRecord,
        exact=operation.name is not None,
    )
    if slug in (promised := promised_saes(engine)):
        raise Conflict(f"The name {slug!r} is promised to an SAE of {promised[slug]}.", fix="Give another name.")

    def finish() -> tuple[SAE, Any]:
        trainer = Trainer(blueprint.cfg, blueprint.hp, blueprint.seed)
        trainer.restore(chosen.folder / name)
        tokens = engine.store.get(TokensRecord, record.tokens)
        trained_on = {
            "model_name": record.model,
            "context_size": tokens.context_size,
            "prepend_bos": tokens.bos_policy in ("context", "both"),
        }
        return trainer.finished_sae(trained_on), trainer.density

    sae, density = engine.compute.run(finish)
    return keep_sae(engine, record, slug, sae, density)


@handles(StopTraining)
def stop_training(operation: StopTraining, engine: Engine) -> Job:
    return engine.jobs.control(job_of(engine, operation.training).slug, "stop")


@handles(RetryTraining)
def retry_training(operation: RetryTraining, engine: Engine) -> Job:
    job = job_of(engine, operation.training)
    if job.state == "completed":
        raise BadInput(
            f"training/{operation.training} is completed; there is nothing to retry.",
            fix="Start a new one with train_sae.",
        )
    return engine.jobs.control(job.slug, "retry")
