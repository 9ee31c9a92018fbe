"""The transcoder: reads at one hook and predicts another, an MLP's input and output for example (arXiv 2406.11944)."""

from __future__ import annotations

from torch import Tensor, nn

from mistudio_engine.saes.base import SAE

__all__ = ["Transcoder"]


class Transcoder(SAE):
    """A standard SAE whose output belongs elsewhere: W_dec (d_sae, d_out), b_dec (d_out,).

    b_dec is never subtracted from the input, and the input's norm is never undone on the output.
    """

    b_enc: nn.Parameter
    undoes_norm = False

    def encode_normalized(self, z: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See SAE."""
        hidden_pre = z @ self.of("W_enc", features) + self.of("b_enc", features)
        return hidden_pre.relu(), hidden_pre
