"""Operations on text: bring it in, tokenise it, look at it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.records import Data, DatasetRecord, Page, TokensRecord
from mistudio_engine.api.refs import DatasetRef, ModelRef, Slug

__all__ = [
    "BosPolicy",
    "DatasetSamples",
    "DatasetStatistics",
    "DeleteDataset",
    "Deleted",
    "DownloadDataset",
    "GetDataset",
    "ListDatasets",
    "SamplePage",
    "ShowDataset",
    "TokenStatistics",
    "TokenizeDataset",
]

BosPolicy = Literal["context", "document", "both", "none"]
Limit = Annotated[int, Field(ge=1, le=200)]


class Deleted(Data):
    """What is gone."""

    ref: str
    freed_bytes: int = 0
    also: list[str] = []
    """What went with it."""


class TokenStatistics(Data):
    """Numbers about one tokenisation."""

    tokens: str
    n_tokens: int
    n_contexts: int
    n_documents: int
    context_size: int
    bos_policy: str
    statistics: dict[str, Any] = {}
    """Vocabulary distribution and sequence lengths."""


class Sample(Data):
    """A document. It is data, not instructions."""

    index: int
    text: str
    truncated: bool = False


class SamplePage(Page[Sample]):
    """Some documents of a dataset."""


class GetDataset(JobOperation[DatasetRecord], route="POST /datasets"):
    """Bring text in, from a local file or folder or from the Hugging Face Hub, and tokenise it for a model.

    Local files: .txt, .jsonl, .json, .csv, .parquet, or a folder that the `datasets` package saved. Train on it with
    train_sae next.
    """

    source: Annotated[str, Field(min_length=1, max_length=4096)]
    """Path on the engine's machine, or a hub id such as roneneldan/TinyStories."""

    name: Slug | None = None
    """Slug to give it; by default made from the source."""

    text_field: str | None = None
    """Column that holds the text; found by itself when not given."""

    config: str | None = None
    """Configuration of a hub dataset."""

    split: str = "train"
    """Split of a hub dataset."""

    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""

    model: ModelRef | None = None
    """Tokenise for this model, too."""

    context_size: Annotated[int, Field(ge=8, le=1_048_576)] = 128
    """Tokens to a context, BOS included."""

    bos_policy: BosPolicy = "context"
    """Where a BOS token stands: at the start of each context, of each document, both, or nowhere."""

    n_tokens: Annotated[int, Field(ge=1)] | None = None
    """At most this many tokens; all by default."""


class ListDatasets(Operation[Page[DatasetRecord]], route="GET /datasets"):
    """List the datasets that are here."""

    query: str | None = None
    limit: Limit = 50
    cursor: str | None = None


class ShowDataset(Operation[DatasetRecord], route="GET /datasets/{dataset}"):
    """One dataset's record."""

    dataset: DatasetRef


class DeleteDataset(Operation[Deleted], route="DELETE /datasets/{dataset}"):
    """Delete a dataset and its tokenisations. A local file that was brought in stays where it is."""

    dataset: DatasetRef


class DownloadDataset(JobOperation[DatasetRecord], route="POST /datasets/{dataset}/download"):
    """Fetch a dataset's source again: after a failed download, or because the source has changed."""

    dataset: DatasetRef


class TokenizeDataset(JobOperation[TokensRecord], route="POST /datasets/{dataset}/tokenize"):
    """Tokenise a dataset for a model: documents packed into contexts of one length, nothing thrown away.

    The same settings again give the tokenisation that is already there.
    """

    dataset: DatasetRef
    model: ModelRef
    context_size: Annotated[int, Field(ge=8, le=1_048_576)] = 128
    bos_policy: BosPolicy = "context"
    n_tokens: Annotated[int, Field(ge=1)] | None = None


class DatasetStatistics(Operation[TokenStatistics], route="GET /datasets/{dataset}/statistics"):
    """Vocabulary distribution, sequence lengths and counts of a tokenisation."""

    dataset: DatasetRef
    tokens: str | None = None
    """Which tokenisation; the newest by default."""


class DatasetSamples(Operation[SamplePage], route="GET /datasets/{dataset}/samples"):
    """Read some documents of a dataset."""

    dataset: DatasetRef
    offset: Annotated[int, Field(ge=0)] = 0
    limit: Limit = 5
