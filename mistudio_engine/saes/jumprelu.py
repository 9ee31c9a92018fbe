"""The JumpReLU SAE: a feature is on above a threshold of its own (arXiv 2407.14435)."""

from __future__ import annotations

from torch import Tensor, nn

from mistudio_engine.saes.base import SAE

__all__ = ["JumpReLUSAE"]


class JumpReLUSAE(SAE):
    """feature_acts = relu(p)·1[p > threshold] with p = z·W_enc + b_enc; strictly above. b_enc, threshold (d_sae,).

    The step has no gradient: training puts its own activation in this one's place (training/losses.py).
    """

    b_enc: nn.Parameter
    threshold: nn.Parameter

    def encode_normalized(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See SAE."""
        hidden_pre = self.hidden_pre(z, features)
        return hidden_pre.relu() * (hidden_pre > self.of("threshold", features)).to(z.dtype), hidden_pre

    def hidden_pre(self, z: Tensor, features: Tensor | None = None) -> Tensor:
        """The pre-activation p, (…, d_sae)."""
        return self.centre(z) @ self.of("W_enc", features) + self.of("b_enc", features)
