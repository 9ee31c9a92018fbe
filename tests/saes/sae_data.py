"""Small random SAEs of every architecture, and activations for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mistudio_engine.api.sae_config import activation_of, parse_sae_config
from mistudio_engine.saes import ARCHITECTURES, SAE, new_sae

ALL = sorted(ARCHITECTURES)
TRANSCODERS = [name for name in ALL if "transcoder" in name]
SKIPS = [name for name in ALL if "skip" in name]
WITH_K = [name for name in ALL if activation_of(name) in ("topk", "batchtopk")]
IN_SAELENS = [
    "gated",
    "jumprelu",
    "jumprelu_skip_transcoder",
    "jumprelu_transcoder",
    "skip_transcoder",
    "standard",
    "topk",
    "transcoder",
]


def config_values(architecture: str, d_in: int = 12, d_sae: int = 40, **more: Any) -> dict[str, Any]:
    """The least that a config of this architecture needs."""
    values: dict[str, Any] = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae}
    if architecture in WITH_K:
        values["k"] = min(5, d_sae)
    if architecture == "matryoshka_batchtopk":
        values["widths"] = sorted({max(1, d_sae // 2), d_sae})
    if architecture in TRANSCODERS:
        values["d_out"] = d_in + 3
    return values | more


def random_sae(architecture: str, seed: int = 0, **more: Any) -> SAE:
    """An SAE with every tensor random and none zero; thresholds are positive."""
    cfg = parse_sae_config(config_values(architecture, **more))
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in cfg.tensor_shapes().items()}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs() + 0.05
    return new_sae(cfg, {name: tensor.to(getattr(torch, cfg.dtype)) for name, tensor in tensors.items()})


def activations(sae: SAE, n: int = 64, seed: int = 1) -> Tensor:
    """(n, d_in)"""
    return torch.randn(n, sae.cfg.d_in, generator=torch.Generator().manual_seed(seed)) * 2
