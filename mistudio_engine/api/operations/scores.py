"""Operations on how well labels foretell where their features fire."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mistudio_engine.api.operations.base import JobOperation
from mistudio_engine.api.operations.labels import Price, Provider
from mistudio_engine.api.refs import SAERef
from mistudio_engine.api.scores import ScoringMethod, ScoringReport

__all__ = ["ScoreLabels"]


class ScoreLabels(JobOperation[ScoringReport], route="POST /features/scoring"):
    """Score labels on text that they were not made from: detection and fuzzing, against another feature's label and the
    top token. The mean balanced accuracy becomes the label's confidence.

    Without a language model (token_pattern) token-pattern labels are scored by their own rule; labels in other words
    need one (openai, ollama, compatible), best not the one that wrote them. dry_run says what that would cost.
    """

    sae: SAERef
    features: list[Annotated[int, Field(ge=0)]] | None = None
    """Indices; by default all with a label that the scorer can judge."""

    methods: Annotated[list[ScoringMethod], Field(min_length=1)] = ["detection", "fuzzing"]
    """detection: in which texts does the feature fire? fuzzing: are the marked tokens those on which it fires?"""

    provider: Provider = "token_pattern"
    """Who judges; nothing is sent anywhere unless it is named here."""

    model: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """The language model that judges; by default the setting labelling_model."""

    base_url: Annotated[str, Field(max_length=300)] | None = None
    """Where the language model's server listens. Only a person may give it; by default the provider's setting."""

    n_parallel: Annotated[int, Field(ge=1, le=64)] = 8
    """Requests under way at once."""

    n_shown: Annotated[int, Field(ge=1, le=50)] = 10
    """Texts in one question."""

    max_usd: Annotated[float, Field(gt=0)] | None = None
    """Stop before more than this is spent, and keep what is scored by then. It needs prices."""

    price_per_million_input: Price | None = None
    """US dollars for a million tokens of prompts; by default the setting of this name."""

    price_per_million_output: Price | None = None
    """US dollars for a million tokens of answers; by default the setting of this name."""

    n: Annotated[int, Field(ge=4, le=100)] = 20
    """Texts with the feature, at most, and as many without."""

    window: Annotated[int, Field(ge=4, le=512)] = 32
    """Tokens in a text."""

    negatives: Annotated[list[Literal["random", "decoder", "similar"]], Field(min_length=1)] = [
        "random",
        "decoder",
        "similar",
    ]
    """Texts without the feature: any; those on which features with a like decoder direction fire; those that read like
    the ones with it."""

    n_tokens: Annotated[int, Field(ge=256, le=10_000_000)] = 65_536
    """Held-out tokens, at most, that are run through the model to find texts without the feature."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """For the choice of texts and marks, and the intervals."""
