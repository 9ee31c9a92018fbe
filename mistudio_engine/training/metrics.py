"""How well an SAE does: one function a metric, its body the formula, its range said.

x are activations (n_tokens, d), x̂ their reconstructions. Nothing here knows where they come from; evaluation.py puts a
language model to it. BOS, EOS and padding are left out by whoever calls.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "ce_loss_score",
    "cosine",
    "cross_entropy",
    "dead_fraction",
    "density",
    "density_histogram",
    "encoder_decoder_cosine",
    "explained_variance",
    "explained_variance_legacy",
    "fvu",
    "kl_div",
    "kl_div_score",
    "l0",
    "l1",
    "l2_norm",
    "l2_ratio",
    "mse",
    "relative_reconstruction_bias",
]

_DENSITY_DECADES, _BINS_PER_DECADE = 8, 4
"""The bins of a density histogram are fixed, so that histograms of different SAEs can be laid over each other."""

_TINY = 1e-20
"""Keeps a quotient finite where its denominator is zero: constant or all-zero activations."""


def l0(feature_acts: Tensor) -> Tensor:
    """Mean number of active features per token: 0 to d_sae. An activation below zero is one, too (AbsTopK)."""
    return (feature_acts != 0).sum(dim=-1, dtype=torch.float32).mean()


def l1(feature_acts: Tensor) -> Tensor:
    """Mean over tokens of Σ|f|: 0 and up, in the activations' unit."""
    return feature_acts.abs().sum(dim=-1, dtype=_at_least_fp32(feature_acts)).mean()


def mse(x: Tensor, sae_out: Tensor) -> Tensor:
    """E‖x − x̂‖², summed over dimensions: 0 is perfect; in the activations' squared unit."""
    return (x - sae_out).pow(2).sum(dim=-1).mean()


def fvu(mse: Tensor, mean_square: Tensor, mean: Tensor) -> Tensor:
    """Fraction of variance unexplained: 0 is perfect, 1 is no better than the mean, more is worse than that.

    Args:
        mse: E‖x − x̂‖².
        mean_square: E‖x‖².
        mean: E x, (d,).
    """
    return mse / (mean_square - mean.pow(2).sum()).clamp_min(_TINY)


def explained_variance(fvu: Tensor) -> Tensor:
    """1 − E‖x − x̂‖²/(E‖x‖² − ‖E x‖²): 1 is perfect, 0 is no better than the mean."""
    return 1 - fvu


def explained_variance_legacy(x: Tensor, sae_out: Tensor) -> Tensor:
    """Mean over tokens of 1 − ‖x − x̂‖²/‖x − batch mean‖², as SAEBench's paper has it: at most 1. Tokens near the mean
    weigh as much as others, so it differs from `explained_variance`, and depends on the batch."""
    variance = (x - x.mean(dim=0)).pow(2).sum(dim=-1).clamp_min(_TINY)
    return (1 - (x - sae_out).pow(2).sum(dim=-1) / variance).mean()


def cosine(x: Tensor, sae_out: Tensor) -> Tensor:
    """Mean over tokens of cos(x, x̂): −1 to 1, 1 is the right direction."""
    return functional.cosine_similarity(x, sae_out, dim=-1).mean()


def l2_norm(x: Tensor) -> Tensor:
    """Mean over tokens of ‖x‖: 0 and up, in the activations' unit."""
    return x.norm(dim=-1).mean()


def l2_ratio(x: Tensor, sae_out: Tensor) -> Tensor:
    """Mean over tokens of ‖x̂‖/‖x‖: 1 is the right length, below 1 is shrinkage."""
    return (sae_out.norm(dim=-1) / x.norm(dim=-1).clamp_min(_TINY)).mean()


def relative_reconstruction_bias(mean_square_out: float, mean_dot: float) -> float | None:
    """E‖x̂‖²/E⟨x, x̂⟩, the γ for which x̂/γ comes nearest to x (arXiv 2404.16014, equation 10): 1 is unbiased, below 1 is
    shrinkage. None where E⟨x, x̂⟩ is 0."""
    return mean_square_out / mean_dot if mean_dot else None


def density(feature_acts: Tensor) -> Tensor:
    """On which share of the tokens each feature is active, (d_sae,): 0 to 1."""
    return (feature_acts != 0).float().mean(dim=0)


def density_histogram(density: Tensor) -> list[int]:
    """How many features have which density: 32 bins, four to a decade, from 10⁻⁸ to 1.

    Bin i counts the features with −8 + i/4 ≤ log10(density) < −8 + (i + 1)/4; the first has all that are rarer, too,
    and the last those that are always active. Dead features are in none of them.
    """
    n_bins = _DENSITY_DECADES * _BINS_PER_DECADE
    quarters = _BINS_PER_DECADE * density[density > 0].log10()
    # Rounded first: 0.01 lies on its edge, and in fp32 a bit below it.
    bins = (quarters.round(decimals=5).floor().long() + n_bins).clamp(0, n_bins - 1)
    return torch.bincount(bins, minlength=n_bins).tolist()


def encoder_decoder_cosine(W_enc: Tensor, W_dec: Tensor) -> Tensor:
    """cos(column of W_enc, row of W_dec) of each feature, (d_sae,): −1 to 1, 1 is tied weights, 0 where either is
    zero. W_enc (d_in, d_sae), W_dec (d_sae, d_in)."""
    dtype = _at_least_fp32(W_enc)
    return functional.cosine_similarity(W_enc.T.to(dtype), W_dec.to(dtype), dim=-1)


def dead_fraction(density: Tensor) -> Tensor:
    """Share of features that were never active: 0 to 1."""
    return (density == 0).float().mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p(target) per token, in nats: 0 is certainty. logits (n, d_vocab), targets (n,) → (n,)."""
    return functional.cross_entropy(logits.to(_at_least_fp32(logits)), targets, reduction="none")


def kl_div(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(clean ‖ edited) = Σ p·(log p − log q) per token, in nats: 0 is no change. (n, d_vocab) each → (n,)."""
    dtype = _at_least_fp32(logits)
    log_p, log_q = clean_logits.to(dtype).log_softmax(dim=-1), logits.to(dtype).log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def ce_loss_score(ce_clean: float, ce_sae: float, ce_zero: float) -> float:
    """(CE_zero − CE_sae)/(CE_zero − CE_clean): 1 is as good as the model itself, 0 as bad as zeroing the hook. Where
    zeroing changes nothing there is nothing to lose: 1."""
    return (ce_zero - ce_sae) / (ce_zero - ce_clean) if ce_zero != ce_clean else 1.0


def kl_div_score(kl_sae: float, kl_zero: float) -> float:
    """(KL_zero − KL_sae)/KL_zero: 1 leaves the model's predictions alone, 0 is as bad as zeroing the hook. Where
    zeroing changes nothing: 1."""
    return (kl_zero - kl_sae) / kl_zero if kl_zero else 1.0


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
