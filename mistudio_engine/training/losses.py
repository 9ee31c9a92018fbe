"""Losses as functions of outputs: each takes tensors and returns the number to minimise.

They know no trainer and no schedule; which of them make up an architecture's objective is in objectives.py. All live in
normalised space, where inputs have mean norm √d. n is ‖W_dec row‖, (d_sae,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["aux_k", "jump_relu", "keep_top", "l1_loss", "mse_loss", "pre_act_loss", "step", "tanh_count"]


def mse_loss(sae_out: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of the *sum* over dimensions of (x̂ − x)², the field's MSE."""
    return (sae_out - target).pow(2).sum(dim=-1).mean()


def l1_loss(feature_acts: Tensor, decoder_norms: Tensor) -> Tensor:
    """Mean over tokens of Σ f·n: with n in it, shrinking f while growing the decoder wins nothing (Anthropic, April
    2024)."""
    return (feature_acts * decoder_norms).sum(dim=-1).mean()


def keep_top(values: Tensor, scores: Tensor, k: int) -> Tensor:
    """`values` where `scores` are a token's k largest, zero elsewhere; both (batch, n).

    No ReLU: AuxK's dead features have mostly negative pre-activations, and through a ReLU would get no gradient.
    """
    top = torch.topk(scores, k, dim=-1, sorted=False).indices
    return torch.zeros_like(values).scatter(-1, top, values.gather(-1, top))


def aux_k(residual: Tensor, recons: Tensor, n_dead: int) -> Tensor:
    """AuxK (arXiv 2406.04093, appendix A.2): how far dead features, without b_dec, are from what the living ones left.

    Args:
        residual: x − x̂, detached, (batch, d_in).
        recons: the dead features' reconstruction, (batch, d_in).
        n_dead: fewer than d_in/2 count for proportionally less.
    """
    scale = min(n_dead / max(1, residual.shape[-1] // 2), 1.0)
    return scale * mse_loss(recons, residual)


def pre_act_loss(hidden_pre: Tensor, threshold: Tensor, dead: Tensor, decoder_norms: Tensor) -> Tensor:
    """Mean over tokens of Σ relu(θ − p)·n over dead features: pulls them towards firing (Anthropic, January 2025)."""
    return ((threshold - hidden_pre).relu() * dead * decoder_norms).sum(dim=-1).mean()


def tanh_count(feature_acts: Tensor, decoder_norms: Tensor, scale: float) -> Tensor:
    """Mean over tokens of Σ tanh(scale·f·n), a smooth count of active features."""
    return torch.tanh(scale * feature_acts * decoder_norms).sum(dim=-1).mean()


def step(hidden_pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1[p > θ], (batch, d_sae); its gradient reaches the threshold through a window of width `bandwidth`."""
    return _Step.apply(hidden_pre, threshold, bandwidth)  # pyright: ignore[reportReturnType]


def jump_relu(hidden_pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """p·1[p > θ], (batch, d_sae); its gradient reaches the threshold through a window of width `bandwidth`."""
    return _JumpReLU.apply(hidden_pre, threshold, bandwidth)  # pyright: ignore[reportReturnType]


def _window(hidden_pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """K((p − θ)/ε)/ε with the rectangle K: a kernel estimate of the density of p at θ (arXiv 2407.14435, section 4)."""
    return (((hidden_pre - threshold) / bandwidth).abs() < 0.5).to(hidden_pre.dtype) / bandwidth


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(hidden_pre, threshold)
        ctx.bandwidth = bandwidth
        return (hidden_pre > threshold).to(hidden_pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        hidden_pre, threshold = ctx.saved_tensors
        return None, -(_window(hidden_pre, threshold, ctx.bandwidth) * grads[0]).sum(dim=0), None


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(hidden_pre, threshold)
        ctx.bandwidth = bandwidth
        return hidden_pre * (hidden_pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_pre, threshold = ctx.saved_tensors
        window = _window(hidden_pre, threshold, ctx.bandwidth)
        return (hidden_pre > threshold) * grads[0], -(threshold * window * grads[0]).sum(dim=0), None
