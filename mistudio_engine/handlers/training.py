"""Handlers that make SAEs of a training: train_sae plans and runs one, extend_training goes on with it.

What a call stands for is in training_plan.py, what it costs in training_cost.py, the run itself in training_run.py, and
what becomes of trainings in trainings.py.
"""

from __future__ import annotations

import itertools
import logging
import platform
import shutil
from collections.abc import Generator
from typing import Any

import torch
import transformers

from mistudio_engine import __version__
from mistudio_engine.api.errors import BadInput, Conflict, NotFound
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.datasets import TokenizeDataset
from mistudio_engine.api.operations.training import (
    ExtendTraining,
    TrainSAE,
)
from mistudio_engine.api.records import (
    DatasetRecord,
    Job,
    ModelRecord,
    SAERecord,
    TokensRecord,
    TrainingMember,
    TrainingRecord,
)
from mistudio_engine.handlers.datasets import tokenize
from mistudio_engine.handlers.registry import Planned, plans, runs
from mistudio_engine.handlers.resources import free_slug
from mistudio_engine.handlers.training_cost import cost
from mistudio_engine.handlers.training_plan import (
    Blueprint,
    blueprints,
    blueprints_of,
    hooks_of,
    promised_saes,
    stem,
    tokens_or_dataset,
)
from mistudio_engine.handlers.training_run import checkpoint_root, train_record
from mistudio_engine.handlers.trainings import job_of
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.training.checkpoints import checkpoints

log = logging.getLogger(__name__)

LONGEST_NAME = 120
"""Letters of a slug (api/refs.py)."""

UNFINISHED = (".part", ".old")
"""Endings of folders that are being written or replaced: the engine removes them when it starts."""


@plans(TrainSAE)
def plan_train_sae(operation: TrainSAE, engine: Engine) -> Planned:
    model = engine.store.get(ModelRecord, operation.model)
    tokens = tokens_or_dataset(engine, operation)
    members = blueprints(operation, model, tokens)
    first = members[0]
    plan = cost(engine, members, model, tokens, first.hp.n_steps * first.hp.batch_size, operation)
    # The SAE will have the training's name. No job's name is given out again: its metrics are found under it.
    slug = _free_slug(engine, operation.name or stem(operation, members), members, exact=operation.name is not None)
    summary = (
        f"Train {_kinds(members)} on {model.ref} {' and '.join(hooks_of(members))}: "
        f"{first.hp.n_steps:,} steps of {first.hp.batch_size:,} tokens."
    )

    def open_record() -> None:
        record = TrainingRecord(
            slug=slug,
            model=model.slug,
            tokens=tokens.slug if isinstance(tokens, TokensRecord) else "",
            hook_name=operation.hook_name,
            architecture=first.cfg.architecture,
            config=first.cfg.model_dump(mode="json"),
            hyperparameters=first.hp.model_dump(mode="json"),
            members=[
                TrainingMember(
                    name=each.name,
                    sae=_sae_slug(slug, each, members),
                    config=each.cfg.model_dump(mode="json"),
                    hyperparameters=each.hp.model_dump(mode="json"),
                    seed=each.seed,
                )
                for each in members
            ],
        )
        engine.store.insert(record)

    return Planned(plan.model_copy(update={"summary": summary}), subject=f"training/{slug}", open=open_record)


def _free_slug(engine: Engine, name: str, members: list[Blueprint], *, exact: bool) -> str:
    for each in (name, *(member.name for member in members)):
        if each.endswith(UNFINISHED):
            raise BadInput(f"{each!r} is what an unfinished folder is called.", fix="Choose another name.")
    slug = free_slug(engine, name, TrainingRecord, SAERecord, released=(), exact=exact)
    promised = promised_saes(engine)
    for each in members:
        sae = _sae_slug(slug, each, members)
        if len(sae) > LONGEST_NAME:
            raise BadInput(
                f"The SAE of variant {each.name} would be called {sae!r}, which is longer than {LONGEST_NAME} letters.",
                fix="Give the training or the variant a shorter name.",
            )
        free_slug(engine, sae, SAERecord, released=(), exact=True)
        if sae in promised:
            raise Conflict(
                f"The name {sae!r} is taken: {promised[sae]} makes an SAE of that name.",
                fix="Give the new one another name.",
            )
    return slug


def _sae_slug(training: str, member: Blueprint, members: list[Blueprint]) -> str:
    return training if len(members) == 1 else f"{training}-{member.name}"


def _kinds(members: list[Blueprint]) -> str:
    if len(members) > 1:
        return f"{len(members)} SAEs at once"
    cfg = members[0].cfg
    return f"a {cfg.architecture} SAE {cfg.d_in} → {cfg.d_sae}"


@plans(ExtendTraining)
def plan_extend_training(operation: ExtendTraining, engine: Engine) -> Planned:
    record = engine.store.get(TrainingRecord, operation.training)
    job = job_of(engine, record.slug)
    if not job.finished:
        raise Conflict(f"{record.ref} is {record.status}.", fix="Let it end, or stop it, before you extend it.")
    found = checkpoints(checkpoint_root(engine, record.slug))
    if not found:
        raise NotFound(
            f"{record.ref} has no checkpoint to go on from.", fix="Train anew with train_sae and more n_tokens."
        )
    model = engine.store.get(ModelRecord, record.model)
    tokens = engine.store.get(TokensRecord, record.tokens)
    done = found[0].step * record.hyperparameters["batch_size"]
    total = done + operation.n_tokens
    members = blueprints_of(record, n_tokens=total)
    plan = cost(engine, members, model, tokens, operation.n_tokens)
    summary = f"Go on with {record.ref} from step {found[0].step:,} for {operation.n_tokens:,} more tokens."

    def open_record() -> None:
        longer = [
            each.model_copy(
                update={
                    "hyperparameters": {**each.hyperparameters, "n_tokens": total},
                    "sae": _next_sae(engine, each.sae, record.slug),
                }
            )
            for each in record.members
        ]
        engine.store.update(TrainingRecord, record.slug, members=longer, hyperparameters=longer[0].hyperparameters)

    return Planned(plan.model_copy(update={"summary": summary}), subject=record.ref, open=open_record)


def _next_sae(engine: Engine, stem: str, training: str) -> str:
    """`stem`, or the first of `stem-2`, `stem-3`, … that no SAE has and no other training will give to one."""
    promised = promised_saes(engine)
    for slug in itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2))):
        is_ours = slug == training or not engine.store.exists(TrainingRecord, slug)
        if is_ours and slug not in promised.keys() - {stem} and not engine.store.exists(SAERecord, slug):
            return slug
    raise AssertionError("count() does not end")


@runs(TrainSAE, lane="compute", resumes="checkpoint")
def run_train_sae(operation: TrainSAE, engine: Engine, context: JobContext) -> Generator[Progress, Signal, SAERecord]:
    slug = _training_of(context.job)
    model = engine.store.get(ModelRecord, operation.model)
    # Those that it was planned with, or began with: by now the dataset may have others, too.
    record = engine.store.get(TrainingRecord, slug)
    if record.jobs and record.jobs[-1] != context.job.slug:
        raise Conflict(
            f"{record.ref} was extended since; begun anew it would lose what that has learnt.",
            fix="Extend it once more (extend_training), or train anew under another name.",
        )
    known = record.tokens
    tokens = engine.store.get(TokensRecord, known) if known else tokens_or_dataset(engine, operation)
    if isinstance(tokens, DatasetRecord):
        tokens = yield from tokenize(TokenizeDataset(dataset=tokens.slug, model=model.slug), engine)
    provenance = _provenance(operation, model, tokens, engine.device)
    if context.job.checkpoint is not None:
        _warn_of_changes(engine.store.get(TrainingRecord, slug), provenance, context)
    record = engine.store.update(TrainingRecord, slug, tokens=tokens.slug, provenance=provenance)
    if context.job.checkpoint is None:  # it begins, or begins anew: nothing half done may mislead it
        shutil.rmtree(checkpoint_root(engine, slug), ignore_errors=True)
    return (yield from train_record(engine, context, record, operation.seed))


@runs(ExtendTraining, lane="compute", resumes="checkpoint")
def run_extend_training(
    operation: ExtendTraining, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, SAERecord]:
    record = engine.store.get(TrainingRecord, operation.training)
    return (yield from train_record(engine, context, record, record.provenance["seed"]))


def _training_of(job: Job) -> str:
    assert job.subject
    return job.subject.partition("/")[2]


def _provenance(operation: TrainSAE, model: ModelRecord, tokens: TokensRecord, device: str) -> dict[str, Any]:
    """What is needed to make it again."""
    return {
        "mistudio": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
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


def _warn_of_changes(record: TrainingRecord, now: dict[str, Any], context: JobContext) -> None:
    """Say what is different since the checkpoint: later steps are right, but not bit for bit as they would be."""
    changed = [
        f"{name} was {record.provenance[name]} and is {now[name]}"
        for name in ("torch", "n_threads", "device", "machine", "cpu")
        if record.provenance.get(name, now[name]) != now[name]
    ]
    if changed:
        message = f"It goes on elsewhere than it began ({'; '.join(changed)}), so it will not be bit-identical."
        log.warning("%s: %s", context.job.ref, message)
        context.publish(f"jobs/{context.job.slug}", "warning", {"message": message})
