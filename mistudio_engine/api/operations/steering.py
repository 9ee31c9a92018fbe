"""Operations that steer a model along features."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mistudio_engine.api.operations.base import JobOperation, WaitSeconds
from mistudio_engine.api.refs import FeatureRef, ModelRef, TemplateRef
from mistudio_engine.api.steering import Generated, Intervention, SteerResult, SweepResult

__all__ = ["Generate", "Steer", "Sweep"]

Prompt = Annotated[str, Field(max_length=100_000)]
NewTokens = Annotated[int, Field(ge=1, le=4096)]
Temperature = Annotated[float, Field(ge=0, le=5)]


class Generate(JobOperation[Generated], route="POST /steering/generate"):
    """Generate text, steered by any number of features. To see the unsteered text beside it use steer."""

    model: ModelRef
    prompt: Prompt
    interventions: list[Intervention] = []
    max_new_tokens: NewTokens = 32
    temperature: Temperature = 0.5
    """0 is greedy."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 keeps all."""

    repetition_penalty: Annotated[float, Field(ge=1, le=2)] = 1.0
    stop: list[Annotated[str, Field(min_length=1)]] = []
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 16
    n: Annotated[int, Field(ge=1, le=32)] = 1
    """Samples."""

    wait_s: WaitSeconds = 20.0


class Steer(JobOperation[SteerResult], route="POST /steering/compare", also=("POST /steering/combined",)):
    """Steer a model along features and compare with the unsteered text from the same seed.

    Reports the KL from the baseline, the perplexity under the unsteered model, repetition and the activation reached.
    With `concept_tokens` their probability before and after, beside a random feature of the same length as control.
    """

    interventions: Annotated[list[Intervention], Field(min_length=1, max_length=64)]
    """Features with strength and unit; several are applied together."""

    prompt: Prompt
    model: ModelRef | None = None
    """By default the model that the first feature's SAE belongs to."""

    concept_tokens: Annotated[list[str], Field(max_length=500)] = []
    """Tokens whose probability to report, such as [" cat", " dog"]."""

    max_new_tokens: NewTokens = 32
    temperature: Temperature = 0.5
    """0 is greedy."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(ge=1, le=2)] = 1.0
    stop: list[Annotated[str, Field(min_length=1)]] = []
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 16
    n: Annotated[int, Field(ge=1, le=32)] = 1
    """Samples of each."""

    template: TemplateRef | None = None
    """Template whose arguments count where none is given here."""

    wait_s: WaitSeconds = 20.0


class Sweep(JobOperation[SweepResult], route="POST /steering/sweep"):
    """Several strengths of one feature and the baseline, generated in one batch."""

    feature: FeatureRef
    strengths: Annotated[list[float], Field(min_length=1, max_length=32)]
    """In multiples of the feature's highest activation."""

    prompt: Prompt
    model: ModelRef | None = None
    concept_tokens: Annotated[list[str], Field(max_length=500)] = []
    max_new_tokens: NewTokens = 32
    temperature: Temperature = 0.5
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 16
    template: TemplateRef | None = None
    """Template whose arguments count where none is given here."""

    wait_s: WaitSeconds = 20.0
