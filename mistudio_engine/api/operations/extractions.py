"""Operations that look at all features of an SAE at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.operations.datasets import Limit
from mistudio_engine.api.records import ExtractionRecord, Page
from mistudio_engine.api.refs import SAERef, TemplateRef

__all__ = ["Extract", "ListExtractions", "ShowExtraction"]


class Extract(JobOperation[ExtractionRecord], route="POST /features/extraction"):
    """Look at every feature of an SAE in one pass over text: how often and how strongly it fires, on which tokens, with
    examples, histograms, top tokens, and the tokens that it promotes.

    Label the features next (label_features), then search them (search_features).
    """

    sae: SAERef
    dataset: str | None = None
    """Dataset or tokenisation; by default the one it was trained on."""

    n_tokens: Annotated[int, Field(ge=256)] | None = None
    """At most this many tokens, in contexts chosen at random; all by default."""

    features: list[Annotated[int, Field(ge=0)]] | None = None
    """Only these; all by default."""

    n_examples: Annotated[int, Field(ge=1, le=100)] = 20
    """Contexts with the strongest activations kept for each feature."""

    min_activation: Annotated[float, Field(ge=0)] = 0.0
    """Smaller activations count as none."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """For the choice of contexts and the quantile and random examples."""

    template: TemplateRef | None = None
    """Template whose arguments count where none is given here."""


class ListExtractions(Operation[Page[ExtractionRecord]], route="GET /extractions"):
    """List extractions, newest first."""

    sae: SAERef | None = None
    limit: Limit = 50
    cursor: str | None = None


class ShowExtraction(Operation[ExtractionRecord], route="GET /extractions/{extraction}"):
    """One extraction's record."""

    extraction: str
