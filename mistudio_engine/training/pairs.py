"""A sparse pattern of (token, feature) pairs, and the two halves of an SAE computed at those pairs only.

Where only some features of a token take part, encoding is a dot product a pair, decoding a weighted sum of decoder rows
a token, and both weight gradients a sum over the pairs of a feature: the cost is proportional to the pairs and not to
d_sae. The results are those of the dense computation with zeros elsewhere, within rounding. It knows no architecture
and no loss.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Pairs", "dot_products"]

with warnings.catch_warnings():
    # Torch says once a process that these tensors are in beta; a test of ours compares them with dense ones instead.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0), (0, 1))


class _ByFeature(NamedTuple):
    """The pairs sorted by feature; within a feature in the order of their bags."""

    order: Tensor
    """(n,): where each stands in the pattern."""

    bags: Tensor
    """(n,): its bag."""

    offsets: Tensor
    """(d_sae + 1,): where each feature's pairs begin."""


class Pairs:
    """Which features take part on which token.

    Args:
        features: (n,) int64, bag after bag.
        offsets: (n_bags + 1,) int64: where each bag's features begin.
        d_sae: number of features.

    A bag is a token, or one part of a token's features that is decoded for itself (`split`).
    """

    def __init__(self, features: Tensor, offsets: Tensor, d_sae: int) -> None:
        self.features, self.offsets, self.d_sae = features, offsets, d_sae

    @classmethod
    def of_mask(cls, mask: Tensor) -> Pairs:
        """The pattern of a mask (n_tokens, d_sae)."""
        n_each = mask.sum(dim=-1)
        return cls(mask.nonzero()[:, 1], _starts(n_each), mask.shape[-1])

    @classmethod
    def of_indices(cls, indices: Tensor, d_sae: int) -> Pairs:
        """The pattern that has the features `indices` (n_tokens, k) on each token."""
        n_tokens, k = indices.shape
        offsets = torch.arange(0, n_tokens * k + 1, k, device=indices.device) if k else indices.new_zeros(n_tokens + 1)
        return cls(indices.reshape(-1), offsets, d_sae)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.features)

    @property
    def n_bags(self) -> int:
        """Number of tokens, or of their parts."""
        return len(self.offsets) - 1

    @cached_property
    def bags(self) -> Tensor:
        """The bag of each pair, (n,)."""
        n_each = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(self.n_bags, device=n_each.device), n_each, output_size=len(self))

    @cached_property
    def _by_feature(self) -> _ByFeature:
        order = torch.argsort(self.features, stable=True)
        n_each = torch.bincount(self.features, minlength=self.d_sae)
        return _ByFeature(order, self.bags[order], _starts(n_each))

    def where(self, kept: Tensor) -> Pairs:
        """The pairs that `kept` (n,) says."""
        before = torch.zeros(len(self) + 1, dtype=torch.long, device=kept.device)
        torch.cumsum(kept, 0, out=before[1:])
        return Pairs(self.features[kept], before[self.offsets], self.d_sae)

    def between(self, start: int, stop: int) -> tuple[Pairs, slice]:
        """The pairs of some bags, and where they stand in this pattern."""
        first, last = self.offsets[[start, stop]].tolist()
        return Pairs(self.features[first:last], self.offsets[start : stop + 1] - first, self.d_sae), slice(first, last)

    def mask(self) -> Tensor:
        """The pattern as a mask, (n_bags, d_sae)."""
        mask = torch.zeros(self.n_bags, self.d_sae, dtype=torch.bool, device=self.features.device)
        mask[self.bags, self.features] = True
        return mask

    def split(self, widths: tuple[int, ...]) -> tuple[Pairs, Tensor]:
        """Each token's features apart by the nested dictionary that they are new in.

        Args:
            widths: growing numbers of features, the last one d_sae.

        Returns:
            Pairs with len(widths) bags a token, and the order (n,) in which this pattern's pairs stand there.
        """
        edges = torch.tensor(widths, device=self.features.device)
        part = torch.bucketize(self.features, edges, right=True)
        bag = self.bags * len(widths) + part
        order = torch.argsort(bag, stable=True)
        n_each = torch.bincount(bag, minlength=self.n_bags * len(widths))
        return Pairs(self.features[order], _starts(n_each), self.d_sae), order

    def encode(self, x: Tensor, W_enc: Tensor, values: Tensor) -> Tensor:
        """x·W_enc at the pairs, (n,), with gradient for W_enc.

        Args:
            x: (n_tokens, d_in); **no** gradient reaches it.
            W_enc: (d_in, d_sae), by feature in memory.
            values: (n,): the result, which whoever found the pairs has already.
        """
        return _Encode.apply(x, W_enc, values, self)  # pyright: ignore[reportReturnType]

    def decode(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """The sum of value times decoder row over each bag, (n_bags, d_out); values (n,), W_dec (d_sae, d_out)."""
        return _Decode.apply(values, W_dec, self)  # pyright: ignore[reportReturnType]

    def per_bag(self, values: Tensor) -> Tensor:
        """The sum of `values` (n,) over each bag, (n_bags,), with gradient."""
        zeros = torch.zeros(self.n_bags, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, self.bags, values)

    def per_feature(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Σ weight·rows[bag] over each feature's pairs, (d_sae, d), without gradient; rows (n_bags, d), weights (n,).

        Summed in the order of the bags, so the same pattern gives the same bits.
        """
        order, bags, offsets = self._by_feature
        return functional.embedding_bag(
            bags, rows, offsets, per_sample_weights=weights[order], mode="sum", include_last_offset=True
        )


def dot_products(pairs: Pairs, rows: Tensor, by_feature: Tensor) -> Tensor:
    """⟨rows[bag], by_feature[feature]⟩ of each pair, (n,); rows (n_bags, d), by_feature (d_sae, d)."""
    if not len(pairs):
        return rows.new_zeros(0)
    pattern = torch.sparse_csr_tensor(
        pairs.offsets,
        pairs.features,
        rows.new_zeros(len(pairs)),
        size=(pairs.n_bags, pairs.d_sae),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, rows, by_feature.T, beta=0.0).values()


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, values: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(x)
        ctx.pairs = pairs
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return None, ctx.pairs.per_feature(x, grads[0]).T, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pairs: Pairs) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.pairs = pairs
        if not len(pairs):
            return W_dec.new_zeros(pairs.n_bags, W_dec.shape[1])
        return functional.embedding_bag(
            pairs.features,
            W_dec,
            pairs.offsets,
            per_sample_weights=values,
            mode="sum",
            include_last_offset=True,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        values, W_dec = ctx.saved_tensors
        grad_out = grads[0].contiguous()
        return dot_products(ctx.pairs, grad_out, W_dec), ctx.pairs.per_feature(grad_out, values), None


def _starts(n_each: Tensor) -> Tensor:
    starts = torch.zeros(len(n_each) + 1, dtype=torch.long, device=n_each.device)
    torch.cumsum(n_each, 0, out=starts[1:])
    return starts
