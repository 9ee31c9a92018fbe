"""The operation that finds features, and the filters that it shares with others that answer with features."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field

from mistudio_engine.api.features import FeaturePage
from mistudio_engine.api.operations.base import Operation
from mistudio_engine.api.operations.datasets import Limit
from mistudio_engine.api.refs import FeatureRef, SAERef

__all__ = ["SearchFeatures"]

R = TypeVar("R")

Share = Annotated[float, Field(ge=0, le=1)]
Activation = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FilteredOperation(Operation[R], Generic[R]):
    """An operation that answers with features, and not with those that its filters leave out."""

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
    """Only features whose largest activation in the extraction is at least this."""

    max_activation: Activation | None = None
    include_dense: bool = False

    @classmethod
    def __pydantic_init_subclass__(cls, **keywords: Any) -> None:
        super().__pydantic_init_subclass__(**keywords)
        # Forms and help texts begin with what is asked; pydantic would begin with what is inherited.
        filters = FilteredOperation.__pydantic_fields__ if cls.tool else {}
        own = {name: field for name, field in cls.__pydantic_fields__.items() if name not in filters}
        cls.__pydantic_fields__ = own | {name: cls.__pydantic_fields__[name] for name in filters}


class SearchFeatures(FilteredOperation[FeaturePage], route="GET /features"):
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

    include_dead: bool = False
    """Also features that never fired; they may have labels."""

    limit: Limit = 20
    cursor: str | None = None
