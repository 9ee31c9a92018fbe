"""Dead features get a new start, on inputs that the SAE reconstructs badly.

The method is Anthropic's (Towards Monosemanticity, 2023, appendix on neuron resampling). It does not know when: the
trainer does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistudio_engine.saes import SAE

__all__ = ["resample"]

_ENCODER_SCALE = 0.2
"""Of the living features' mean encoder norm: small enough not to take over at once (ibid.)."""


@torch.no_grad()
def resample(
    sae: SAE,
    z: Tensor,
    target: Tensor,
    sae_out: Tensor,
    dead: Tensor,
    init_threshold: float,
    generator: torch.Generator,
) -> Tensor:
    """Point dead features at inputs drawn with probability ∝ squared loss; the caller forgets their optimizer state.

    Args:
        z: inputs in normalised space, (batch, d_in).
        target: what they should give: themselves, or a transcoder's (batch, d_out).
        sae_out: what they give.
        dead: bool (d_sae,).
        init_threshold: what JumpReLU's thresholds begin with.
        generator: draws the inputs.

    Returns:
        The indices that were given a new start, (n,); at most one an input.
    """
    features = dead.nonzero().squeeze(1)[: len(z)]
    if not len(features) or bool(dead.all()):
        return features[:0]
    residual = target - sae_out
    losses = residual.pow(2).sum(dim=-1)
    chance = losses.pow(2).cpu() + torch.finfo(torch.float32).tiny
    chosen = torch.multinomial(chance, len(features), generator=generator)
    chosen = chosen.to(z.device)
    directions = _unit(sae.centre(z)[chosen])  # (n, d_in)
    outward = _unit(residual[chosen]) if sae.cfg.is_transcoder else directions  # (n, d_out)

    alive = ~dead
    sae.W_dec[features] = outward * sae.W_dec[alive].norm(dim=-1).mean()
    sae.W_enc[:, features] = directions.T * (_ENCODER_SCALE * sae.W_enc[:, alive].norm(dim=0).mean())
    for name in sae.cfg.per_feature:
        getattr(sae, name)[features] = init_threshold if name == "threshold" else 0.0
    return features


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
