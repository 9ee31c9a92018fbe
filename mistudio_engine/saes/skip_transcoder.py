"""The skip transcoder: a transcoder with a linear path beside the features (arXiv 2501.18823)."""

from __future__ import annotations

from torch import Tensor, nn

from mistudio_engine.saes.transcoder import Transcoder

__all__ = ["SkipTranscoder"]


class SkipTranscoder(Transcoder):
    """A transcoder plus x·W_skipᵀ, W_skip (d_out, d_in). `decode` leaves the skip out, the forward pass has it."""

    W_skip: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """The prediction, (…, d_out): what the features say and what the skip path carries over from the raw input."""
        return self.decode(self.encode(x)) + self._flat(x).to(self.dtype) @ self.W_skip.T
