"""What each architecture minimises: its losses put together, and what the trainer wants to know beside them.

The formulas are SAELens's, so that its coefficients mean the same here. An objective takes a code (codes.py), dense or
sparse, and a target in normalised space; it knows no optimizer. Another activation is a function and a line in
OBJECTIVES; transcoders share those of their activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mistudio_engine.api.presets import default_l1_coefficient
from mistudio_engine.api.sae_config import MatryoshkaBatchTopKConfig
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.saes import SAE
from mistudio_engine.training import losses
from mistudio_engine.training.codes import Code

__all__ = ["OBJECTIVES", "Moment", "Objective"]


class Moment(NamedTuple):
    """What an objective is told of the training beside the code."""

    hp: Hyperparameters
    sparsity: float
    """How far the penalty has warmed up, 0 to 1."""

    dead: Tensor
    """Features that have not fired for the whole window, bool (d_sae,)."""

    skip: Tensor | None = None
    """What the skip path adds to the output, (n_tokens, d_out)."""


class Objective(NamedTuple):
    """The outcome of one batch."""

    loss: Tensor
    """What is minimised; a scalar with gradient."""

    parts: dict[str, Tensor]
    """The terms that add up to it, coefficients included."""

    sae_out: Tensor
    """(n_tokens, d_out), in normalised space."""

    n_fired: Tensor
    """On how many tokens of the batch each feature was active, (d_sae,)."""

    l1: Tensor
    """Mean over tokens of Σ f·‖W_dec row‖, whether it is penalised or not."""

    smallest: Tensor | None = None
    """BatchTopK: the smallest activation that was chosen, decoder norm included; a scalar."""


def standard(code: Code, target: Tensor, moment: Moment) -> Objective:
    """MSE + λ‖f·n‖₁: with n in it, shrinking f while growing the decoder wins nothing (Anthropic, April 2024)."""
    feature_acts = (code.projection + code.of(code.sae.get_parameter("b_enc") + code.shift)).relu()
    sae_out = _reconstruct(code, feature_acts, moment)
    l1 = _l1(code, feature_acts)
    parts = {"mse_loss": losses.mse_loss(sae_out, target), "l1_loss": moment.sparsity * _l1_weight(code, moment) * l1}
    return _objective(code, parts, sae_out, feature_acts, l1)


def gated(code: Code, target: Tensor, moment: Moment) -> Objective:
    """MSE + λΣ relu(π)·n + ‖relu(π)W_dec + b_dec − x‖², with π the gate's pre-activation (arXiv 2404.16014).

    The gate is a step without gradient; the penalty and the second reconstruction, which go through π, train it.
    """
    sae = code.sae
    gate_pre = code.projection + code.of(sae.get_parameter("b_gate") + code.shift)
    gain = sae.get_parameter("r_mag").exp()
    magnitude = code.projection * code.of(gain) + code.of(sae.get_parameter("b_mag") + code.shift * gain)
    feature_acts = (gate_pre > 0) * magnitude.relu()
    gate = gate_pre.relu()
    sae_out = _reconstruct(code, feature_acts, moment)
    parts = {
        "mse_loss": losses.mse_loss(sae_out, target),
        "l1_loss": moment.sparsity * _l1_weight(code, moment) * _l1(code, gate),
        "auxiliary_reconstruction_loss": losses.mse_loss(_reconstruct(code, gate, moment), target),
    }
    return _objective(code, parts, sae_out, feature_acts, _l1(code, feature_acts))


def jumprelu(code: Code, target: Tensor, moment: Moment) -> Objective:
    """MSE + an L0 penalty whose gradient reaches the thresholds through a rectangle (arXiv 2407.14435).

    `step` counts active features, `quadratic` is 2/L0*·(L0 − L0*)² around a target (Gemma Scope 2), `tanh` sums
    tanh(scale·f·n) (Anthropic, January 2025), as does the pull Σ relu(θ − p)·n on dead features.
    """
    sae, hp = code.sae, moment.hp
    threshold = code.of(sae.get_parameter("threshold"))
    hidden_pre = code.projection + code.of(sae.get_parameter("b_enc") + code.shift)
    feature_acts, gate = losses.jump(hidden_pre, threshold, hp.jumprelu_bandwidth)
    sae_out = _reconstruct(code, feature_acts, moment)
    norms = sae.W_dec.norm(dim=-1)
    if hp.l0_penalty == "tanh":
        penalty = code.per_feature(torch.tanh(hp.tanh_scale * feature_acts * code.of(norms))).sum() / len(target)
    elif hp.target_l0 is None:
        penalty = code.per_feature(gate).sum() / len(target)
    else:
        penalty = (2 / hp.target_l0 * (code.per_token(gate) - hp.target_l0) ** 2).mean()
    parts = {
        "mse_loss": losses.mse_loss(sae_out, target),
        "l0_loss": moment.sparsity * hp.l0_coefficient * penalty,
    }
    if hp.pre_act_loss_coefficient is not None and bool(moment.dead.any()):
        features = moment.dead.nonzero().squeeze(1)
        below = sae.get_parameter("threshold") - sae.get_parameter("b_enc") - code.shift
        pull = ((below[features] - code.columns(features)).relu() * norms[features]).sum(dim=-1, dtype=torch.float32)
        parts["pre_act_loss"] = hp.pre_act_loss_coefficient * pull.mean()
    return _objective(code, parts, sae_out, feature_acts, _l1(code, feature_acts))


def topk(code: Code, target: Tensor, moment: Moment) -> Objective:
    """MSE + AuxK (arXiv 2406.04093).

    Chosen by p·n, an activation p·n is divided by n when it is decoded, so n cancels out of the reconstruction and of
    its gradient: it takes part in the choice alone.
    """
    feature_acts = code.chosen((code.projection + code.of(code.sae.get_parameter("b_enc") + code.shift)).relu())
    sae_out = _reconstruct(code, feature_acts, moment)
    parts = {"mse_loss": losses.mse_loss(sae_out, target), **_aux_k(code, target - sae_out, moment)}
    return _objective(code, parts, sae_out, feature_acts, _l1(code, feature_acts))


def batchtopk(code: Code, target: Tensor, moment: Moment) -> Objective:
    """MSE + AuxK, the k largest a token taken from the whole batch (arXiv 2412.06410)."""
    outcome = topk(code, target, moment)
    return outcome._replace(smallest=_smallest(code))


def matryoshka_batchtopk(code: Code, target: Tensor, moment: Moment) -> Objective:
    """BatchTopK + the MSE of each smaller dictionary (arXiv 2503.17547)."""
    cfg = code.sae.cfg
    assert isinstance(cfg, MatryoshkaBatchTopKConfig)
    feature_acts = code.chosen((code.projection + code.of(code.sae.get_parameter("b_enc") + code.shift)).relu())
    nested = code.decode_nested(feature_acts, cfg.widths) + code.sae.b_dec  # (n_tokens, n_widths, d_in)
    sae_out = nested[:, -1]
    parts = {"mse_loss": losses.mse_loss(sae_out, target), **_aux_k(code, target - sae_out, moment)}
    for place, width in enumerate(cfg.widths[:-1]):
        parts[f"inner_mse_loss_{width}"] = losses.mse_loss(nested[:, place], target)
    return _objective(code, parts, sae_out, feature_acts, _l1(code, feature_acts), _smallest(code))


def _reconstruct(code: Code, feature_acts: Tensor, moment: Moment) -> Tensor:
    sae_out = code.decode(feature_acts) + code.sae.b_dec
    return sae_out if moment.skip is None else sae_out + moment.skip


def _l1_weight(code: Code, moment: Moment) -> float:
    weight = moment.hp.l1_coefficient
    return default_l1_coefficient(code.sae.cfg.activation, code.sae.cfg.d_in) if weight is None else weight


def _l1(code: Code, feature_acts: Tensor) -> Tensor:
    """Mean over tokens of Σ f·n, summed by feature first: the norms then meet d_sae numbers and not all of them."""
    return (code.per_feature(feature_acts) * code.sae.W_dec.norm(dim=-1)).sum() / len(code.x)


def _aux_k(code: Code, residual: Tensor, moment: Moment) -> dict[str, Tensor]:
    """AuxK: dead features, without b_dec and without a ReLU, learn to reconstruct what the living ones left.

    Only their columns take part, and they do so densely: each of them gets a gradient for its encoder.
    """
    coefficient = moment.hp.aux_loss_coefficient
    n_dead = int(moment.dead.sum())
    if not n_dead or not coefficient:
        return {}
    sae = code.sae
    features = moment.dead.nonzero().squeeze(1)
    hidden_pre = code.columns(features) + (sae.get_parameter("b_enc") + code.shift)[features]
    scores = hidden_pre.detach() * sae.W_dec.detach()[features].norm(dim=-1) if _rescales(sae) else hidden_pre.detach()
    d = residual.shape[-1]
    recons = code.decode_columns(losses.keep_top(hidden_pre, scores, min(n_dead, max(1, d // 2))), features)
    loss = losses.mse_loss(recons.float(), residual.detach())
    return {"auxiliary_reconstruction_loss": coefficient * losses.aux_k_scale(n_dead, d) * loss}


def _rescales(sae: SAE) -> bool:
    return getattr(sae.cfg, "rescale_acts_by_decoder_norm", True)


@torch.no_grad()
def _smallest(code: Code) -> Tensor:
    scores = code.chosen((code.projection + code.of(code.sae.get_parameter("b_enc") + code.shift)).relu()).float()
    scores = scores * code.of(code.sae.W_dec.norm(dim=-1))
    return scores.masked_fill(scores <= 0, torch.inf).amin() if scores.numel() else scores.new_tensor(torch.inf)


def _objective(
    code: Code,
    parts: dict[str, Tensor],
    sae_out: Tensor,
    feature_acts: Tensor,
    l1: Tensor,
    smallest: Tensor | None = None,
) -> Objective:
    loss = torch.stack(list(parts.values())).sum()
    return Objective(loss, parts, sae_out, code.n_fired(feature_acts.detach()), l1, smallest)


OBJECTIVES: dict[str, Callable[[Code, Tensor, Moment], Objective]] = {
    "standard": standard,
    "gated": gated,
    "jumprelu": jumprelu,
    "topk": topk,
    "batchtopk": batchtopk,
    "matryoshka_batchtopk": matryoshka_batchtopk,
    "transcoder": standard,
    "skip_transcoder": standard,
    "jumprelu_transcoder": jumprelu,
    "jumprelu_skip_transcoder": jumprelu,
    "topk_transcoder": topk,
    "topk_skip_transcoder": topk,
}
"""By architecture: (code, target, moment) → Objective."""
