"""Handlers of api/operations/steering.py: a model is steered along features and compared with itself.

Steering runs on the interactive lane, a token a step, so it shares the card with a training. Comparisons and sweeps are
kept as experiments that can be repeated. How an intervention acts and how its effect is measured is not known here.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from mistudio_engine.api.errors import BadInput, NotFound, WrongShape
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.steering import Generate, Steer, Sweep
from mistudio_engine.api.records import ExperimentRecord, ExtractionRecord, ModelRecord, Plan, SAERecord
from mistudio_engine.api.refs import feature_of
from mistudio_engine.api.steering import (
    Completion,
    ConceptProbability,
    Generated,
    Intervention,
    SteerResult,
    SweepResult,
    SweepRow,
)
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.registry import Planned, plans, runs
from mistudio_engine.handlers.relay import relay
from mistudio_engine.handlers.resources import fitting_model, language_model, open_tokens, sparse_autoencoder, tokens_of
from mistudio_engine.models.hooks import activations
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import SAE
from mistudio_engine.steering import interventions as science
from mistudio_engine.steering.calibration import length_of, typical_norm
from mistudio_engine.steering.comparison import Arm, compare, sweep
from mistudio_engine.steering.controls import control_for
from mistudio_engine.steering.generation import Generation, generate
from mistudio_engine.steering.sampling import Sampling

NORM_CONTEXTS = 8
"""Contexts on which a layer's typical norm is measured: about a thousand tokens, of which the median is taken."""

PLAIN_FACTORS = ("suppress", "orthogonal", "ablate")
"""Methods whose strength is a factor and has no unit; `ablate` does not even look at it."""


def _plan(engine: Engine, model: str | None, steering: Sequence[Intervention], summary: str) -> Planned:
    """Check every feature against its SAE and the model before anything is queued."""
    slug = _model_slug(engine, model, steering)
    for each in steering:
        key = feature_of(each.feature)
        sae = engine.store.get(SAERecord, key.sae)
        with Knowledge(engine, sae) as known:
            known.check_index(key.index)
            if (
                each.unit == "max_act"
                and each.method not in PLAIN_FACTORS
                and not known.extraction.feature(key.index).max
            ):
                raise BadInput(
                    f"{key.ref} never fired in its extraction, so it has no maximum activation to count in.",
                    fix="Choose a living feature, or give the strength in unit='norm' or 'raw'.",
                )
        _fits(engine, sae, model)
        if model is None and fitting_model(engine, sae).slug != slug:
            raise BadInput(
                f"{sae.ref} reads model/{sae.model}, and the first feature's SAE reads model/{slug}.",
                fix="Steer with features of one model, or name the model if these two stand for the same one.",
            )
    record = engine.store.get(ModelRecord, slug)
    return Planned(Plan(summary=summary.format(model=record.ref), memory_bytes=record.n_bytes), subject=record.ref)


def _fits(engine: Engine, sae: SAERecord, model: str | None) -> None:
    found = fitting_model(engine, sae, model)
    if model is not None and sae.model != found.slug and sae.d_in != found.d_model:
        raise WrongShape(
            f"{sae.ref} reads {sae.d_in} numbers and {found.ref} has {found.d_model}.", fix="Use the SAE's own model."
        )


def _model_slug(engine: Engine, model: str | None, steering: Sequence[Intervention]) -> str:
    if model is not None:
        return model
    if not steering:
        raise BadInput("There is neither a model nor a feature.", fix="Give model.")
    sae = engine.store.get(SAERecord, feature_of(steering[0].feature).sae)
    return fitting_model(engine, sae).slug


class _Steering:
    """Interventions made ready: features looked up, strengths made into lengths."""

    def __init__(self, engine: Engine, lm: LanguageModel) -> None:
        self.engine, self.lm = engine, lm
        self.norms: dict[str, float] = {}

    def make(self, asked: Intervention, sae: SAE) -> science.Intervention:
        """The intervention that was asked for, with its strength as a length."""
        key = feature_of(asked.feature)
        record = self.engine.store.get(SAERecord, key.sae)
        return science.Intervention.of_feature(
            sae,
            key.index,
            self.length(asked, record, sae),
            method=asked.method,
            positions=asked.positions,
            hook_name=sae.cfg.hook_name_out or record.hook_name,
        )

    def length(self, asked: Intervention, record: SAERecord, sae: SAE) -> float:
        """The strength as a length in the residual stream; a plain factor stays one."""
        if asked.method in PLAIN_FACTORS:
            return asked.strength
        key = feature_of(asked.feature)
        _, decoder_norm = science.feature_direction(sae, key.index)
        max_act = norm = None
        if asked.unit == "max_act":
            with Knowledge(self.engine, record) as known:
                max_act = known.extraction.feature(key.index).max
        elif asked.unit == "norm":
            norm = self._typical_norm(record, sae.cfg.hook_name_out or record.hook_name)
        return length_of(asked.strength, asked.unit, max_act, norm, decoder_norm=decoder_norm)

    def _typical_norm(self, record: SAERecord, hook_name: str) -> float:
        """The median norm where the SAE writes, on the text that it was trained on, or else extracted on."""
        if hook_name not in self.norms:
            if record.tokens is None and record.extraction is not None:
                extraction = self.engine.store.get(ExtractionRecord, record.extraction)
                record = record.model_copy(update={"tokens": extraction.tokens})
            try:
                tokens = open_tokens(self.engine, tokens_of(self.engine, None, record))
            except NotFound as error:
                error.fix = "Give the strength in unit='max_act' or 'raw', or extract the SAE on a dataset first."
                raise
            rows = slice(0, NORM_CONTEXTS)
            ids = tokens.ids[rows].long()
            seen = activations(self.lm, ids, [hook_name])[hook_name]
            self.norms[hook_name] = typical_norm(seen, tokens.mask(rows, special=False).to(seen.device))
        return self.norms[hook_name]


def _sampling(operation: Any) -> Sampling:
    return Sampling(
        max_new_tokens=operation.max_new_tokens,
        temperature=operation.temperature,
        top_k=getattr(operation, "top_k", 0),
        top_p=getattr(operation, "top_p", 1.0),
        repetition_penalty=getattr(operation, "repetition_penalty", 1.0),
        stop_sequences=tuple(getattr(operation, "stop", ())),
        seed=operation.seed,
        n=getattr(operation, "n", 1),
    )


def _token_ids(lm: LanguageModel, tokens: Sequence[str]) -> list[int]:
    """The ids of the tokens named, by how they read or by how they are encoded.

    Raises:
        BadInput: a text is more than one token of this model.
    """
    vocabulary = lm.tokenizer.get_vocab()
    by_string = {
        string: each
        for string, each in zip(lm.token_strings(list(vocabulary.values())), vocabulary.values(), strict=True)
    }
    ids = []
    for token in tokens:
        if token in by_string:
            ids.append(by_string[token])
            continue
        encoded = lm.encode(token, bos=False)
        if len(encoded) != 1:
            raise BadInput(
                f"{token!r} is {len(encoded)} tokens of {lm.name}, not one.",
                why=f"It reads {lm.token_strings(encoded)}.",
                fix="Give tokens as the tokenizer has them; a leading space belongs to the token.",
            )
        ids.append(encoded[0])
    return ids


def _completion(
    lm: LanguageModel, generation: Generation, perplexity: float | None, repetition: float | None
) -> Completion:
    return Completion(
        text=generation.text,
        tokens=lm.token_strings(generation.token_ids),
        n_tokens=len(generation.token_ids),
        finish_reason=generation.finish_reason,
        perplexity=perplexity,
        repetition=repetition,
    )


def _completions(lm: LanguageModel, arm: Arm) -> list[Completion]:
    measured = zip(arm.generations, arm.perplexity, arm.repetition, strict=True)
    return [_completion(lm, generation, perplexity, repetition) for generation, perplexity, repetition in measured]


def _passed_on(work: Any, context: JobContext) -> Generator[Progress, Signal, Any]:
    """A generation's steps as a job's progress, and its tokens as transient events."""
    numbers = itertools.count()

    def say(step: Any) -> Progress:
        if step.pieces:
            data = {"index": next(numbers), "pieces": list(step.pieces), "token_ids": list(step.token_ids)}
            context.publish(f"jobs/{context.job.slug}", "tokens", data, transient=True)
        return Progress(stage=step.stage, fraction=min(1.0, (step.index + 1) / max(step.n_steps, 1)))

    return relay(work, say)


@contextmanager
def _prepared(
    engine: Engine, model: str, asked: Sequence[Intervention]
) -> Iterator[tuple[LanguageModel, list[science.Intervention]]]:
    """The model and the interventions, everything pinned while the block runs."""
    with ExitStack() as stack:
        lm = stack.enter_context(language_model(engine, model))
        slugs = dict.fromkeys(feature_of(each.feature).sae for each in asked)
        opened = {slug: stack.enter_context(sparse_autoencoder(engine, slug)) for slug in slugs}
        steering = _Steering(engine, lm)
        yield lm, [steering.make(each, opened[feature_of(each.feature).sae]) for each in asked]


@plans(Generate)
def plan_generate(operation: Generate, engine: Engine) -> Planned:
    return _plan(engine, operation.model, operation.interventions, "Generate with {model}.")


@runs(Generate, lane="interactive", resumes="never")
def run_generate(operation: Generate, engine: Engine, context: JobContext) -> Generator[Progress, Signal, Generated]:
    with _prepared(engine, operation.model, operation.interventions) as (lm, made):
        work = generate(lm, operation.prompt, interventions=made, sampling=_sampling(operation))
        generations = yield from _passed_on(work, context)
        return Generated(
            model=operation.model,
            prompt=operation.prompt,
            completions=[_completion(lm, each, None, None) for each in generations],
            lengths=[float(each.strengths[0] or 0.0) for each in made],
        )


@plans(Steer)
def plan_steer(operation: Steer, engine: Engine) -> Planned:
    return _plan(engine, operation.model, operation.interventions, "Steer {model} and compare.")


@runs(Steer, lane="interactive", resumes="never")
def run_steer(operation: Steer, engine: Engine, context: JobContext) -> Generator[Progress, Signal, SteerResult]:
    model = _model_slug(engine, operation.model, operation.interventions)
    with _prepared(engine, model, operation.interventions) as (lm, made):
        concept = _token_ids(lm, operation.concept_tokens)
        own = {each.feature for each in made if each.feature is not None}
        # A seed each: several interventions with one control feature would add up along one direction.
        seeds = range(operation.seed, operation.seed + len(made))
        control = [control_for(*pair, exclude=own) for pair in zip(made, seeds, strict=True)] if concept else []
        work = compare(lm, operation.prompt, made, control=control, concept_ids=concept, sampling=_sampling(operation))
        found = yield from _passed_on(work, context)
        result = SteerResult(
            model=model,
            prompt=operation.prompt,
            baseline=_completions(lm, found.baseline),
            steered=_completions(lm, found.steered),
            lengths=[float(each.strengths[0] or 0.0) for each in made],
            kl_from_baseline=found.steered.kl_from_baseline,
            activation_reached=list(found.steered.activation_reached),
            probability=_probability(operation, found),
            warnings=_warnings(found.baseline, found.steered),
        )
    return _keep(engine, model, operation, result)


def _probability(operation: Steer, found: Any) -> ConceptProbability | None:
    if found.baseline.concept_probability is None:
        return None
    return ConceptProbability(
        tokens=operation.concept_tokens,
        before=found.baseline.concept_probability,
        after=found.steered.concept_probability,
        control=found.control.concept_probability if found.control else None,
    )


def _warnings(baseline: Arm, steered: Arm) -> list[str]:
    """What speaks against taking the steered text at face value."""
    warnings = []
    before, after = _mean(baseline.perplexity), _mean(steered.perplexity)
    if after > 2 * before:
        warnings.append(f"The perplexity rose from {before:.3g} to {after:.3g}: the strength may be too high.")
    if _mean(steered.repetition) > _mean(baseline.repetition) + 0.3:
        warnings.append("The steered text repeats itself: lower the strength or raise the repetition_penalty.")
    if steered.kl_from_baseline < 1e-4:
        warnings.append("Steering changed almost nothing: raise the strength, or take another feature.")
    return warnings


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _keep(engine: Engine, model: str, operation: Steer | Sweep, result: Any) -> Any:
    """Keep a run with its operation, so that it can be repeated."""
    slug = engine.store.numbered_slug(ExperimentRecord, operation.tool)
    # Its template's arguments are among its own by now, and the template may be another one when it is repeated.
    arguments = operation.model_dump(mode="json", exclude_defaults=True, exclude={"template"})
    asked = {"tool": operation.tool, "arguments": arguments}
    if isinstance(result, SteerResult):
        result = result.model_copy(update={"experiment": f"experiment/{slug}"})
    engine.store.insert(
        ExperimentRecord(slug=slug, model=model, operation=asked, result=result.model_dump(mode="json"))
    )
    return result


@plans(Sweep)
def plan_sweep(operation: Sweep, engine: Engine) -> Planned:
    asked = [Intervention(feature=operation.feature)]
    return _plan(engine, operation.model, asked, "Sweep " + str(len(operation.strengths)) + " strengths with {model}.")


@runs(Sweep, lane="interactive", resumes="never")
def run_sweep(operation: Sweep, engine: Engine, context: JobContext) -> Generator[Progress, Signal, SweepResult]:
    asked = [Intervention(feature=operation.feature)]
    model = _model_slug(engine, operation.model, asked)
    with _prepared(engine, model, asked) as (lm, (unit,)):
        length = float(unit.strengths[0] or 0.0)  # of strength 1
        concept = _token_ids(lm, operation.concept_tokens)
        lengths = [strength * length for strength in operation.strengths]
        work = sweep(lm, operation.prompt, unit, lengths, concept_ids=concept, sampling=_sampling(operation))
        found = yield from _passed_on(work, context)
        arms = [(0.0, 0.0, found.baseline), *zip(operation.strengths, lengths, found.steered, strict=True)]
        result = SweepResult(
            model=model,
            prompt=operation.prompt,
            feature=operation.feature,
            rows=[
                SweepRow(
                    strength=strength,
                    length=added,
                    completion=_completions(lm, arm)[0],
                    kl_from_baseline=arm.kl_from_baseline,
                    probability=arm.concept_probability,
                )
                for strength, added, arm in arms
            ],
        )
    return _keep(engine, model, operation, result)
