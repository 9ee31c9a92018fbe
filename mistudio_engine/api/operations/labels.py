"""Operations that say what features mean."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from mistudio_engine.api.features import LabellingReport
from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.records import LabelRecord, Page
from mistudio_engine.api.refs import FeatureRef, SAERef, TemplateRef

__all__ = ["LabelFeatures", "LabelHistory", "SetLabel"]


class LabelFeatures(JobOperation[LabellingReport], route="POST /features/labeling"):
    """Label features by what they fire on, without a language model: the token pattern that explains them, scored on
    held-out examples.

    A label by a person or an agent is never overwritten. To label one yourself read get_feature and use set_label.
    """

    sae: SAERef
    features: list[Annotated[int, Field(ge=0)]] | None = None
    """Indices; all living features by default."""

    provider: Literal["token_pattern"] = "token_pattern"
    template: TemplateRef | None = None
    """Template whose arguments count where none is given here."""


class SetLabel(Operation[LabelRecord], route="PATCH /features/{feature}", idempotent=True):
    """Give a feature a label: a new version with its author, the old ones stay in its history."""

    feature: FeatureRef
    """`sae/slug#7`; in a URL `slug:7`."""

    label: Annotated[str, Field(min_length=1, max_length=300)]
    category: Annotated[str, Field(max_length=300)] = ""
    """A path such as `Emotion > Positive > Love`."""

    evidence: Annotated[str, Field(max_length=4000)] = ""
    """What speaks for it."""

    @field_validator("label", "category")
    @classmethod
    def _plain_words(cls, text: str) -> str:
        text = " ".join(text.split())
        if not text.isprintable():
            raise ValueError("control characters are not allowed here; write plain words")
        return text

    @field_validator("label")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("it is blank; write what the feature stands for in a few words")
        return text


class LabelHistory(Operation[Page[LabelRecord]], route="GET /saes/{sae}/features/{index}/labels"):
    """Every version of a feature's label, newest first."""

    sae: SAERef
    index: Annotated[int, Field(ge=0)]
