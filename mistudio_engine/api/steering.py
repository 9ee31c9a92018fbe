"""Steering, as it travels: which feature is pushed how far, and what that did to the text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mistudio_engine.api.records import Data
from mistudio_engine.api.refs import FeatureRef

__all__ = ["Completion", "ConceptProbability", "Generated", "Intervention", "SteerResult", "SweepResult", "SweepRow"]


class Intervention(Data):
    """One feature and what to do with it."""

    model_config = {"extra": "forbid", "frozen": True}

    feature: FeatureRef
    """The feature: `sae/slug#7`."""

    strength: Annotated[float, Field(ge=-10_000, le=10_000)] = 1.0
    """How far, in `unit`; 0 changes nothing."""

    unit: Literal["raw", "max_act", "norm"] = "max_act"
    """raw: length added along the unit decoder direction (Neuronpedia's strength × multiplier). max_act: multiples of
    the feature's highest activation. norm: multiples of the layer's typical activation norm."""

    method: Literal["add", "suppress", "set", "ablate", "orthogonal", "cap"] = "add"
    """add: h += length · direction. suppress: takes `strength` times what the feature writes away. set: makes it write
    that length. ablate: makes it write nothing. orthogonal: multiplies the part of h along the direction by `strength`.
    cap: limits that part to the length. suppress and orthogonal count `strength` as a plain factor."""

    positions: Literal["all", "prompt", "generated", "last"] = "all"


class Completion(Data):
    """One generated text."""

    text: str
    """What was generated, without the prompt."""

    tokens: list[str]
    n_tokens: int
    finish_reason: str
    """length, eos or stop."""

    perplexity: float | None = None
    """Of the completion under the unsteered model."""

    repetition: float | None = None
    """Share of repeated 3-grams: 0 none, 1 all."""


class ConceptProbability(Data):
    """Mean next-token probability of a set of tokens over the generated positions of the baseline."""

    tokens: list[str]
    before: float
    after: float
    control: float | None = None
    """With a random feature's direction of the same length."""


class SteerResult(Data):
    """Steered text beside unsteered text, same seed."""

    model: str
    prompt: str
    baseline: list[Completion]
    steered: list[Completion]
    lengths: list[float]
    """The length that was added for each intervention, in units of the residual stream."""

    kl_from_baseline: float
    """Mean KL(steered ‖ baseline) per position over the baseline's completion, in nats."""

    activation_reached: list[float | None] = []
    """Each feature's highest activation during the steered run."""

    probability: ConceptProbability | None = None
    warnings: list[str] = []
    experiment: str | None = None
    """Where it was kept."""


class Generated(Data):
    """Steered text alone."""

    model: str
    prompt: str
    completions: list[Completion]
    lengths: list[float]
    warnings: list[str] = []


class SweepRow(Data):
    """One strength of a sweep."""

    strength: float
    length: float
    completion: Completion
    kl_from_baseline: float
    probability: float | None = None


class SweepResult(Data):
    """Several strengths of one feature and the baseline, made in one batch."""

    model: str
    prompt: str
    feature: str
    rows: list[SweepRow]
    """The baseline is the row with strength 0."""
