"""Strengths in units that mean something: lengths from maximum activations and from the layer's typical norm.

A useful strength is often about half the typical norm of the activations at the hook point (arXiv 2505.20063). It knows
no prompts and makes no forward pass: it is given the numbers.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mistudio_engine.api.errors import BadInput, EmptyData

__all__ = ["StrengthUnit", "length_of", "typical_norm"]

StrengthUnit = Literal["raw", "max_act", "norm"]


def length_of(
    strength: float,
    unit: StrengthUnit,
    max_act: float | None = None,
    typical_norm: float | None = None,
    *,
    decoder_norm: float = 1.0,
) -> float:
    """The length that `strength` in `unit` adds along a direction of length 1.

    Args:
        unit: `raw`: a length already; `max_act`: times what the feature writes at its maximum activation;
            `norm`: times the typical norm of the activations at the hook point.
        max_act: the feature's maximum activation as the SAE gives it.
        decoder_norm: norm of the feature's decoder row, which turns activations into lengths (Neuronpedia folds it
            into `maxActApprox`).

    Raises:
        BadInput: an unknown unit, or the number that the unit needs is missing or not positive.
    """
    if unit == "raw":
        return strength
    if unit not in ("max_act", "norm"):
        raise BadInput(f"There is no unit of strength {unit!r}.", fix="Use raw, max_act or norm.")
    scale = max_act if unit == "max_act" else typical_norm
    if scale is None or not scale > 0:
        raise BadInput(
            f"A strength in units of {unit} needs that number, and it is {scale}.",
            fix="Extract the feature first, or give the strength as raw length."
            if unit == "max_act"
            else "Measure the layer's typical norm first, or give the strength as raw length.",
        )
    return strength * scale * (decoder_norm if unit == "max_act" else 1.0)


def typical_norm(activations: Tensor, mask: Tensor | None = None) -> float:
    """The median norm of activations (…, width) where mask (…) is True.

    The median, because a first token's activations are often a hundred times longer than all others; leave special
    tokens out by the mask all the same.

    Raises:
        EmptyData: the mask leaves nothing.
    """
    norms = activations.detach().float().norm(dim=-1)
    norms = norms.flatten() if mask is None else norms[mask]
    if norms.numel() == 0:
        raise EmptyData("There is no token to measure a norm on.", fix="Give text with at least one ordinary token.")
    return float(norms.median())
