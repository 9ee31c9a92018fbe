"""Scales and norms moved into the weights, so that the SAE computes the same without them.

Each changes an SAE in place and leaves its reconstructions as they were. It does not know where a scale came from.
"""

from __future__ import annotations

import torch

from mistudio_engine.api.errors import Unsupported
from mistudio_engine.saes.base import SAE
from mistudio_engine.saes.topk import TopKSAE

__all__ = ["fold_decoder_norms", "fold_input_scale"]

_SMALLEST_NORM = 1e-8
"""SAELens's floor for decoder norms: a row of zeros stays one."""


@torch.no_grad()
def fold_input_scale(sae: SAE, scale: float) -> None:
    """Make an SAE for x·scale one for x: W_enc·s, W_dec/s, b_dec/s; b_enc and thresholds stay, and so do activations.

    Raises:
        Unsupported: a transcoder, whose output has a scale of its own; a run-time norm, which leaves nothing to fold.
    """
    if not sae.undoes_norm or sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        raise Unsupported(f"There is no input scale to fold into this {sae.cfg.architecture} SAE.")
    sae.W_enc.mul_(scale)
    sae.W_dec.div_(scale)
    sae.b_dec.div_(scale)


@torch.no_grad()
def fold_decoder_norms(sae: SAE) -> None:
    """Give every decoder row norm 1 and its feature's activation the old norm: the unit in which features compare.

    W_dec/n, and W_enc, b_enc, threshold, b_gate, b_mag × n; r_mag stays. Reconstructions stay.

    Raises:
        Unsupported: a TopK SAE that chooses by pre-activation alone would choose differently afterwards.
    """
    if isinstance(sae, TopKSAE) and not sae.cfg.rescale_acts_by_decoder_norm:
        raise Unsupported(
            "Folding decoder norms into a TopK SAE would change which features it chooses.",
            why="It was made with rescale_acts_by_decoder_norm=False.",
            fix="Use it as it is.",
        )
    norms = sae.W_dec.norm(dim=-1).clamp_min(_SMALLEST_NORM)
    sae.W_dec.div_(norms[:, None])
    sae.W_enc.mul_(norms)
    for name in sae.cfg.per_feature:
        if name != "r_mag":
            getattr(sae, name).mul_(norms)
