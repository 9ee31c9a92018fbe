"""Handlers of api/operations/training.py: a training is planned, run with checkpoints, watched and ended."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from mistudio_engine import __version__
from mistudio_engine.api.errors import BadInput, Conflict, NotFound, OutOfMemory, UnknownHook, WrongShape, human_bytes
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.datasets import Deleted, TokenizeDataset
from mistudio_engine.api.operations.training import (
    Checkpoint,
    CheckpointPage,
    DeleteTraining,
    ListTrainings,
    MetricRow,
    MetricsPage,
    RetryTraining,
    ShowTraining,
    StopTraining,
    TrainingCheckpoints,
    TrainingMetrics,
    TrainSAE,
)
from mistudio_engine.api.records import (
    DatasetRecord,
    Job,
    ModelRecord,
    Page,
    Plan,
    SAERecord,
    TokensRecord,
    TrainingRecord,
)
from mistudio_engine.api.sae_config import SAEConfig, parse_sae_config, sae_bytes
from mistudio_engine.api.training_config import check_training, training_bytes
from mistudio_engine.handlers.datasets import tokenize
from mistudio_engine.handlers.jobs import training_now
from mistudio_engine.handlers.models import remove_folder
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.resources import check_fit, free_slug, language_model, open_tokens, tokens_of
from mistudio_engine.models.hooks import parse_hook
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import require_free, sha256_folder, slugify
from mistudio_engine.runtime.job_states import ACTIVE_STATES
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import save_sae
from mistudio_engine.training.activations import ActivationStream
from mistudio_engine.training.checkpoints import latest_good, save_checkpoint
from mistudio_engine.training.loop import train
from mistudio_engine.training.trainer import Trainer

log = logging.getLogger(__name__)

DEFAULT_EXPANSION = 8
DEFAULT_K = 32

CHECKPOINTS_PER_RUN = 10
"""How many a run writes when nothing else is said: a kill then costs a tenth of it at most."""

DOCUMENTS_STATES = {"queued": "pending", "pausing": "running", "interrupted": "pending"}
"""Job states that the documents call otherwise."""


@plans(TrainSAE)
def plan_train_sae(operation: TrainSAE, engine: Engine) -> Planned:
    model = engine.store.get(ModelRecord, operation.model)
    tokens = _tokens_or_dataset(engine, operation)
    cfg = _config(operation, model, tokens)
    check_training(cfg, operation.hyperparameters)
    memory = training_bytes(cfg, operation.hyperparameters)
    capacity = engine.memory.capacity(engine.device)
    if memory + model.n_bytes > capacity:
        raise OutOfMemory.of(
            "This training", memory + model.n_bytes, capacity, _what_fits(cfg, operation, capacity - model.n_bytes)
        )
    disk = 4 * sae_bytes(cfg) * 3  # weights and two moments, for the checkpoints that are kept, and the SAE
    require_free(engine.home, disk, "This training")
    # The SAE will have the training's name. No job's name is given out again: its metrics are found under it.
    stem, exact = operation.name or _stem(operation, cfg), operation.name is not None
    slug = free_slug(engine, stem, TrainingRecord, SAERecord, released=(), exact=exact)
    hyperparameters = operation.hyperparameters
    plan = Plan(
        summary=(
            f"Train a {cfg.architecture} SAE {cfg.d_in} → {cfg.d_sae} on {model.ref} {operation.hook_name}: "
            f"{hyperparameters.n_steps:,} steps of {hyperparameters.batch_size:,} tokens."
        ),
        memory_bytes=memory,
        disk_bytes=disk,
        details={
            "n_steps": hyperparameters.n_steps,
            "n_tokens": hyperparameters.n_tokens,
            "checkpoint_interval": hyperparameters.checkpoint_interval or _checkpoint_interval(operation),
            "d_in": cfg.d_in,
            "d_sae": cfg.d_sae,
        },
    )

    def open_record() -> None:
        record = TrainingRecord(
            slug=slug,
            model=model.slug,
            tokens=tokens.slug if isinstance(tokens, TokensRecord) else "",
            hook_name=operation.hook_name,
            architecture=cfg.architecture,
            config=cfg.model_dump(mode="json"),
            hyperparameters=hyperparameters.model_dump(mode="json"),
        )
        engine.store.insert(record)

    return Planned(plan, subject=f"training/{slug}", open=open_record)


def _tokens_or_dataset(engine: Engine, operation: TrainSAE) -> TokensRecord | DatasetRecord:
    """The tokens to train on; a dataset that has none for this model yet is tokenised when the job runs."""
    try:
        tokens = tokens_of(engine, operation.dataset, None, operation.model)
    except NotFound:
        return engine.store.get(DatasetRecord, operation.dataset.removeprefix("dataset/"))
    if tokens.model != operation.model:
        raise BadInput(
            f"{tokens.ref} was made for model/{tokens.model}, not for model/{operation.model}.",
            fix="Give the dataset, or one of its tokenisations for this model.",
        )
    return tokens


def _config(operation: TrainSAE, model: ModelRecord, tokens: TokensRecord | DatasetRecord) -> SAEConfig:
    """The SAE to train; widths that only the loaded model knows are checked when it is loaded."""
    point = parse_hook(operation.hook_name)
    if not 0 <= point.layer < model.n_layers:
        raise UnknownHook(
            f"{operation.hook_name!r} lies outside {model.ref}, which has layers 0 to {model.n_layers - 1}.",
            fix=f"Use a layer below {model.n_layers}; model_architecture lists every hook.",
        )
    d_in = operation.d_in or model.d_model
    if "resid" in point.site and d_in != model.d_model:
        raise WrongShape(
            f"d_in is {d_in}, but {operation.hook_name} of {model.ref} is {model.d_model} wide.",
            fix="Leave d_in out: it is the hook's width.",
        )
    d_sae = operation.d_sae or round((operation.expansion or DEFAULT_EXPANSION) * d_in)
    values: dict[str, Any] = {
        "architecture": operation.architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "normalize_activations": operation.normalize_activations,
        "hook_name": operation.hook_name,
        "model_name": model.slug,
        "dataset_path": tokens.dataset if isinstance(tokens, TokensRecord) else tokens.slug,
    }
    if operation.architecture == "topk":
        values["k"] = operation.k or min(DEFAULT_K, d_sae)
        if values["k"] > d_sae:
            raise BadInput(
                f"k = {values['k']} features cannot be active where there are only d_sae = {d_sae}.",
                fix=f"Lower k to at most {d_sae}, or raise d_sae; k is usually a hundredth of it.",
            )
    return parse_sae_config(values)


def _what_fits(cfg: SAEConfig, operation: TrainSAE, free: int) -> str:
    """Settings that would fit, found by halving."""
    hyperparameters = operation.hyperparameters
    for _ in range(12):
        half = max(hyperparameters.batch_size // 2, 1)
        hyperparameters = hyperparameters.model_copy(update={"batch_size": half, "buffer_tokens": max(half * 8, half)})
        if training_bytes(cfg, hyperparameters) <= free:
            return f"It fits with batch_size={half} and buffer_tokens={half * 8}."
    per_feature = max(training_bytes(cfg, hyperparameters) // cfg.d_sae, 1)
    return (
        f"Lower d_sae: about {max(free // per_feature, 0):,} features fit beside this model ({human_bytes(free)} free)."
    )


def _stem(operation: TrainSAE, cfg: SAEConfig) -> str:
    point = parse_hook(operation.hook_name)
    return slugify(f"{operation.model}-L{point.layer}-{cfg.architecture}-{cfg.d_sae}")


def _checkpoint_interval(operation: TrainSAE) -> int:
    hyperparameters = operation.hyperparameters
    return max(hyperparameters.batch_size, hyperparameters.n_tokens // CHECKPOINTS_PER_RUN)


@runs(TrainSAE, lane="compute", resumes="checkpoint")
def run_train_sae(operation: TrainSAE, engine: Engine, context: JobContext) -> Generator[Progress, Signal, SAERecord]:
    assert context.job.subject
    slug = context.job.subject.partition("/")[2]
    model = engine.store.get(ModelRecord, operation.model)
    # Those that it was planned with, or began with: by now the dataset may have others, too.
    known = engine.store.get(TrainingRecord, slug).tokens
    tokens = engine.store.get(TokensRecord, known) if known else _tokens_or_dataset(engine, operation)
    if isinstance(tokens, DatasetRecord):
        tokens = yield from tokenize(TokenizeDataset(dataset=tokens.slug, model=model.slug), engine)
    hyperparameters = operation.hyperparameters
    if hyperparameters.checkpoint_interval is None:
        hyperparameters = hyperparameters.model_copy(update={"checkpoint_interval": _checkpoint_interval(operation)})
    provenance = _provenance(operation, model, tokens)
    engine.store.update(TrainingRecord, slug, tokens=tokens.slug, provenance=provenance)

    def write_checkpoint(trainer: Trainer, stream: ActivationStream) -> None:
        save_checkpoint(root, trainer, stream)

    root = checkpoint_root(engine, slug)
    cfg = _config(operation, model, tokens)
    with language_model(engine, model.slug) as lm:
        check_fit(lm, operation.hook_name, cfg.d_in)
        with engine.memory.reserve(f"Training {slug}", training_bytes(cfg, hyperparameters), device=engine.device):
            stream = ActivationStream(
                lm,
                open_tokens(engine, tokens),
                operation.hook_name,
                batch_size=hyperparameters.batch_size,
                buffer_tokens=hyperparameters.buffer_tokens,
                seed=operation.seed,
                exclude_special=hyperparameters.exclude_special,
            )
            trainer = Trainer(cfg, hyperparameters, seed=operation.seed, device=engine.device)
            _go_on(trainer, stream, root, context)
            sae = yield from train(trainer, stream, checkpoint=write_checkpoint)
            density = trainer.density
    return _keep(engine, slug, sae, density, model, tokens, provenance)


def checkpoint_root(engine: Engine, training: str) -> Path:
    """Where a training's checkpoints lie."""
    return engine.home / "trainings" / training / "checkpoints"


def _go_on(trainer: Trainer, stream: ActivationStream, root: Path, context: JobContext) -> None:
    """Take the newest whole checkpoint of this job over; a job that begins anew leaves none behind."""
    if context.job.checkpoint is None:
        shutil.rmtree(root, ignore_errors=True)
        return
    latest = latest_good(root)
    for warning in latest.warnings:
        log.warning("%s: %s", context.job.ref, warning)
        context.publish(f"jobs/{context.job.slug}", "warning", {"message": warning})
    if latest.folder is not None:
        state = trainer.restore(latest.folder)
        if state is not None:
            stream.restore(state)


def _provenance(operation: TrainSAE, model: ModelRecord, tokens: TokensRecord) -> dict[str, Any]:
    """What is needed to make it again."""
    return {
        "mistudio": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "n_threads": torch.get_num_threads(),
        "seed": operation.seed,
        "model": {
            "source": model.source,
            "revision": model.revision,
            "precision": model.precision,
            "sha256": model.sha256,
        },
        "tokens": {"dataset": tokens.dataset, "sha256": tokens.sha256, "bos_policy": tokens.bos_policy},
    }


def _keep(
    engine: Engine,
    slug: str,
    sae: Any,
    density: Any,
    model: ModelRecord,
    tokens: TokensRecord,
    provenance: dict[str, Any],
) -> SAERecord:
    """Write the SAE's files and its record. Repeatable: a kill may come after the files and before the record."""
    folder = engine.home / "saes" / slug
    save_sae(sae, folder, sparsity=density, provenance=provenance, replace=True)
    record = SAERecord(
        slug=slug,
        source="trained",
        model=model.slug,
        hook_name=sae.cfg.hook_name or "",
        layer=parse_hook(sae.cfg.hook_name).layer,
        architecture=sae.cfg.architecture,
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        format="saelens",
        training=slug,
        tokens=tokens.slug,
        folder=str(folder.relative_to(engine.home)),
        sha256=sha256_folder(folder),
        config=sae.cfg.model_dump(mode="json"),
    )
    with engine.store.transaction():
        engine.store.put(record)
        engine.store.update(TrainingRecord, slug, saes=[record.slug])
    return record


def follow_trainings(engine: Engine) -> None:
    """Keep each training's record in step with its job."""

    def changed(job: Job) -> None:
        if job.operation != "train_sae" or not job.subject:
            return
        slug = job.subject.partition("/")[2]
        if not engine.store.exists(TrainingRecord, slug):
            return
        record = engine.store.get(TrainingRecord, slug)
        jobs = record.jobs if job.slug in record.jobs else [*record.jobs, job.slug]
        status = DOCUMENTS_STATES.get(job.state, job.state)
        engine.store.update(TrainingRecord, slug, status=status, jobs=jobs)

    engine.jobs.on_change(changed)


def _job_of(engine: Engine, training: str) -> Job:
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
    root = checkpoint_root(engine, record.slug)
    rows = []
    for folder in sorted(root.glob("step-*"), reverse=True):
        step = folder.name.removeprefix("step-")
        if not step.isdecimal():
            continue  # one that is just being written
        with suppress(FileNotFoundError):  # the training removes old ones meanwhile
            n_bytes = sum(file.stat().st_size for file in folder.iterdir())
            created_at = folder.stat().st_mtime
            rows.append(Checkpoint(name=folder.name, step=int(step), n_bytes=n_bytes, created_at=created_at))
    return CheckpointPage(rows=rows, total=len(rows), shown=len(rows))


@handles(StopTraining)
def stop_training(operation: StopTraining, engine: Engine) -> Job:
    return engine.jobs.control(_job_of(engine, operation.training).slug, "stop")


@handles(RetryTraining)
def retry_training(operation: RetryTraining, engine: Engine) -> Job:
    job = _job_of(engine, operation.training)
    if job.state == "completed":
        raise BadInput(
            f"training/{operation.training} is completed; there is nothing to retry.",
            fix="Start a new one with train_sae.",
        )
    return engine.jobs.control(job.slug, "retry")
