"""From the weights in training to the SAE that others can use: everything folded, one architecture of the field's.

BatchTopK and matryoshka SAEs come out as JumpReLU with one threshold, as in SAELens. It does not know the trainer.
"""

from __future__ import annotations

from typing import Any

import torch

from mistudio_engine.api.sae_config import JumpReLUConfig, SAEConfig
from mistudio_engine.saes import SAE, fold_decoder_norms, fold_normalization, new_sae
from mistudio_engine.training.scaling import Scaling

__all__ = ["finished", "first_weights"]


def first_weights(cfg: SAEConfig, init_norm: float, init_threshold: float, generator: torch.Generator) -> SAE:
    """Random decoder rows of one norm, the encoder their transpose, biases zero (Anthropic, April 2024).

    A transcoder's encoder is random by itself, since its output is not its input; its skip path starts at zero. A TopK
    SAE is trained with its decoder rows taken as of norm 1 in the choice, whatever their length.
    """
    fields: dict[str, Any] = {"dtype": "float32"}
    if cfg.activation == "topk":
        fields["rescale_acts_by_decoder_norm"] = True
    sae = new_sae(cfg.model_copy(update=fields))
    with torch.no_grad():
        W_dec = torch.randn(sae.W_dec.shape, generator=generator)
        sae.W_dec.copy_(W_dec * (init_norm / W_dec.norm(dim=-1, keepdim=True)))
        if cfg.is_transcoder:
            W_enc = torch.randn(cfg.d_sae, cfg.d_in, generator=generator)
            sae.W_enc.copy_((W_enc * (init_norm / W_enc.norm(dim=-1, keepdim=True))).T)
        else:
            sae.W_enc.copy_(sae.W_dec.T)
        if cfg.activation == "jumprelu":
            sae.get_parameter("threshold").fill_(init_threshold)
    return sae


@torch.no_grad()
def finished(
    sae: SAE,
    cfg: SAEConfig,
    scaling: Scaling,
    target_scaling: Scaling,
    batch_threshold: float,
    training: dict[str, Any],
) -> SAE:
    """A copy of `sae` for raw activations, with decoder rows of norm 1.

    Args:
        sae: in training.
        cfg: what was asked for.
        scaling: of the input.
        target_scaling: of a transcoder's output.
        batch_threshold: BatchTopK's, for activations with decoder norms in them.
        training: how it was made, for its metadata.
    """
    copy = new_sae(
        sae.cfg, {name: p.detach().clone(memory_format=torch.preserve_format) for name, p in sae.named_parameters()}
    )
    if cfg.activation == "batchtopk":
        copy.get_parameter("threshold").copy_(batch_threshold / copy.W_dec.norm(dim=-1).clamp_min(1e-8))
    if cfg.normalize_activations == "none":
        if cfg.is_transcoder:
            fold_normalization(
                copy, scaling.scale, scaling.mean, out_scale=target_scaling.scale, out_mean=target_scaling.mean
            )
        else:
            fold_normalization(copy, scaling.scale, scaling.mean)
    fold_decoder_norms(copy)
    values = cfg.model_dump(exclude={"metadata", "architecture"})
    ours = {**cfg.metadata.get("mistudio", {}), "training": training}
    metadata = {**cfg.metadata, "training_architecture": cfg.architecture, "mistudio": ours}
    result: SAEConfig
    if cfg.activation == "batchtopk":
        training["k"] = values.pop("k")
        if "widths" in values:
            training["widths"] = list(values.pop("widths"))
        result = JumpReLUConfig(**values, metadata=metadata)
    else:
        if cfg.activation == "topk":
            values["rescale_acts_by_decoder_norm"] = False
        result = type(cfg)(**values, metadata=metadata)
    tensors = {name: p.detach().cpu().contiguous() for name, p in copy.named_parameters()}
    return new_sae(result, tensors).to(sae.device)
