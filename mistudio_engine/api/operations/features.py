"""Operations that read and find features."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mistudio_engine.api.features import FeatureCard, FeaturePage, TextFeatures
from mistudio_engine.api.operations.base import Operation
from mistudio_engine.api.operations.datasets import Limit
from mistudio_engine.api.refs import SAERef

__all__ = ["FeaturesOnText", "GetFeature", "SearchFeatures"]

Text = Annotated[str, Field(min_length=1, max_length=20_000)]


class SearchFeatures(Operation[FeaturePage], route="GET /features"):
    """Find features whose label, tokens or meaning match a query; without one, list them by how often they fire.

    The answer says which mode was used. Dense features (firing on over a tenth of the tokens) are hidden and counted.
    Read one with get_feature next.
    """

    query: Annotated[str, Field(max_length=1000)] | None = None
    """Words, or a description of what is looked for."""

    sae: SAERef | None = None
    """Only features of this SAE."""

    mode: Literal["auto", "meaning", "text", "token"] = "auto"
    """meaning compares embeddings, text compares words, token finds features that fire on that token, auto ranks by
    meaning and words together."""

    category: str | None = None
    """Only features whose category begins with this."""

    include_dense: bool = False
    limit: Limit = 20
    cursor: str | None = None


class GetFeature(Operation[FeatureCard], route="GET /saes/{sae}/features/{index}"):
    """All that is known of one feature: statistics, histogram, top tokens, promoted tokens, examples, label history.

    Label it with set_label, or try it with steer.
    """

    sae: SAERef
    index: Annotated[int, Field(ge=0)]
    n: Annotated[int, Field(ge=0, le=100)] = 10
    """Examples to show, of each kind."""

    sampling: Literal["top", "quantile", "random", "zero", "all"] = "top"
    window: Annotated[int, Field(ge=0, le=4096)] = 12
    """Tokens to show before and after the prime token."""

    bins: Annotated[int, Field(ge=2, le=500)] = 50
    """Bins of the histogram."""


class FeaturesOnText(Operation[TextFeatures], route="POST /features/on-text", effect="read"):
    """Which features fire on a text, strongest first, with where they peak; with a contrast text, what differs."""

    sae: SAERef
    text: Text
    contrast_text: Text | None = None
    k: Annotated[int, Field(ge=1, le=200)] = 20
    include_dense: bool = False
