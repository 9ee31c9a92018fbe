"""Losses and gradient estimators as functions of outputs: each takes tensors and returns what is added up.

They know no trainer, no schedule and no architecture; which of them make up an objective is in objectives.py. All live
in normalised space, where inputs have mean norm √d. They are the same for dense and for sparse codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Jump", "aux_k_scale", "jump", "keep_top", "mse_loss"]


def mse_loss(sae_out: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the *sum* over dimensions of (x̂ − x)², the field's MSE."""
    return (sae_out - target).pow(2).sum(dim=-1).mean()


def keep_top(values: Tensor, scores: Tensor, k: int) -> Tensor:
    """`values` where `scores` are a token's k largest, zero elsewhere; both (batch, n).

    No ReLU: AuxK's dead features have mostly negative pre-activations, and through a ReLU would get no gradient.
    """
    top = torch.topk(scores, k, dim=-1, sorted=False).indices
    return torch.zeros_like(values).scatter(-1, top, values.gather(-1, top))


def aux_k_scale(n_dead: int, d: int) -> float:
    """How much AuxK counts (arXiv 2406.04093, appendix A.2): fewer dead features than d/2 count for less."""
    return min(n_dead / max(1, d // 2), 1.0)


class Jump(NamedTuple):
    """Both sides of a threshold's gate."""

    feature_acts: Tensor
    """p·1[p > θ]"""

    gate: Tensor
    """1[p > θ]"""


def jump(hidden_pre: Tensor, threshold: Tensor, bandwidth: float) -> Jump:
    """A JumpReLU whose gradient reaches the threshold through a window (arXiv 2407.14435, section 4).

    The derivative of an expected step is minus the density of p at θ, and K((p − θ)/ε)/ε with the rectangle K
    estimates it.

    Args:
        hidden_pre: p, (batch, d_sae) or (n_pairs,).
        threshold: θ, (d_sae,) beside the first, (n_pairs,) beside the second.
        bandwidth: ε.
    """
    return Jump(*_Jump.apply(hidden_pre, threshold, bandwidth))  # pyright: ignore


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        above = hidden_pre - threshold
        active = _positive(above)
        window = _positive(bandwidth / 2 - above.abs_())
        ctx.save_for_backward(active, window, threshold)
        ctx.bandwidth = bandwidth
        ctx.set_materialize_grads(False)
        return hidden_pre * active, active

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        active, window, threshold = ctx.saved_tensors
        of_acts, of_gate = grads
        if of_acts is None and of_gate is None:
            return None, None, None
        total = torch.zeros_like(window) if of_acts is None else threshold * of_acts
        if of_gate is not None:
            total = total + of_gate
        seen = window * total
        if seen.dim() > threshold.dim():
            seen = seen.sum(dim=0)
        return None if of_acts is None else active * of_acts, seen / -ctx.bandwidth, None


def _positive(x: Tensor) -> Tensor:
    """1[x > 0] in x's own type: comparing, and choosing by a comparison, is several times slower in bfloat16."""
    return x.sign().clamp_min_(0)
