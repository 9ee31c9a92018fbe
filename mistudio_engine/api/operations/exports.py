"""Operations that make files for others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from mistudio_engine.api.exports import Download
from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.operations.datasets import Limit
from mistudio_engine.api.records import ExportRecord, Job, Page
from mistudio_engine.api.refs import SAERef

__all__ = ["CancelExport", "DownloadExport", "Export", "ListExports", "ShowExport"]


class Export(JobOperation[ExportRecord], route="POST /neuronpedia/export"):
    """Make a file of an SAE and what is known of its features: a zip with one JSON a feature, labels, and the weights
    as a SAELens folder; or one JSON document of features and examples.

    The same export twice is the same bytes. With dry_run its size.
    """

    sae: Annotated[SAERef, Field(validation_alias=AliasChoices("sae", "sae_id"))]
    format: Literal["zip", "json"] = "zip"
    """zip: the documents' zip. json: one document with all that is known of each feature, label history, token ids and
    examples of every kind included; without weights."""

    compress: bool = False
    """Gzip the JSON document."""

    feature_selection: Literal["all", "extracted", "custom"] = "all"
    """all: every index; extracted: those with examples; custom: the range or the indices given."""

    range_start: Annotated[
        int | None, Field(ge=0, validation_alias=AliasChoices("range_start", "feature_range_start"))
    ] = None
    range_end: Annotated[int | None, Field(ge=0, validation_alias=AliasChoices("range_end", "feature_range_end"))] = (
        None
    )
    """Inclusive, as the range of the documents is."""

    indices: list[Annotated[int, Field(ge=0)]] | None = None
    include_logit_lens: bool = True
    include_histograms: bool = True
    include_top_tokens: bool = True
    include_explanations: bool = True
    include_saelens_weights: bool = True
    """In a zip; a JSON document has none."""

    logit_lens_k: Annotated[int, Field(ge=1, le=100)] = 20
    histogram_bins: Annotated[int, Field(ge=2, le=500)] = 50
    top_tokens_k: Annotated[int, Field(ge=1, le=50)] = 50
    n_examples: Annotated[int, Field(ge=0, le=100)] = 20
    """Of each feature: strongest ones in a zip, of each kind in a JSON document."""

    window: Annotated[int, Field(ge=0, le=4096)] = 32
    """Tokens of an example before and after its prime token."""

    @model_validator(mode="after")
    def _selection(self) -> Export:
        has_range = self.range_start is not None and self.range_end is not None
        if self.feature_selection == "custom":
            if (self.range_start is None) != (self.range_end is None):
                raise ValueError("range_start and range_end go together; give both or neither")
            if not has_range and not self.indices:
                raise ValueError("feature_selection='custom' needs range_start and range_end, or indices")
            if has_range and self.range_start > self.range_end:  # type: ignore[operator]
                raise ValueError(f"range_start {self.range_start} lies after range_end {self.range_end}")
        elif self.indices or self.range_start is not None or self.range_end is not None:
            raise ValueError("a range and indices go with feature_selection='custom'")
        if self.compress and self.format == "zip":
            raise ValueError("compress goes with format='json'; leave it out")
        return self


class ShowExport(Operation[ExportRecord], route="GET /neuronpedia/export/{export}"):
    """One export's record: status, progress, stage, file."""

    export: str


class DownloadExport(Operation[Download], route="GET /neuronpedia/export/{export}/download"):
    """The file of a completed export."""

    export: str


class CancelExport(Operation[Job], route="POST /neuronpedia/export/{export}/cancel", idempotent=True):
    """Cancel an export that is under way; nothing is left behind."""

    export: str


class ListExports(Operation[Page[ExportRecord]], route="GET /neuronpedia/exports"):
    """List exports, newest first."""

    sae: SAERef | None = None
    status: Literal["pending", "computing", "packaging", "completed", "failed", "cancelled"] | None = None
    limit: Limit = 50
    cursor: str | None = None
