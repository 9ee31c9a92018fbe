"""Which class runs which architecture: a new one is a file, a config in the union, and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mistudio_engine.api.sae_config import SAEConfig
from mistudio_engine.saes.base import SAE
from mistudio_engine.saes.gated import GatedSAE
from mistudio_engine.saes.jumprelu import JumpReLUSAE
from mistudio_engine.saes.skip_transcoder import SkipTranscoder
from mistudio_engine.saes.standard import StandardSAE
from mistudio_engine.saes.topk import TopKSAE
from mistudio_engine.saes.transcoder import Transcoder

__all__ = ["ARCHITECTURES", "new_sae"]

ARCHITECTURES: dict[str, type[SAE]] = {
    "standard": StandardSAE,
    "gated": GatedSAE,
    "jumprelu": JumpReLUSAE,
    "topk": TopKSAE,
    "transcoder": Transcoder,
    "skip_transcoder": SkipTranscoder,
}


def new_sae(cfg: SAEConfig, tensors: Mapping[str, Tensor] | None = None) -> SAE:
    """The module that a config describes, around `tensors` or around zeros.

    Raises:
        WrongShape: the tensors are not those of the config.
    """
    return ARCHITECTURES[cfg.architecture](cfg, tensors)
