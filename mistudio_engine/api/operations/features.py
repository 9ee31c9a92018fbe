"""Operations that read and find features."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mistudio_engine.api.feature_card import FeatureCard
from mistudio_engine.api.features import FeaturePage, NeighbourPage, TextFeatures
from mistudio_engine.api.operations.base import Operation
from mistudio_engine.api.operations.datasets import Limit
from mistudio_engine.api.refs import FeatureRef, SAERef

__all__ = ["FeaturesOnText", "GetFeature", "Neighbours", "SearchFeatures"]

Text = Annotated[str, Field(min_length=1, max_length=20_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Activation = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SearchFeatures(Operation[FeaturePage], route="GET /features"):
    """Find features by what they mean, the words they carry, the token they fire on, the tokens they promote, or the
    feature they are like; without a query, list them by how often they fire.

    The answer says which mode was used and how many features were hidden: dead ones, and dense ones, which fire on over
    a tenth of the tokens. To ask which features fire on a text, use features_on_text. Read one with get_feature next.
    """

    query: Annotated[str, Field(max_length=1000)] | None = None
    """Words, a description of what is looked for, or a token; several tokens for promotes and suppresses."""

    like: FeatureRef | None = None
    """A feature, such as sae/stories-l2#7, to find similar ones in place of a query."""

    sae: SAERef | None = None
    """Only features of this SAE; in mode decoder the one of `like` by default."""

    mode: Literal["auto", "meaning", "text", "token", "promotes", "suppresses", "decoder"] = "auto"
    """meaning compares embeddings, text compares words, token finds features that fire on that token, promotes and
    suppresses those that raise or lower the logits of tokens, decoder those whose directions are like that of `like`.
    auto ranks a query by meaning and words together, and features by meaning and decoder direction."""

    category: str | None = None
    """Only features whose category begins with this, such as Emotion > Positive."""

    label: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Only features whose label has this text in it."""

    labelled: bool | None = None
    """Only features with a label, or only those without."""

    author: Literal["person", "agent", "job"] | None = None
    """Only features whose label was written by a person, an agent or a job."""

    min_confidence: Share | None = None
    """Only features whose label has at least this confidence, 0 to 1; the others are counted as badly scored."""

    min_frequency: Share | None = None
    """Only features that fire on at least this share of the tokens."""

    max_frequency: Share | None = None
    min_activation: Activation | None = None
    """Only features whose largest activation is at least this."""

    max_activation: Activation | None = None
    include_dense: bool = False
    include_dead: bool = False
    """Also features that never fired; they may have labels."""

    limit: Limit = 20
    cursor: str | None = None


class Neighbours(Operation[NeighbourPage], route="GET /saes/{sae}/features/{index}/neighbours"):
    """The features nearest to one, and those most opposite to it, each with a number that says how near."""

    sae: SAERef
    index: Annotated[int, Field(ge=0)]
    by: Literal["decoder", "label", "logits", "coactivation"] = "decoder"
    """decoder: cosine of the decoder directions. label: cosine of the label vectors. logits: cosine of the logit
    effects kept. coactivation: how often both fire on one token, as measured in the extraction."""

    other_sae: SAERef | None = None
    """Look in this SAE instead; by decoder only if both read the same hook of the same model."""

    n: Annotated[int, Field(ge=1, le=200)] = 10
    """How many of each sign."""

    include_dense: bool = False
    include_dead: bool = False


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


class FeaturesOnText(Operation[TextFeatures], route="POST /features/on-text", effect="read"):
    """Which features fire on a text, strongest first, with where they peak; with a contrast text, what differs.

    The filters are those of search_features, and what they leave out is counted.
    """

    sae: SAERef
    text: Text
    contrast_text: Text | None = None
    k: Annotated[int, Field(ge=1, le=200)] = 20
    category: str | None = None
    """Only features whose category begins with this."""

    label: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Only features whose label has this text in it."""

    labelled: bool | None = None
    author: Literal["person", "agent", "job"] | None = None
    min_confidence: Share | None = None
    min_frequency: Share | None = None
    max_frequency: Share | None = None
    min_activation: Activation | None = None
    """Only features whose largest activation in the extraction is at least this."""

    max_activation: Activation | None = None
    include_dense: bool = False
