"""The operation that finds what is near a feature."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mistudio_engine.api.features import NeighbourPage
from mistudio_engine.api.operations.base import Operation
from mistudio_engine.api.refs import SAERef

__all__ = ["Neighbours"]


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
