"""The code of some inputs: pre-activations of the features that take part, dense or sparse, behind one set of words.

An objective (objectives.py) is written once, in these words. A dense code holds a number for each token and feature; a
sparse one for each pair that takes part, where all others are known to give nothing. It knows no loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mistudio_engine.saes import SAE
from mistudio_engine.training.pairs import Pairs

__all__ = ["Code", "DenseCode", "SparseCode"]

_COUNTED_TOKENS = 128


class Code(ABC):
    """What an objective sees of a batch.

    "Values" are a tensor of this code's own shape: (n_tokens, d_sae) where it is dense, (n_pairs,) where it is sparse.
    """

    projection: Tensor
    """x·W_enc, values with gradient; without any bias."""

    shift: Tensor
    """Zeros, (d_sae,), to be added to whatever bias is added to the projection: they carry the gradient that b_dec has
    because x = z − b_dec. Going through x it would cost another product over all features."""

    def __init__(self, sae: SAE, x: Tensor, bf16: bool) -> None:
        self.sae, self.x, self.bf16 = sae, x, bf16
        if sae.cfg.apply_b_dec_to_input:
            self.shift = (sae.b_dec.detach() - sae.b_dec) @ sae.W_enc.detach()
        else:
            self.shift = torch.zeros(sae.cfg.d_sae, device=x.device)

    @abstractmethod
    def of(self, per_feature: Tensor) -> Tensor:
        """A number per feature, (d_sae,), beside the values."""

    @abstractmethod
    def chosen(self, values: Tensor) -> Tensor:
        """The values of the features that were chosen, zero for others."""

    @abstractmethod
    def per_token(self, values: Tensor) -> Tensor:
        """Their sum over features, (n_tokens,)."""

    @abstractmethod
    def per_feature(self, values: Tensor) -> Tensor:
        """Their sum over tokens, (d_sae,), fp32."""

    @abstractmethod
    def n_fired(self, values: Tensor) -> Tensor:
        """On how many tokens each feature is active, (d_sae,), int64; values are not negative."""

    @abstractmethod
    def decode(self, values: Tensor) -> Tensor:
        """Σ value · decoder row, (n_tokens, d_out), without b_dec."""

    @abstractmethod
    def decode_nested(self, values: Tensor, widths: tuple[int, ...]) -> Tensor:
        """Likewise from the first widths[i] features only, (n_tokens, len(widths), d_out); the last of them is all."""

    def columns(self, features: Tensor) -> Tensor:
        """x·W_enc of some features on every token, (n_tokens, n), with gradient: for those that nobody chooses."""
        return self._product(self.x, self.sae.W_enc.T[features].T)

    def decode_columns(self, values: Tensor, features: Tensor) -> Tensor:
        """Σ value · decoder row of some features, (n_tokens, d_out); values (n_tokens, n)."""
        return self._product(values, self.sae.W_dec[features])

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        with torch.autocast(left.device.type, torch.bfloat16, enabled=self.bf16):
            return left @ right


class DenseCode(Code):
    """A number for each token and feature.

    Args:
        sae: its weights.
        x: centred inputs, (n_tokens, d_in), without gradient.
        bf16: make products in bfloat16; sums stay in fp32.
        mask: the features that were chosen, (n_tokens, d_sae); None where all take part.
    """

    def __init__(self, sae: SAE, x: Tensor, bf16: bool = False, mask: Tensor | None = None) -> None:
        super().__init__(sae, x, bf16)
        self.mask = mask
        self.projection = self._product(x, sae.W_enc)

    def of(self, per_feature: Tensor) -> Tensor:
        """See Code."""
        return per_feature.to(self.projection.dtype)

    def chosen(self, values: Tensor) -> Tensor:
        """See Code."""
        return values if self.mask is None else values * self.mask

    def per_token(self, values: Tensor) -> Tensor:
        """See Code."""
        return values.sum(dim=-1).float()  # summed in fp32 inside; asking for another dtype would copy the matrix first

    def per_feature(self, values: Tensor) -> Tensor:
        """See Code."""
        return values.sum(dim=0).float()

    def n_fired(self, values: Tensor) -> Tensor:
        """See Code."""
        # Blocks of 128 tokens, since bfloat16 counts exactly up to 256: several times faster than summing flags.
        blocks = values.sign().split(_COUNTED_TOKENS)
        return torch.stack([block.sum(dim=0) for block in blocks]).sum(dim=0, dtype=torch.float32).long()

    def decode(self, values: Tensor) -> Tensor:
        """See Code."""
        return self._product(values, self.sae.W_dec).float()

    def decode_nested(self, values: Tensor, widths: tuple[int, ...]) -> Tensor:
        """See Code."""
        W_dec = self.sae.W_dec
        edges = (0, *widths)
        new = [
            self._product(values[:, low:high], W_dec[low:high]).float()
            for low, high in zip(edges, widths, strict=False)
        ]
        return torch.stack(new, dim=1).cumsum(dim=1)


class SparseCode(Code):
    """A number for each pair that takes part.

    Args:
        sae: its weights.
        x: centred inputs, (n_tokens, d_in).
        pairs: the features that were chosen.
        projection: x·W_enc there, (n_pairs,), as `Selector` found it.
        bf16: make the products of `columns` in bfloat16.
    """

    def __init__(self, sae: SAE, x: Tensor, pairs: Pairs, projection: Tensor, bf16: bool = False) -> None:
        super().__init__(sae, x, bf16)
        self.pairs = pairs
        self.projection = pairs.encode(x, sae.W_enc, projection)

    def of(self, per_feature: Tensor) -> Tensor:
        """See Code."""
        return per_feature[self.pairs.features]

    def chosen(self, values: Tensor) -> Tensor:
        """See Code: all of them were."""
        return values

    def per_token(self, values: Tensor) -> Tensor:
        """See Code."""
        return self.pairs.per_bag(values)

    def per_feature(self, values: Tensor) -> Tensor:
        """See Code."""
        zeros = torch.zeros(self.pairs.d_sae, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, self.pairs.features, values)

    def n_fired(self, values: Tensor) -> Tensor:
        """See Code."""
        return torch.bincount(self.pairs.features[values > 0], minlength=self.pairs.d_sae)

    def decode(self, values: Tensor) -> Tensor:
        """See Code."""
        return self.pairs.decode(values, self.sae.W_dec)

    def decode_nested(self, values: Tensor, widths: tuple[int, ...]) -> Tensor:
        """See Code."""
        parts, order = self.pairs.split(widths)
        new = parts.decode(values[order], self.sae.W_dec)
        return new.view(self.pairs.n_bags, len(widths), -1).cumsum(dim=1)
