"""Which class runs which architecture: a new activation is a file, a config in the union, and a line here.

A class is an activation. Whether the SAE reads and writes at one hook, at two (a transcoder), or has a linear path
beside its features is wiring, which the config says and the base class does.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mistudio_engine.api.sae_config import SAEConfig
from mistudio_engine.saes.base import SAE
from mistudio_engine.saes.gated import GatedSAE
from mistudio_engine.saes.jumprelu import JumpReLUSAE
from mistudio_engine.saes.standard import StandardSAE
from mistudio_engine.saes.topk import TopKSAE

__all__ = ["ARCHITECTURES", "new_sae"]

ARCHITECTURES: dict[str, type[SAE]] = {
    "standard": StandardSAE,
    "gated": GatedSAE,
    "jumprelu": JumpReLUSAE,
    "topk": TopKSAE,
    "batchtopk": JumpReLUSAE,
    "matryoshka_batchtopk": JumpReLUSAE,
    "transcoder": StandardSAE,
    "skip_transcoder": StandardSAE,
    "jumprelu_transcoder": JumpReLUSAE,
    "jumprelu_skip_transcoder": JumpReLUSAE,
    "topk_transcoder": TopKSAE,
    "topk_skip_transcoder": TopKSAE,
}


def new_sae(cfg: SAEConfig, tensors: Mapping[str, Tensor] | None = None) -> SAE:
    """The module that a config describes, around `tensors` or around zeros.

    Raises:
        WrongShape: the tensors are not those of the config.
    """
    return ARCHITECTURES[cfg.architecture](cfg, tensors)
