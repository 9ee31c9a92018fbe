"""Scales, means and norms moved into the weights, so that the SAE computes the same without them.

Each changes an SAE in place and leaves its reconstructions as they were. It does not know where a scale came from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistudio_engine.api.errors import Unsupported
from mistudio_engine.saes.base import SAE
from mistudio_engine.saes.topk import TopKSAE

__all__ = ["fold_decoder_norms", "fold_normalization"]

_SMALLEST_NORM = 1e-8
"""SAELens's floor for decoder norms: a row of zeros stays one."""


@torch.no_grad()
def fold_normalization(
    sae: SAE,
    scale: float,
    mean: Tensor | None = None,
    *,
    out_scale: float | None = None,
    out_mean: Tensor | None = None,
) -> None:
    """Make an SAE for (x − mean)·scale one for x. Feature activations stay.

    W_enc·s and W_dec/s. The means go into b_dec where that is subtracted from the input, else into the encoder's
    biases.

    Args:
        sae: what was trained on normalised activations.
        scale: of the input; of the output as well, unless it is a transcoder.
        mean: of the input, (d_in,); None for zero.
        out_scale: of a transcoder's output.
        out_mean: of a transcoder's output, (d_out,).

    Raises:
        Unsupported: a transcoder without a scale for its output, or another SAE with one; a run-time norm, which leaves
            nothing to fold.
    """
    if sae.cfg.is_transcoder != (out_scale is not None):
        raise Unsupported(
            f"A {sae.cfg.architecture} has {'two scales' if sae.cfg.is_transcoder else 'one scale'} to fold.",
            fix="Give out_scale for transcoders, and only for them.",
        )
    if sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        raise Unsupported(f"There is no input scale to fold into this {sae.cfg.architecture} SAE.")
    scale_out = scale if out_scale is None else out_scale
    mean_out = mean if out_scale is None else out_mean
    if mean is not None and not sae.cfg.apply_b_dec_to_input:
        shift = (mean * scale).to(sae.dtype)  # (d_in,)
        for name in ("b_enc", "b_gate"):
            if name in sae.cfg.per_feature:
                getattr(sae, name).sub_(shift @ sae.W_enc)
        if "b_mag" in sae.cfg.per_feature:
            sae.get_parameter("b_mag").sub_((shift @ sae.W_enc) * sae.get_parameter("r_mag").exp())
        if sae.cfg.has_skip:
            sae.b_dec.sub_(sae.get_parameter("W_skip") @ shift)
    sae.W_enc.mul_(scale)
    sae.W_dec.div_(scale_out)
    sae.b_dec.div_(scale_out)
    if sae.cfg.has_skip:
        sae.get_parameter("W_skip").mul_(scale / scale_out)
    if mean_out is not None:
        sae.b_dec.add_(mean_out.to(sae.dtype))


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
