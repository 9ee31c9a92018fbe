"""Steered beside unsteered: all arms and the baseline generated in one batch with common random numbers, then measured.

An arm is a way of steering: the baseline, a strength, a control. Arms are compared on the baseline's own text, read
again under each arm, so that all of them see the same words; what an arm wrote itself is judged by the unsteered model.
It does not decide what a good strength is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.steering.batch import Batch
from mistudio_engine.steering.generation import (
    Generation,
    Prompt,
    TokenStep,
    check_token_ids,
    generate,
    prompt_ids,
)
from mistudio_engine.steering.interventions import Intervention, check
from mistudio_engine.steering.metrics import kl_divergence, perplexity, probability_of, repetition
from mistudio_engine.steering.sampling import Sampling

__all__ = ["Arm", "Comparison", "Effect", "SweepTable", "compare", "concept_probability", "sweep"]

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Arm:
    """What one way of steering wrote, and its measures."""

    strength: float | None
    """A sweep's strength, as a length; None for the baseline and for a combination."""

    generations: tuple[Generation, ...]
    """One a sample; the same sample of every arm used the same random numbers."""

    perplexity: tuple[float, ...]
    """Of each continuation under the unsteered model."""

    repetition: tuple[float, ...]
    """Share of 3-grams of each continuation that occurred before."""

    kl_from_baseline: float
    """Mean KL(arm ‖ baseline) per token over the baseline's continuations, in nats; 0 for the baseline."""

    concept_probability: float | None
    """Mean probability over the same positions that the next token is one of the concept's; None without a concept."""

    activation_reached: tuple[float | None, ...]
    """For each of the arm's interventions, the feature's highest activation on the tokens that the arm wrote, as the
    SAE gives it; None where no SAE measures."""


@dataclass(frozen=True)
class Comparison:
    """The answer of `compare`."""

    baseline: Arm
    steered: Arm
    control: Arm | None


@dataclass(frozen=True)
class SweepTable:
    """The answer of `sweep`: an arm per strength, in the order given."""

    baseline: Arm
    steered: tuple[Arm, ...]
    controls: tuple[Arm, ...]
    """The control at the same strengths; empty without one."""


@dataclass(frozen=True)
class Effect:
    """Probability of a concept as the next token of each prompt, before and after steering."""

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def mean_before(self) -> float:
        return fmean(self.before)

    @property
    def mean_after(self) -> float:
        return fmean(self.after)

    @property
    def ratio(self) -> float:
        """How many times more probable on average; infinite where it was impossible before."""
        return self.mean_after / self.mean_before if self.mean_before else float("inf")


def compare(
    lm: LanguageModel,
    prompt: Prompt,
    interventions: Sequence[Intervention],
    *,
    control: Sequence[Intervention] = (),
    concept_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    bos: bool = True,
) -> Generator[TokenStep, None, Comparison]:
    """Continue a prompt unsteered and with all interventions at once.

    Args:
        interventions: each with one strength.
        control: what to compare with beside the baseline, such as `controls.control_for` of each intervention.
        concept_ids: tokens whose probability to measure.

    Raises:
        BadInput: nothing to compare, or strengths per row; and all that `generate` raises.
    """
    if not interventions:
        raise BadInput("There is nothing to compare: no interventions.", fix="Give at least one intervention.")
    arms = [(), tuple(interventions), *([tuple(control)] if control else [])]
    rows = [
        it.on_rows([_one_strength(it) if arm == own else None for arm in range(len(arms))])
        for own, its in enumerate(arms)
        for it in its
    ]
    work = _arms(lm, prompt, rows, [None] * len(arms), concept_ids, sampling, bos)
    return _then(work, lambda done: Comparison(done[0], done[1], done[2] if control else None))


def sweep(
    lm: LanguageModel,
    prompt: Prompt,
    intervention: Intervention,
    strengths: Sequence[float],
    *,
    control: Intervention | None = None,
    concept_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    bos: bool = True,
) -> Generator[TokenStep, None, SweepTable]:
    """Continue a prompt unsteered and at every strength, all in one batch.

    Args:
        intervention: what to vary; its own strength is not used.
        strengths: lengths, in any order.
        control: the same strengths of this too, such as `controls.control_for(intervention)`.
        concept_ids: tokens whose probability to measure.

    Raises:
        BadInput: nothing to sweep; and all that `generate` raises.
    """
    if not strengths:
        raise BadInput("There is nothing to sweep: no strengths.", fix="Give at least one strength.")
    n = len(strengths)
    none, again = [None] * n, n if control else 0
    rows = [intervention.on_rows([None, *strengths, *none[:again]])]
    rows += [control.on_rows([None, *none, *strengths])] if control else []
    work = _arms(lm, prompt, rows, [None, *strengths, *strengths[:again]], concept_ids, sampling, bos)
    return _then(work, lambda done: SweepTable(done[0], tuple(done[1 : n + 1]), tuple(done[n + 1 :])))


def concept_probability(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    token_ids: Sequence[int],
    interventions: Sequence[Intervention],
    *,
    bos: bool = True,
) -> Effect:
    """Probability that each prompt's next token is one of token_ids, unsteered and steered, in one forward pass.

    Interventions have one strength each and act on `all`, `prompt` or `last`: nothing is generated here.
    """
    check_token_ids(lm, token_ids)
    ids = [prompt_ids(lm, p, bos=bos) for p in prompts for _ in range(2)]
    rows = [it.on_rows([None, _one_strength(it)] * len(prompts)) for it in interventions]
    check(lm, rows, len(ids))
    batch = Batch(lm, ids, cache=False)
    found = [probability_of(logits, token_ids) for logits in batch.read(batch.prompt_width, rows)]
    return Effect(tuple(found[0::2]), tuple(found[1::2]))


def _one_strength(it: Intervention) -> float:
    if len(it.strengths) != 1 or it.strengths[0] is None:
        raise BadInput(
            f"An intervention to compare has one strength, this one has {it.strengths}.",
            fix="Give one number; sweep compares several.",
        )
    return it.strengths[0]


def _then(work: Generator[TokenStep, None, A], finish: Callable[[A], B]) -> Generator[TokenStep, None, B]:
    return finish((yield from work))


def _arms(
    lm: LanguageModel,
    prompt: Prompt,
    interventions: Sequence[Intervention],
    strengths: Sequence[float | None],
    concept_ids: Sequence[int],
    sampling: Sampling | None,
    bos: bool,
) -> Generator[TokenStep, None, list[Arm]]:
    """Arm a is the interventions' strengths at row a; arm 0 is the baseline. Raises at once, works when asked."""
    check_token_ids(lm, concept_ids)
    n_arms = len(strengths)
    ids = prompt_ids(lm, prompt, bos=bos)
    writing = generate(lm, [ids] * n_arms, interventions=interventions, sampling=sampling)
    return _write_and_measure(lm, writing, interventions, strengths, concept_ids)


def _write_and_measure(
    lm: LanguageModel,
    writing: Generator[TokenStep, None, list[Generation]],
    interventions: Sequence[Intervention],
    strengths: Sequence[float | None],
    concept_ids: Sequence[int],
) -> Generator[TokenStep, None, list[Arm]]:
    generations = yield from writing
    n_arms, n = len(strengths), len(generations) // len(strengths)
    texts = [generations[arm * n : (arm + 1) * n] for arm in range(n_arms)]
    steering = [[it for row in interventions if (it := row.row(arm))] for arm in range(n_arms)]
    kl = [[0.0] * n for _ in range(n_arms)]
    concept = [[0.0] * n for _ in range(n_arms)]
    ppl = [[0.0] * n for _ in range(n_arms)]
    reached: list[list[float | None]] = [[None] * len(own) for own in steering]
    for sample in range(n):
        reference = texts[0][sample]
        unsteered = _logits(lm, reference, [], [])
        for arm in range(n_arms):
            # A forward pass at a time: logits of many rows over a large vocabulary would not fit.
            same_text = _logits(lm, reference, steering[arm], []) if arm else unsteered
            kl[arm][sample] = kl_divergence(same_text, unsteered) if arm else 0.0
            concept[arm][sample] = probability_of(same_text, concept_ids) if concept_ids else 0.0
            yield TokenStep("scoring", sample * n_arms + arm, n * n_arms)
            own = texts[arm][sample]
            ppl[arm][sample] = perplexity(_logits(lm, own, [], []) if arm else unsteered, own.token_ids)
            seen: list[float | None] = []
            if any(it.sae for it in steering[arm]):
                _logits(lm, own, steering[arm], seen)
                reached[arm] = [_larger(a, b) for a, b in zip(reached[arm], seen, strict=True)]
    return [
        Arm(
            strengths[arm],
            tuple(texts[arm]),
            tuple(ppl[arm]),
            tuple(repetition(g.token_ids) for g in texts[arm]),
            fmean(kl[arm]),
            fmean(concept[arm]) if concept_ids else None,
            tuple(reached[arm]),
        )
        for arm in range(n_arms)
    ]


def _larger(a: float | None, b: float | None) -> float | None:
    return max((x for x in (a, b) if x is not None), default=None)


def _logits(
    lm: LanguageModel, g: Generation, interventions: Sequence[Intervention], reached: list[float | None]
) -> Tensor:
    """The logits that predict each token of a continuation, (n_tokens, d_vocab), read again under interventions.

    Into `reached` goes each intervention's highest feature activation on the continuation's own tokens.
    """
    batch = Batch(lm, [g.prompt_ids], cache=False)
    batch.append(torch.tensor([g.token_ids]))
    n_new = len(g.token_ids)
    highest: dict[int, float] = {}

    def look(h: Tensor, index: int, it: Intervention) -> Tensor:
        assert it.sae is not None and it.feature is not None
        wanted = torch.tensor([it.feature], device=it.sae.device)
        highest[index] = float(it.sae.feature_acts(h[0, -n_new:].to(it.sae.device), wanted).max())
        return h

    watch = [
        (it.sae.cfg.hook_name or it.hook_name, partial(look, index=index, it=it))
        for index, it in enumerate(interventions)
        if it.sae is not None
    ]
    logits = batch.read(batch.tokens.shape[1], interventions, keep=n_new + 1, watch=watch)
    reached[:] = [highest.get(index) for index in range(len(interventions))]
    return logits[0, :-1]
