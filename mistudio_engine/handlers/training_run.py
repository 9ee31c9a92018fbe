"""The run of a training that a record describes: from its newest whole checkpoint to SAEs on disk.

It knows no operation: training.py says what is trained, and begins or goes on with it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from mistudio_engine.api.errors import BadInput, CorruptFile, NotFound, WrongShape
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.records import (
    Evaluation,
    ModelRecord,
    SAERecord,
    TokensRecord,
    TrainingRecord,
)
from mistudio_engine.api.training_config import Hyperparameters, buffer_bytes, training_bytes
from mistudio_engine.handlers.resources import language_model, open_tokens
from mistudio_engine.handlers.training_plan import blueprints_of, cache_folder, held_out, hooks_of
from mistudio_engine.models.hooks import hook_width, parse_hook
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import sha256_folder
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import SAE, format_for, save_sae
from mistudio_engine.training.activation_cache import CachedActivations, write_cache
from mistudio_engine.training.activations import ActivationStream, LiveActivations
from mistudio_engine.training.checkpoints import latest_good, restore_checkpoint, save_checkpoint
from mistudio_engine.training.evaluation import evaluate
from mistudio_engine.training.loop import Member, Stream, train
from mistudio_engine.training.trainer import Trainer

__all__ = ["checkpoint_root", "keep_sae", "train_record"]

log = logging.getLogger(__name__)


def train_record(
    engine: Engine, context: JobContext, record: TrainingRecord, seed: int
) -> Generator[Progress, Signal, SAERecord]:
    """Train what a record says, from its newest whole checkpoint on, and keep the SAEs."""
    model = engine.store.get(ModelRecord, record.model)
    tokens_record = engine.store.get(TokensRecord, record.tokens)
    tokens = open_tokens(engine, tokens_record)
    plans = blueprints_of(record)
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
        if each.name in saes:
            kept.append(keep_sae(engine, record, each.sae, saes[each.name], densities[each.name]))
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
        failures = {member.name: member.failure.body if member.failure else None for member in members}
        if failures == self.noted:
            return
        known = self.engine.store.get(TrainingRecord, self.training).members
        values = [each.model_copy(update={"failure": failures[each.name]}) for each in known]
        self.engine.store.update(TrainingRecord, self.training, members=values)
        self.noted = failures

    def _warn(self, message: str) -> None:
        log.warning("%s: %s", self.context.job.ref, message)
        self.context.publish(f"jobs/{self.context.job.slug}", "warning", {"message": message})


def keep_sae(engine: Engine, training: TrainingRecord, slug: str, sae: SAE, density: Any) -> SAERecord:
    """Write an SAE's files and its record. Repeatable: a kill may come after the files and before the record."""
    folder = engine.home / "saes" / slug
    form = format_for(sae.cfg.architecture)
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


def checkpoint_root(engine: Engine, training: str) -> Path:
    """Where a training's checkpoints lie."""
    return engine.home / "trainings" / training / "checkpoints"
