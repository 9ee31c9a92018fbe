"""Operations on sparse autoencoders: bring in, list, judge, convert, delete."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from mistudio_engine.api.operations.base import JobOperation, Operation, WaitSeconds
from mistudio_engine.api.operations.datasets import Deleted, Limit
from mistudio_engine.api.records import Data, Evaluation, Page, SAERecord
from mistudio_engine.api.refs import ModelRef, SAERef, Slug

__all__ = ["Config", "ConvertSAE", "DeleteSAE", "EvalSAE", "GetSAE", "ListSAEs", "ShowSAE", "ShowSAEConfig"]


class Config(Data):
    """An SAE's configuration, as its own file has it."""

    sae: str
    format: str
    config: dict[str, Any]


class GetSAE(JobOperation[SAERecord], route="POST /saes", also=("POST /saes/download-hf",)):
    """Bring in a published SAE: a SAELens or miStudio folder on the engine's machine or on the hub.

    Its width is checked against the model's hook before it is kept.
    """

    source: Annotated[str, Field(min_length=1, max_length=4096, validation_alias=AliasChoices("source", "repo_id"))]
    """Folder on the engine's machine, or a hub id such as jbloom/GPT2-Small-SAEs-Reformatted."""

    path: Annotated[str, Field(max_length=1024)] = ""
    """Folder inside the hub repository, such as blocks.8.hook_resid_pre."""

    name: Slug | None = None
    """Slug to give it; by default made from the source."""

    revision: str | None = None
    model: ModelRef | None = None
    """Model that it belongs to; by default found by the name in its configuration."""

    hook_name: str | None = None
    """Where it reads; by default as its configuration says."""


class ListSAEs(Operation[Page[SAERecord]], route="GET /saes"):
    """List the SAEs that are here."""

    query: str | None = None
    source: Literal["trained", "huggingface", "gemma_scope", "upload"] | None = None
    model: ModelRef | None = None
    layer: int | None = None
    architecture: str | None = None
    limit: Limit = 50
    cursor: str | None = None


class ShowSAE(Operation[SAERecord], route="GET /saes/{sae}"):
    """One SAE's record."""

    sae: SAERef


class ShowSAEConfig(Operation[Config], route="GET /saes/{sae}/config"):
    """An SAE's configuration as its file has it."""

    sae: SAERef


class DeleteSAE(Operation[Deleted], route="DELETE /saes/{sae}"):
    """Delete an SAE with its extractions and labels."""

    sae: SAERef


class ConvertSAE(Operation[SAERecord], route="POST /saes/{sae}/convert"):
    """Write a copy of an SAE in another format: `saelens` or `mistudio`."""

    sae: SAERef
    format: Literal["saelens", "mistudio"]
    name: Slug | None = None
    """Slug of the copy."""


class EvalSAE(JobOperation[Evaluation], route="POST /saes/{sae}/evaluate"):
    """How well an SAE stands for its activations: FVU, L0, CE-loss score, KL score, dead and dense features.

    FVU 0 is perfect; a CE-loss score of 1 means the model does not notice. Read the result with job(id) when it takes
    longer than wait_s.
    """

    sae: SAERef
    dataset: str | None = None
    """Dataset or tokenisation; by default the one it was trained on."""

    n_tokens: Annotated[int, Field(ge=256)] = 8192
    wait_s: WaitSeconds = 20.0
