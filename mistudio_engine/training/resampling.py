"""Dead features get a new start, on inputs that the SAE reconstructs badly.

The method is Anthropic's (Towards Monosemanticity, 2023, appendix on neuron resampling). It does not know when: the
trainer does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.saes import SAE

__all__ = ["resample"]

_ENCODER_SCALE = 0.2
"""Of the living features' mean encoder norm: small enough not to take over at once (ibid.)."""


@torch.no_grad()
def resample(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    z: Tensor,
    sae_out: Tensor,
    dead: Tensor,
    hp: Hyperparameters,
    generator: torch.Generator,
) -> Tensor:
    """Point dead features at inputs drawn with probability ∝ squared loss, and forget their optimizer state.

    Args:
        z: inputs in normalised space, (batch, d_in).
        sae_out: their reconstructions.
        dead: bool (d_sae,).

    Returns:
        The indices that were given a new start, (n,); at most one an input.
    """
    features = dead.nonzero().squeeze(1)[: len(z)]
    if not len(features) or bool(dead.all()):
        return features[:0]
    losses = (z - sae_out).pow(2).sum(dim=-1)
    chance = losses.pow(2).cpu() + torch.finfo(torch.float32).tiny
    chosen = torch.multinomial(chance, len(features), generator=generator)
    directions = sae.centre(z)[chosen.to(z.device)]
    directions = directions / directions.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # (n, d_in)

    alive = ~dead
    sae.W_dec[features] = directions * sae.W_dec[alive].norm(dim=-1).mean()
    sae.W_enc[:, features] = directions.T * (_ENCODER_SCALE * sae.W_enc[:, alive].norm(dim=0).mean())
    for name in sae.cfg.per_feature:
        getattr(sae, name)[features] = hp.jumprelu_init_threshold if name == "threshold" else 0.0
    for name, parameter in sae.named_parameters():
        if name == "b_dec":
            continue
        for moment in optimizer.state[parameter].values():
            if moment.shape == parameter.shape:
                if name == "W_enc":
                    moment[:, features] = 0
                else:
                    moment[features] = 0
    return features
