"""What each architecture minimises: its losses put together, and what the trainer wants to know beside them.

The formulas are SAELens's, so that its coefficients mean the same here. An objective takes inputs in normalised space
and knows no optimizer. A new architecture is a function and a line in OBJECTIVES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.saes import SAE
from mistudio_engine.saes.gated import GatedSAE
from mistudio_engine.saes.jumprelu import JumpReLUSAE
from mistudio_engine.saes.topk import TopKSAE
from mistudio_engine.training import losses
from mistudio_engine.training.sparse_topk import sparse_forward

__all__ = ["OBJECTIVES", "Objective"]

_SPARSE_PAYS = 4
"""The sparse path of TopK wins when d_sae is more than this many times k (measured on two CPU cores)."""


class Objective(NamedTuple):
    """The outcome of one batch."""

    loss: Tensor
    """What is minimised; a scalar with gradient."""

    parts: dict[str, Tensor]
    """The terms that add up to it, coefficients included."""

    sae_out: Tensor
    """(batch, d_in), in normalised space."""

    n_fired: Tensor
    """On how many tokens of the batch each feature was active, (d_sae,)."""

    l1: Tensor
    """Mean over tokens of Σ f·‖W_dec row‖, whether it is penalised or not."""


def standard(sae: SAE, z: Tensor, dead: Tensor, warm_up: float, hp: Hyperparameters) -> Objective:
    """MSE + λ‖f·n‖₁."""
    feature_acts, _ = sae.encode_normalized(z)
    sae_out = sae.reconstruct(feature_acts)
    l1 = losses.l1_loss(feature_acts, sae.W_dec.norm(dim=-1))
    parts = {"mse_loss": losses.mse_loss(sae_out, z), "l1_loss": warm_up * hp.l1_coefficient * l1}
    return _objective(parts, sae_out, feature_acts, l1)


def gated(sae: SAE, z: Tensor, dead: Tensor, warm_up: float, hp: Hyperparameters) -> Objective:
    """MSE + λΣ relu(π)·n + ‖relu(π)W_dec + b_dec − x‖², with π the gate's pre-activation (arXiv 2404.16014).

    The gate is a step without gradient; the penalty and the second reconstruction, which go through π, train it.
    """
    assert isinstance(sae, GatedSAE)
    feature_acts, _ = sae.encode_normalized(z)
    sae_out = sae.reconstruct(feature_acts)
    gate = sae.gate_pre(z).relu()
    norms = sae.W_dec.norm(dim=-1)
    parts = {
        "mse_loss": losses.mse_loss(sae_out, z),
        "l1_loss": warm_up * hp.l1_coefficient * losses.l1_loss(gate, norms),
        "auxiliary_reconstruction_loss": losses.mse_loss(sae.reconstruct(gate), z),
    }
    return _objective(parts, sae_out, feature_acts, losses.l1_loss(feature_acts, norms))


def jumprelu(sae: SAE, z: Tensor, dead: Tensor, warm_up: float, hp: Hyperparameters) -> Objective:
    """MSE + an L0 penalty whose gradient reaches the thresholds through a rectangle (arXiv 2407.14435)."""
    assert isinstance(sae, JumpReLUSAE)
    hidden_pre = sae.hidden_pre(z)
    feature_acts = losses.jump_relu(hidden_pre, sae.threshold, hp.jumprelu_bandwidth)
    sae_out = sae.reconstruct(feature_acts)
    norms = sae.W_dec.norm(dim=-1)
    if hp.l0_penalty == "tanh":
        penalty = losses.tanh_count(feature_acts, norms, hp.tanh_scale)
    else:
        l0 = losses.step(hidden_pre, sae.threshold, hp.jumprelu_bandwidth).sum(dim=-1)
        penalty = l0.mean() if hp.target_l0 is None else (2 / hp.target_l0 * (l0 - hp.target_l0) ** 2).mean()
    parts = {"mse_loss": losses.mse_loss(sae_out, z), "l0_loss": warm_up * hp.l0_coefficient * penalty}
    if hp.pre_act_loss_coefficient is not None:
        pull = losses.pre_act_loss(hidden_pre, sae.threshold, dead, norms)
        parts["pre_act_loss"] = hp.pre_act_loss_coefficient * pull
    return _objective(parts, sae_out, feature_acts, losses.l1_loss(feature_acts, norms))


def topk(sae: SAE, z: Tensor, dead: Tensor, warm_up: float, hp: Hyperparameters) -> Objective:
    """MSE + AuxK (arXiv 2406.04093)."""
    assert isinstance(sae, TopKSAE)
    sparse = hp.topk_path == "sparse" or (hp.topk_path == "auto" and sae.cfg.d_sae > _SPARSE_PAYS * sae.cfg.k)
    return _topk_sparse(sae, z, dead, hp) if sparse else _topk_dense(sae, z, dead, hp)


def _topk_dense(sae: TopKSAE, z: Tensor, dead: Tensor, hp: Hyperparameters) -> Objective:
    feature_acts, hidden_pre = sae.encode_normalized(z)
    sae_out = sae.reconstruct(feature_acts)
    parts = {"mse_loss": losses.mse_loss(sae_out, z)}
    n_dead = int(dead.sum())
    if n_dead and hp.aux_loss_coefficient:
        chosen = losses.keep_top(hidden_pre, hidden_pre.masked_fill(~dead, -torch.inf), _k_aux(sae, n_dead))
        recons = sae.reconstruct(chosen) - sae.b_dec
        aux = losses.aux_k((z - sae_out).detach(), recons, n_dead)
        parts["auxiliary_reconstruction_loss"] = hp.aux_loss_coefficient * aux
    norms = 1.0 if sae.cfg.rescale_acts_by_decoder_norm else sae.W_dec.norm(dim=-1)
    return _objective(parts, sae_out, feature_acts, (feature_acts * norms).sum(dim=-1).mean())


def _topk_sparse(sae: TopKSAE, z: Tensor, dead: Tensor, hp: Hyperparameters) -> Objective:
    out = sparse_forward(sae, z)
    parts = {"mse_loss": losses.mse_loss(out.sae_out, z)}
    n_dead = int(dead.sum())
    if n_dead and hp.aux_loss_coefficient:
        # Only the dead features' columns take part, and they do so densely: each gets a gradient for its encoder.
        features = dead.nonzero().squeeze(1)
        W_dec = sae.W_dec[features]
        hidden_pre = torch.addmm(sae.b_enc[features], sae.centre(z), sae.W_enc.T[features].T)
        scores = hidden_pre * W_dec.detach().norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else hidden_pre
        recons = losses.keep_top(hidden_pre, scores, _k_aux(sae, n_dead)) @ W_dec
        aux = losses.aux_k((z - out.sae_out).detach(), recons, n_dead)
        parts["auxiliary_reconstruction_loss"] = hp.aux_loss_coefficient * aux
    with torch.no_grad():
        active = out.indices[out.values > 0]
        n_fired = torch.bincount(active, minlength=sae.cfg.d_sae)
        norms = sae.W_dec.norm(dim=-1)
        l1 = (out.values * norms[out.indices]).sum(dim=-1).mean()
    return Objective(_total(parts), parts, out.sae_out, n_fired, l1)


def _k_aux(sae: TopKSAE, n_dead: int) -> int:
    return min(n_dead, max(1, sae.cfg.d_in // 2))


def _objective(parts: dict[str, Tensor], sae_out: Tensor, feature_acts: Tensor, l1: Tensor) -> Objective:
    return Objective(_total(parts), parts, sae_out, (feature_acts > 0).sum(dim=0), l1)


def _total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


OBJECTIVES: dict[str, Callable[[SAE, Tensor, Tensor, float, Hyperparameters], Objective]] = {
    "standard": standard,
    "gated": gated,
    "jumprelu": jumprelu,
    "topk": topk,
}
"""By architecture: (sae, z, dead features, sparsity warm-up 0 to 1, settings) → Objective."""
