"""Operations on labels and examples that others have published."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.published import ImportReport, Published
from mistudio_engine.api.refs import SAERef

__all__ = ["ImportLabels", "ShowPublished"]


class ImportLabels(JobOperation[ImportReport], route="POST /features/import"):
    """Bring in what Neuronpedia has published of a known SAE: labels with their authors and scores, and examples.

    A label by a person or an agent stays. Published labels have no confidence until they are scored here. The report
    says how well the published statistics fit our own. With dry_run how many files, bytes and features there are.
    """

    sae: SAERef
    source: Annotated[str, Field(min_length=3, max_length=500)]
    """MODEL/SOURCE at Neuronpedia, such as gpt2-small/8-res-jb; or, for people, a folder on the engine's machine with
    features, explanations and activations in it, beginning with / or . or ~."""

    base_url: Annotated[str, Field(max_length=300)] | None = None
    """Another bucket with the same tree; for people only."""

    labels: bool = True
    examples: bool = True

    features: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Only these; all by default."""

    check_model: bool = True
    """Refuse what is of a model of another name."""

    @model_validator(mode="after")
    def _something(self) -> ImportLabels:
        if not (self.labels or self.examples):
            raise ValueError("nothing would be brought in; ask for labels or examples")
        if self.base_url is not None and self.source[0] in "/.~":
            raise ValueError("base_url goes with a source MODEL/SOURCE, not with a folder")
        return self


class ShowPublished(Operation[Published], route="GET /saes/{sae}/features/{index}/published"):
    """What others have published of a feature: their labels with authors and scores, statistics and examples."""

    sae: SAERef
    index: Annotated[int, Field(ge=0)]
    n: Annotated[int, Field(ge=0, le=100)] = 10
    """Examples of each source to show."""
