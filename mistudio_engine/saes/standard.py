"""The standard SAE: a ReLU, made sparse by an L1 penalty in training."""

from __future__ import annotations

from torch import Tensor, nn

from mistudio_engine.saes.base import SAE

__all__ = ["StandardSAE"]


class StandardSAE(SAE):
    """feature_acts = relu(z·W_enc + b_enc). b_enc (d_sae,)."""

    b_enc: nn.Parameter

    def encode_normalized(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See SAE."""
        hidden_pre = self.centre(z) @ self.of("W_enc", features) + self.of("b_enc", features)
        return hidden_pre.relu(), hidden_pre
