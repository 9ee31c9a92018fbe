"""The operation that says which features fire on a text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mistudio_engine.api.features import TextFeatures
from mistudio_engine.api.operations.search import FilteredOperation
from mistudio_engine.api.refs import SAERef

__all__ = ["FeaturesOnText"]

Text = Annotated[str, Field(min_length=1, max_length=20_000)]


class FeaturesOnText(FilteredOperation[TextFeatures], route="POST /features/on-text", effect="read"):
    """Which features fire on a text, strongest first, with where they peak; with a contrast text, what differs.

    The filters are those of search_features, and what they leave out is counted.
    """

    sae: SAERef
    text: Text
    contrast_text: Text | None = None
    k: Annotated[int, Field(ge=1, le=200)] = 20
