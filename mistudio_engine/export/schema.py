"""The documents' JSON as types: metadata.json and features/N.json.

Written from the requirements, apart from the writer in feature_json.py on purpose: a mistake has to be made twice.
Nothing is optional by accident: an unknown key is refused, and so is a number that is not finite.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, StrictStr

__all__ = ["Feature", "Metadata"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Includes(Part):
    logit_lens: bool
    histograms: bool
    top_tokens: bool
    explanations: bool
    saelens_weights: bool


class Settings(Part):
    logit_lens_k: Annotated[int, Field(ge=1)]
    histogram_bins: Annotated[int, Field(ge=1)]
    top_tokens_k: Annotated[int, Field(ge=1)]


class Metadata(Part):
    sae_id: str
    sae_name: str
    model_name: str
    layer: NonNegativeInt | None
    d_in: Annotated[int, Field(ge=1)]
    d_sae: Annotated[int, Field(ge=1)]
    architecture: str
    export_date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    feature_count: NonNegativeInt
    includes: Includes
    settings: Settings
    provenance: dict[str, Any]


class Statistics(Part):
    activation_frequency: Annotated[FiniteFloat, Field(ge=0, le=1)] | None
    max_activation: FiniteFloat | None
    mean_activation: FiniteFloat | None


class TokenValue(Part):
    token: StrictStr
    token_id: NonNegativeInt
    value: FiniteFloat


class LogitLens(Part):
    top_positive: list[TokenValue]
    top_negative: list[TokenValue]


class Histogram(Part):
    bin_edges: list[FiniteFloat]
    counts: list[NonNegativeInt]
    total_activations: NonNegativeInt
    non_zero_count: NonNegativeInt
    min: FiniteFloat | None
    max: FiniteFloat | None
    mean: FiniteFloat | None
    std: FiniteFloat | None


class TopToken(Part):
    token: StrictStr
    token_id: NonNegativeInt
    count: NonNegativeInt
    mean_activation: FiniteFloat
    max_activation: FiniteFloat


class Activation(Part):
    token: StrictStr
    value: FiniteFloat
    context_before: str
    context_after: str
    token_index: NonNegativeInt
    tokens: list[StrictStr]
    values: list[FiniteFloat]


class Feature(Part):
    feature_index: NonNegativeInt
    label: str | None
    category: str | None
    statistics: Statistics
    logit_lens: LogitLens | None = None
    histogram: Histogram | None = None
    top_tokens: list[TopToken] | None = None
    activations: list[Activation]
