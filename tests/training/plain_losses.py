"""What every architecture minimises, written down once more and plainly: float64, dense, autograd on the formulas.

It shares no line with the product. Only the jump has no derivative to differentiate: its estimate is a ramp as wide as
the bandwidth, which stands in for the step in the gradient alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistudio_engine.api.sae_config import SAEConfig
from mistudio_engine.api.training_config import Hyperparameters


def plain_parts(
    cfg: SAEConfig, hp: Hyperparameters, weights: dict[str, Tensor], x: Tensor, y: Tensor, dead: Tensor
) -> dict[str, Tensor]:
    """The terms of the loss at full sparsity; all tensors float64, x and y in normalised space."""
    W_enc, W_dec, b_dec = weights["W_enc"], weights["W_dec"], weights["b_dec"]
    z = x - b_dec if cfg.apply_b_dec_to_input else x
    skip = x @ weights["W_skip"].T if cfg.has_skip else 0
    norms = (W_dec**2).sum(1).sqrt()

    def rebuilt(feature_acts: Tensor) -> Tensor:
        return feature_acts @ W_dec + b_dec + skip

    def error(sae_out: Tensor) -> Tensor:
        return ((sae_out - y) ** 2).sum(1).mean()

    if cfg.activation == "gated":
        gate = z @ W_enc + weights["b_gate"]
        magnitude = z @ (W_enc * weights["r_mag"].exp()) + weights["b_mag"]
        acts = (gate > 0).double() * magnitude.clamp_min(0)
        l1 = (gate.clamp_min(0) * norms).sum(1).mean()
        return {
            "mse_loss": error(rebuilt(acts)),
            "l1_loss": hp.l1_coefficient * l1,
            "auxiliary_reconstruction_loss": error(rebuilt(gate.clamp_min(0))),
        }

    hidden_pre = z @ W_enc + weights["b_enc"]
    if cfg.activation == "relu":
        acts = hidden_pre.clamp_min(0)
        return {"mse_loss": error(rebuilt(acts)), "l1_loss": hp.l1_coefficient * (acts * norms).sum(1).mean()}

    if cfg.activation == "jumprelu":
        threshold, width = weights["threshold"], hp.jumprelu_bandwidth
        ramp = ((hidden_pre.detach() - threshold) / width + 0.5).clamp(0, 1)
        gate = (hidden_pre > threshold).double() + ramp - ramp.detach()
        acts = hidden_pre * (hidden_pre > threshold).double() + threshold.detach() * (ramp - ramp.detach())
        if hp.l0_penalty == "step":
            penalty = gate.sum(1).mean()
        elif hp.l0_penalty == "tanh":
            penalty = (hp.tanh_scale * acts * norms).tanh().sum(1).mean()
        else:
            assert hp.target_l0 is not None
            penalty = ((gate.sum(1) - hp.target_l0) ** 2 * 2 / hp.target_l0).mean()
        parts = {"mse_loss": error(rebuilt(acts)), "l0_loss": hp.l0_coefficient * penalty}
        if hp.pre_act_loss_coefficient is not None and dead.any():
            below = ((threshold - hidden_pre).clamp_min(0) * norms)[:, dead].sum(1)
            parts["pre_act_loss"] = hp.pre_act_loss_coefficient * below.mean()
        return parts

    k = cfg.k  # pyright: ignore
    scores = hidden_pre * norms
    if cfg.activation == "topk":
        edge = scores.sort(1, descending=True).values[:, k - 1 : k]
    else:
        edge = scores.clamp_min(0).flatten().sort(descending=True).values[k * len(x) - 1]
    acts = hidden_pre.clamp_min(0) * (scores >= edge)
    parts = {"mse_loss": error(rebuilt(acts))}
    n_dead, half = int(dead.sum()), y.shape[1] // 2
    if n_dead and hp.aux_loss_coefficient:
        of_dead = scores.masked_fill(~dead, -torch.inf)
        least = of_dead.sort(1, descending=True).values[:, min(n_dead, half) - 1 : min(n_dead, half)]
        left = (hidden_pre * (of_dead >= least)) @ W_dec
        residual = (y - rebuilt(acts)).detach()
        share = hp.aux_loss_coefficient * min(n_dead / half, 1)
        parts["auxiliary_reconstruction_loss"] = share * ((left - residual) ** 2).sum(1).mean()
    for width in getattr(cfg, "widths", ())[:-1]:
        first = acts * (torch.arange(cfg.d_sae) < width)
        parts[f"inner_mse_loss_{width}"] = error(rebuilt(first))
    return parts
