"""The TopK SAE: the k largest pre-activations of each token (arXiv 2406.04093)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mistudio_engine.api.sae_config import TopKConfig
from mistudio_engine.saes.base import SAE

__all__ = ["TopKSAE"]

_TINY = 1e-12
"""A decoder row of zeros has no norm to divide by: its feature decodes to nothing instead of NaN."""


class TopKSAE(SAE):
    """feature_acts = relu of the k largest of z·W_enc + b_enc: fewer than k where those are negative. b_enc (d_sae,).

    With `rescale_acts_by_decoder_norm` the choice is made on p·‖W_dec row‖, which is then the activation, and decoding
    divides by the norm again: the decoder's rows count as if they had norm 1.
    """

    cfg: TopKConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    b_enc: nn.Parameter

    def encode_normalized(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See SAE; for some features the whole choice has to be made all the same."""
        hidden_pre = self.hidden_pre(z)
        top = torch.topk(hidden_pre, self.cfg.k, dim=-1, sorted=False)
        feature_acts = torch.zeros_like(hidden_pre).scatter(-1, top.indices, top.values.relu())
        if features is None:
            return feature_acts, hidden_pre
        return feature_acts[..., features], hidden_pre[..., features]

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See SAE; here without ever building the dense (n, d_sae) activations."""
        top = torch.topk(self.hidden_pre(self.normalize(self._flat(x))[0]), self.cfg.k, dim=-1, sorted=False)
        return top.values.relu(), top.indices

    def hidden_pre(self, z: Tensor) -> Tensor:
        """What the k largest are chosen from, (…, d_sae)."""
        hidden_pre = self.centre(z) @ self.W_enc + self.b_enc
        return hidden_pre * self._decoder_norms() if self.cfg.rescale_acts_by_decoder_norm else hidden_pre

    def reconstruct(self, feature_acts: Tensor) -> Tensor:
        """See SAE."""
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts * (1 / self._decoder_norms())
        return feature_acts @ self.W_dec + self.b_dec

    def _decoder_norms(self) -> Tensor:
        return self.W_dec.norm(dim=-1).clamp_min(_TINY)
