"""Handlers of api/operations/training.py: a training is planned, run with checkpoints, watched, extended and ended."""

from __future__ import annotations

import itertools
import logging
import math
import platform
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from mistudio_engine import __version__
from mistudio_engine.api.errors import BadInput, Conflict, CorruptFile, MistudioError, NotFound, WrongShape
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.datasets import Deleted, TokenizeDataset
from mistudio_engine.api.operations.training import (
    Checkpoint,
    CheckpointPage,
    DeletedTrainings,
    DeleteTraining,
    DeleteTrainings,
    ExtendTraining,
    KeepCheckpoint,
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
    Evaluation,
    Job,
    JobState,
    ModelRecord,
    Page,
    SAERecord,
    TokensRecord,
    TrainingRecord,
)
from mistudio_engine.api.sae_config import parse_sae_config
from mistudio_engine.api.training_config import Hyperparameters, buffer_bytes, training_bytes
from mistudio_engine.handlers.datasets import tokenize
from mistudio_engine.handlers.jobs import training_now
from mistudio_engine.handlers.models import remove_folder
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.resources import free_slug, language_model, open_tokens
from mistudio_engine.handlers.training_plan import (
    Blueprint,
    blueprints,
    cache_folder,
    cost,
    held_out,
    hooks_of,
    stem,
    tokens_or_dataset,
)
from mistudio_engine.models.hooks import hook_width, parse_hook
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import sha256_folder
from mistudio_engine.runtime.job_states import ACTIVE_STATES
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import SAE, save_sae
from mistudio_engine.saes.saelens import is_in_saelens
from mistudio_engine.training.activation_cache import CachedActivations, write_cache
from mistudio_engine.training.activations import ActivationStream, LiveActivations
from mistudio_engine.training.checkpoints import checkpoints, latest_good, restore_checkpoint, save_checkpoint
from mistudio_engine.training.evaluation import evaluate
from mistudio_engine.training.loop import Member, Stream, train
from mistudio_engine.training.trainer import Trainer

log = logging.getLogger(__name__)

DOCUMENTS_STATES = {"queued": "pending", "pausing": "running", "interrupted": "pending"}
"""Job states that the documents call otherwise."""

OPERATIONS = ("train_sae", "extend_training")
"""Those whose jobs a training has."""

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
                {
                    "name": each.name,
                    "sae": _sae_slug(slug, each, members),
                    "config": each.cfg.model_dump(mode="json"),
                    "hyperparameters": each.hp.model_dump(mode="json"),
                    "seed": each.seed,
                }
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
    promised = _promised(engine)
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


def _promised(engine: Engine) -> dict[str, str]:
    """Names of the SAEs that trainings make, whether or not they are there yet, and which training it is."""
    return {each["sae"]: record.ref for record in engine.store.all(TrainingRecord) for each in record.members}


def _next_sae(engine: Engine, stem: str, training: str) -> str:
    """`stem`, or the first of `stem-2`, `stem-3`, … that no SAE has and no other training will give to one."""
    promised = _promised(engine)
    for slug in itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2))):
        is_ours = slug == training or not engine.store.exists(TrainingRecord, slug)
        if is_ours and slug not in promised.keys() - {stem} and not engine.store.exists(SAERecord, slug):
            return slug
    raise AssertionError("count() does not end")


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
    job = _job_of(engine, record.slug)
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
    members = _members_of(record, n_tokens=total)
    plan = cost(engine, members, model, tokens, operation.n_tokens)
    summary = f"Go on with {record.ref} from step {found[0].step:,} for {operation.n_tokens:,} more tokens."

    def open_record() -> None:
        values = [
            {
                **each,
                "hyperparameters": {**each["hyperparameters"], "n_tokens": total},
                "sae": _next_sae(engine, each["sae"], record.slug),
            }
            for each in record.members
        ]
        engine.store.update(TrainingRecord, record.slug, members=values, hyperparameters=values[0]["hyperparameters"])

    return Planned(plan.model_copy(update={"summary": summary}), subject=record.ref, open=open_record)


def _members_of(record: TrainingRecord, n_tokens: int | None = None) -> list[Blueprint]:
    """What a training's record says it trains."""
    members = []
    for each in record.members:
        values = each["hyperparameters"] | ({} if n_tokens is None else {"n_tokens": n_tokens})
        members.append(
            Blueprint(each["name"], parse_sae_config(each["config"]), Hyperparameters(**values), each["seed"])
        )
    return members


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
    return (yield from _train(engine, context, record, operation.seed))


@runs(ExtendTraining, lane="compute", resumes="checkpoint")
def run_extend_training(
    operation: ExtendTraining, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, SAERecord]:
    record = engine.store.get(TrainingRecord, operation.training)
    return (yield from _train(engine, context, record, record.provenance["seed"]))


def _training_of(job: Job) -> str:
    assert job.subject
    return job.subject.partition("/")[2]


def _train(
    engine: Engine, context: JobContext, record: TrainingRecord, seed: int
) -> Generator[Progress, Signal, SAERecord]:
    """Train what a record says, from its newest whole checkpoint on, and keep the SAEs."""
    model = engine.store.get(ModelRecord, record.model)
    tokens_record = engine.store.get(TokensRecord, record.tokens)
    tokens = open_tokens(engine, tokens_record)
    plans = _members_of(record)
    hp, widths = plans[0].hp, hooks_of(plans)
    n_held_out = held_out(hp, len(tokens), tokens.info.context_size)
    n_bytes = buffer_bytes(hp, widths.values()) + sum(training_bytes(each.cfg, each.hp) for each in plans)
    with language_model(engine, model.slug) as lm:
        for hook, width in widths.items():
            _check_width(lm, hook, width)
        folder = cache_folder(engine, tokens_record, list(widths), hp)
        if hp.activations == "cached" and not folder.exists():
            yield from _cached(lm, tokens, list(widths), folder, hp, model)
        usable = partial(_cache_is_named, folder) if hp.activations == "cached" else nullcontext
        with engine.memory.reserve(f"Training {record.slug}", n_bytes, device=engine.device), usable():
            n_contexts = len(tokens) - n_held_out
            source = (
                CachedActivations(
                    folder, tokens, list(widths), n_contexts, model_sha256=model.sha256, device=engine.device
                )
                if hp.activations == "cached"
                else LiveActivations(lm, tokens, list(widths), n_contexts)
            )
            stream = ActivationStream(
                source,
                list(widths),
                batch_size=hp.batch_size,
                buffer_tokens=hp.buffer_tokens,
                seed=seed,
                exclude_special=hp.exclude_special,
            )
            members = [
                Member(
                    each.name,
                    Trainer(each.cfg, each.hp, seed=each.seed, device=engine.device),
                    each.cfg.hook_name or "",
                    each.cfg.hook_name_out,
                )
                for each in plans
            ]
            keeper = _Keeper(engine, context, record.slug, lm, tokens, n_held_out)
            keeper.go_on(members, stream)
            started, before = time.monotonic(), _n_tokens(members)
            saes = yield from keeper.watched(train(members, stream, checkpoint=keeper.checkpoint), members)
            n_tokens, seconds = _n_tokens(members) - before, time.monotonic() - started
            densities = {member.name: member.trainer.density for member in members}
    if n_tokens:
        engine.store.update(TrainingRecord, record.slug, tokens_per_second=n_tokens / max(seconds, 1e-9))
    kept = []
    for each in record.members:
        if each["name"] in saes:
            density = densities[each["name"]]
            kept.append(_keep(engine, record, each["sae"], saes[each["name"]], density))
            yield Progress(stage="saving")
    return kept[0]


def _n_tokens(members: Sequence[Member]) -> int:
    """Tokens trained on; a member that failed stands still."""
    return max(member.trainer.n_tokens_done for member in members)


def _check_width(lm: LanguageModel, hook: str, width: int) -> None:
    """As check_fit, for somebody who has no SAE yet."""
    if hook_width(lm, hook) != width:
        raise WrongShape(
            f"{hook} of {lm.name} is {hook_width(lm, hook)} wide, and the SAE was to have {width}.",
            fix=f"Set d_in={hook_width(lm, hook)}.",
        )


def _cached(
    lm: LanguageModel, tokens: PackedTokens, hooks: list[str], folder: Path, hp: Hyperparameters, model: ModelRecord
) -> Generator[Progress, Signal, None]:
    """Write the activations to disk; it goes on where an earlier attempt was cut off."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing = write_cache(lm, tokens, hooks, folder, dtype=hp.cache_dtype, model_sha256=model.sha256)
    with suppress(StopIteration):
        progress = next(writing)
        while True:
            signal = yield progress
            # A smaller cache than was asked for would train on less text than was asked for.
            progress = writing.send(Signal.GO if signal is Signal.STOP else signal)


@contextmanager
def _cache_is_named(folder: Path) -> Iterator[None]:
    """Errors of the cache, with what can be done about them from outside."""
    try:
        yield
    except (BadInput, CorruptFile, NotFound) as error:
        if folder.name not in error.what:
            raise
        raise type(error)(
            error.what,
            why=error.why,
            fix=f"Delete the folder {folder}: the next training with activations='cached' writes it anew. "
            "Or train with activations='live'.",
        ) from error


class _Keeper:
    """Checkpoints of one training: evaluated, written, found again; and its warnings, passed on."""

    def __init__(
        self,
        engine: Engine,
        context: JobContext,
        training: str,
        lm: LanguageModel,
        tokens: PackedTokens,
        n_held_out: int,
    ) -> None:
        self.engine, self.context, self.training = engine, context, training
        self.lm, self.tokens, self.n_held_out = lm, tokens, n_held_out
        self.root = checkpoint_root(engine, training)
        self.noted: dict[str, Any] = {}
        """Failures as the training's record has them."""

    def go_on(self, members: Sequence[Member], stream: ActivationStream) -> None:
        """Take the newest whole checkpoint over, if there is one."""
        latest = latest_good(self.root)
        for warning in latest.warnings:
            self._warn(warning)
        if latest.folder is not None:
            stream.restore(restore_checkpoint(latest.folder, members))

    def checkpoint(
        self, members: Sequence[Member], stream: Stream, urgent: bool
    ) -> Generator[Progress, Signal | None, None]:
        """Evaluate, unless somebody waits, and write."""
        hp = members[0].trainer.hp
        if hp.evaluated_tokens and not urgent:
            for member in members:
                if member.failure is None:
                    yield from self._evaluate(member, stream, len(members) > 1)
        scores = [member.trainer.take_score() for member in members if member.failure is None]
        known = [score for score in scores if score is not None]
        score = sum(known) / len(known) if len(known) == len(scores) and known else None
        save_checkpoint(self.root, members, stream, keep=hp.keep_checkpoints, score=score)

    def _evaluate(
        self, member: Member, stream: Stream, is_one_of_many: bool
    ) -> Generator[Progress, Signal | None, None]:
        """Measure an SAE as it stands on held-out text."""
        n_contexts = self.n_held_out or math.ceil(member.trainer.hp.evaluated_tokens / self.tokens.info.context_size)
        work = evaluate(
            self.lm,
            member.finished_sae(stream),
            self.tokens,
            hook_name=member.hook_name,
            n_tokens=member.trainer.hp.evaluated_tokens,
            contexts=slice(max(len(self.tokens) - n_contexts, 0), len(self.tokens)),
        )
        try:
            while True:
                if (yield next(work)) in (Signal.CHECKPOINT, Signal.STOP):
                    work.close()
                    return
        except StopIteration as end:
            measured: Evaluation = end.value
        values = {name: float(value) for name, value in measured.model_dump().items() if isinstance(value, int | float)}
        prefix = f"{member.name}/eval/" if is_one_of_many else "eval/"
        self.context.publish(
            f"trainings/{self.training}",
            "evaluation",
            {
                "member": member.name,
                "step": member.trainer.n_steps_done,
                "evaluation": measured.model_dump(mode="json"),
            },
        )
        yield Progress(stage="evaluated", metrics={prefix + name: value for name, value in values.items()})

    def watched(
        self, work: Generator[Progress, Signal | None, dict[str, SAE]], members: Sequence[Member]
    ) -> Generator[Progress, Signal, dict[str, SAE]]:
        """`work`, with the trainers' warnings passed on as they come."""
        signal: Signal | None = None
        foretold = {member.name for member in members if member.trainer.prepared}  # it was resumed
        try:
            while True:
                try:
                    progress = work.send(signal)
                finally:
                    for member in members:
                        while member.trainer.warnings:
                            self._warn(member.trainer.warnings.pop(0))
                    self._note_failures(members)
                for member in members:
                    if member.trainer.forecast is not None and member.name not in foretold:
                        foretold.add(member.name)
                        forecast = {"member": member.name, **member.trainer.forecast._asdict()}
                        self.context.publish(f"trainings/{self.training}", "forecast", forecast)
                signal = yield progress
        except StopIteration as end:
            return end.value
        finally:
            work.close()

    def _note_failures(self, members: Sequence[Member]) -> None:
        """Say in the training's record which of its SAEs go on no further, and why."""
        failures = {member.name: member.failure.body.model_dump() if member.failure else None for member in members}
        if failures == self.noted:
            return
        known = self.engine.store.get(TrainingRecord, self.training).members
        values = [{**each, "failure": failures[each["name"]]} for each in known]
        self.engine.store.update(TrainingRecord, self.training, members=values)
        self.noted = failures

    def _warn(self, message: str) -> None:
        log.warning("%s: %s", self.context.job.ref, message)
        self.context.publish(f"jobs/{self.context.job.slug}", "warning", {"message": message})


def checkpoint_root(engine: Engine, training: str) -> Path:
    """Where a training's checkpoints lie."""
    return engine.home / "trainings" / training / "checkpoints"


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


def _keep(engine: Engine, training: TrainingRecord, slug: str, sae: SAE, density: Any) -> SAERecord:
    """Write an SAE's files and its record. Repeatable: a kill may come after the files and before the record."""
    folder = engine.home / "saes" / slug
    form = "saelens" if is_in_saelens(sae.cfg.architecture) else "native"
    save_sae(sae, folder, format=form, sparsity=density, provenance=training.provenance, replace=True)
    record = SAERecord(
        slug=slug,
        source="trained",
        model=training.model,
        hook_name=sae.cfg.hook_name or "",
        layer=parse_hook(sae.cfg.hook_name or "").layer,
        architecture=sae.cfg.architecture,
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        format=form,
        training=training.slug,
        tokens=training.tokens,
        folder=str(folder.relative_to(engine.home)),
        sha256=sha256_folder(folder),
        config=sae.cfg.model_dump(mode="json"),
    )
    with engine.store.transaction():
        engine.store.put(record)
        made = [each for each in engine.store.get(TrainingRecord, training.slug).saes if each != slug]
        engine.store.update(TrainingRecord, training.slug, saes=[*made, slug])
    return record


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
    plans = _members_of(record)
    tokens = engine.store.get(TokensRecord, record.tokens)
    folder = cache_folder(engine, tokens, list(hooks_of(plans)), plans[0].hp)
    shutil.rmtree(folder.with_name(f"{folder.name}.part"), ignore_errors=True)


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
    plans = {each.name: each for each in _members_of(record)}
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
    if slug in (promised := _promised(engine)):
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
    return _keep(engine, record, slug, sae, density)


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
