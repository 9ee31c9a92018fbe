"""The gated SAE: one path says whether a feature is on, another how strong it is (arXiv 2404.16014)."""

from __future__ import annotations

from torch import Tensor, nn

from mistudio_engine.saes.base import SAE

__all__ = ["GatedSAE"]


class GatedSAE(SAE):
    """feature_acts = 1[z·W_enc + b_gate > 0] · relu(z·(W_enc·e^r_mag) + b_mag). Both paths share W_enc up to r_mag.

    b_gate, b_mag, r_mag (d_sae,); there is no b_enc. The pre-activation is the magnitude's.
    """

    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def encode_normalized(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See SAE."""
        # The gate is compared with exactly 0, so it is computed as SAELens does, not by rescaling the other product.
        W_enc = self.of("W_enc", features)
        hidden_pre = self.centre(z) @ (W_enc * self.of("r_mag", features).exp()) + self.of("b_mag", features)
        return (self.gate_pre(z, features) > 0).to(z.dtype) * hidden_pre.relu(), hidden_pre

    def gate_pre(self, z: Tensor, features: Tensor | None = None) -> Tensor:
        """The gate's pre-activation, (…, d_sae): above zero a feature is on. Training penalises it."""
        return self.centre(z) @ self.of("W_enc", features) + self.of("b_gate", features)
