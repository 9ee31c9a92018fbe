"""Operations on language models: bring one in, look at it, let its memory go."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.operations.datasets import Deleted, Limit
from mistudio_engine.api.records import Data, ModelRecord, Page
from mistudio_engine.api.refs import ModelRef, Slug

__all__ = [
    "Architecture",
    "DeleteModel",
    "DownloadModel",
    "GetModel",
    "ListModels",
    "ModelArchitecture",
    "Precision",
    "ShowModel",
    "UnloadModel",
    "Unloaded",
]

Precision = Literal["fp32", "bf16", "fp16", "int8", "nf4"]


class Architecture(Data):
    """What a model is made of."""

    model: str
    family: str
    n_layers: int
    d_model: int
    n_heads: int | None = None
    d_vocab: int
    n_ctx: int
    n_params: int
    n_key_value_heads: int | None = None
    d_head: int | None = None
    precision: str = ""
    bos_token: str | None = None
    tied_embeddings: bool = False
    modules: list[dict[str, Any]] = []
    """Parameters of each module."""

    hook_points: list[dict[str, Any]] = []
    """Every hook: name, layer, site, width."""

    missing_sites: dict[str, str] = {}
    """Sites that this family does not have, with the reason."""


class Unloaded(Data):
    """What was let go."""

    model: str
    freed_bytes: int


class GetModel(JobOperation[ModelRecord], route="POST /models"):
    """Bring in a causal language model from a local Hugging Face folder or from the hub.

    `source="embedded"` is the small model that comes with miStudio. With dry_run the memory and disk it would take.
    """

    source: Annotated[str, Field(min_length=1, max_length=4096)]
    """Folder on the engine's machine, a hub id such as gpt2 or EleutherAI/pythia-70m, or `embedded`."""

    name: Slug | None = None
    """Slug to give it; by default made from the source."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    precision: Precision = "fp32"
    """What this device cannot do is refused, never replaced by something larger."""


class ListModels(Operation[Page[ModelRecord]], route="GET /models"):
    """List the models that are here."""

    query: str | None = None
    limit: Limit = 50
    cursor: str | None = None


class ShowModel(Operation[ModelRecord], route="GET /models/{model}"):
    """One model's record."""

    model: ModelRef


class DeleteModel(Operation[Deleted], route="DELETE /models/{model}"):
    """Delete a model. A local folder that was brought in stays where it is."""

    model: ModelRef


class DownloadModel(JobOperation[ModelRecord], route="POST /models/{model}/download"):
    """Fetch a model's files again: after a failed download, or because the source has changed."""

    model: ModelRef


class ModelArchitecture(Operation[Architecture], route="GET /models/{model}/architecture"):
    """Layers, parameters, heads, vocabulary, and every hook point with its width."""

    model: ModelRef


class UnloadModel(Operation[Unloaded], route="POST /models/{model}/unload", idempotent=True):
    """Let go of a model's memory; it is loaded again when it is needed."""

    model: ModelRef
