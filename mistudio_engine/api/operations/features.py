"""The operation that reads one feature."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mistudio_engine.api.feature_card import FeatureCard
from mistudio_engine.api.operations.base import Operation
from mistudio_engine.api.refs import SAERef

__all__ = ["GetFeature"]


class GetFeature(Operation[FeatureCard], route="GET /saes/{sae}/features/{index}"):
    """All that is known of one feature: statistics, histogram, top tokens, promoted tokens, examples, label history.

    Label it with set_label, or try it with steer.
    """

    sae: SAERef
    index: Annotated[int, Field(ge=0)]
    n: Annotated[int, Field(ge=0, le=100)] = 10
    """Examples to show, of each kind."""

    sampling: Literal["top", "quantile", "random", "zero", "all"] = "top"
    window: Annotated[int, Field(ge=0, le=4096)] | None = None
    """Tokens to show before and after the prime token; by default as many as the extraction says."""

    bins: Annotated[int, Field(ge=2, le=500)] = 50
    """Bins of the histogram."""

    analysis: bool = False
    """Say also what the words that it fires on have in common."""

    neighbours: bool = False
    """Name also the features nearest to it by decoder direction, and those most opposite."""

    ablation: bool = False
    """Say also what its latest ablation found."""
