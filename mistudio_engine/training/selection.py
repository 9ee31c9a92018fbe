"""Which features take part on which token, found without keeping a dense matrix of pre-activations.

The one product over all features is made a block of tokens at a time, in bfloat16 where that is fast, into a buffer
that is used again and again. What it finds are candidates, some more than are wanted: their pre-activations are
computed anew in fp32 and decide. So bfloat16 costs no precision in any value; it can only swap features that are next
to equal at the edge of the choice. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mistudio_engine.training.pairs import Pairs, dot_products

__all__ = ["Chosen", "Selector"]

_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
"""Of a block of pre-activations: on a CPU it should stay near the caches."""

_GROUPS = 16
"""Features to a group when the largest are looked for. A group's maximum says whether to look inside."""

_MORE_CANDIDATES = 1.125
"""Candidates in bfloat16 for each that is wanted."""

_MARGIN = 2.0**-6
"""How far below an edge candidates are still taken, as a share of what bfloat16 can be wrong by: its inputs are
rounded by up to 2⁻⁸ of themselves, and the errors of a dot product add up like random numbers."""

_SAMPLE_STRIDE = 61
"""BatchTopK estimates its edge on every so many pre-activations; a prime, so that no feature is missed."""


class Chosen(NamedTuple):
    """The outcome of a choice."""

    pairs: Pairs

    projection: Tensor
    """x·W_enc at the pairs, (n,), fp32."""


class Selector:
    """Finds pairs for one SAE's weights, keeping the buffers it works in.

    Args:
        bf16: make the dense product in bfloat16.
    """

    def __init__(self, bf16: bool) -> None:
        self.bf16 = bf16
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def top_k(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None, k: int) -> Chosen:
        """Each token's k largest (x·W_enc + b_enc)·norms.

        Args:
            x: (n_tokens, d_in), centred.
            W_enc: (d_in, d_sae).
            b_enc: (d_sae,).
            norms: (d_sae,), or None for ones.
            k: how many.
        """
        d_sae = W_enc.shape[1]
        n_candidates = min(d_sae, int(k * _MORE_CANDIDATES) + 2) if self.bf16 else k
        indices = torch.empty(len(x), n_candidates, dtype=torch.long, device=x.device)
        found = 0
        for scores in self._scores(x, W_enc, b_enc, norms):
            indices[found : found + len(scores)] = _largest(scores, n_candidates)
            found += len(scores)
        candidates = Pairs.of_indices(indices, d_sae)
        projection = dot_products(candidates, x, W_enc.T)
        if n_candidates == k:
            return Chosen(candidates, projection)
        scores = projection + b_enc[candidates.features]
        if norms is not None:
            scores *= norms[candidates.features]
        best = torch.topk(scores.view_as(indices), k, dim=-1, sorted=False).indices
        return Chosen(
            Pairs.of_indices(indices.gather(1, best), d_sae), projection.view_as(indices).gather(1, best).view(-1)
        )

    @torch.no_grad()
    def batch_top_k(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None, k: int, rows: int | None = None
    ) -> Chosen:
        """The k·n_tokens largest positive (x·W_enc + b_enc)·norms of the whole batch; fewer where fewer are positive.

        Arguments as for `top_k`.

        Args:
            rows: where memory is short: keep the pre-activations of no more tokens than this, and compute them again
                for each look at them. The choice is the same.
        """
        wanted = k * len(x)
        again = partial(self._scores, x, W_enc, b_enc, norms, rows)
        kept = None if rows else [scores.clone() if len(scores) < len(x) else scores for scores in again()]
        sample = torch.cat([_sampled(scores) for scores in kept or again()])
        share = min(1.0, wanted * _MORE_CANDIDATES / (len(x) * W_enc.shape[1]))
        while True:
            rank = min(len(sample), int(share * len(sample)) + 8)
            edge = float(sample.kthvalue(len(sample) - rank + 1).values) if share < 1 else 0.0
            parts = [_above(scores, max(edge, 0.0)) for scores in kept or again()]
            if sum(len(features) for features, _ in parts) >= wanted * (1 + (_MORE_CANDIDATES - 1) / 4) or edge <= 0:
                break
            share = min(1.0, share * 2)
        candidates = _joined(parts, W_enc.shape[1])
        projection = dot_products(candidates, x, W_enc.T)
        scores = projection + b_enc[candidates.features]
        if norms is not None:
            scores *= norms[candidates.features]
        chosen = scores > 0
        if int(chosen.sum()) > wanted:
            chosen = torch.zeros_like(chosen)
            chosen[torch.topk(scores, wanted, sorted=False).indices] = True
        return Chosen(candidates.where(chosen), projection[chosen])

    @torch.no_grad()
    def above(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, edge: Tensor | float, most: int) -> Chosen | None:
        """All pairs with x·W_enc + b_enc > edge, or None where they are more than `most`.

        Args:
            x: (n_tokens, d_in), centred.
            W_enc: (d_in, d_sae).
            b_enc: (d_sae,).
            edge: (d_sae,) or one number.
            most: how many pairs are worth computing one by one.
        """
        shifted = b_enc - edge
        if self.bf16:
            spread = x.pow(2).mean().sqrt() * W_enc.norm(dim=0)
            shifted = shifted + _MARGIN * spread + shifted.abs() * 2.0**-7
        parts, n_found = [], 0
        for scores in self._scores(x, W_enc, shifted, None):
            features, n_each = _above(scores, 0.0)
            n_found += len(features)
            if n_found > most:
                return None
            parts.append((features, n_each))
        candidates = _joined(parts, W_enc.shape[1])
        projection = dot_products(candidates, x, W_enc.T)
        edges = edge[candidates.features] if isinstance(edge, Tensor) else edge
        chosen = projection + b_enc[candidates.features] > edges
        return Chosen(candidates.where(chosen), projection[chosen])

    def _scores(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None, rows: int | None = None
    ) -> Iterator[Tensor]:
        """(x·W_enc + b_enc)·norms, a block of at most `rows` tokens at a time; it is overwritten by the next."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        by_feature = W_enc.T  # (d_sae, d_in), whole rows in memory
        if norms is not None:
            scaled = self._buffer("weights", tuple(by_feature.shape), x)
            by_feature = torch.mul(by_feature, norms[:, None], out=scaled)
            b_enc = b_enc * norms
        elif self.bf16:
            by_feature = self._buffer("weights", tuple(by_feature.shape), x).copy_(by_feature)
        x, b_enc = x.to(dtype), b_enc.to(dtype)
        size = max(1, _BLOCK_BYTES.get(x.device.type, 1 << 30) // (len(b_enc) * dtype.itemsize))
        size = min(size, rows or size)
        for part in x.split(size):
            block = self._buffer("block", (min(size, len(x)), len(b_enc)), x)[: len(part)]
            # Two steps: into a given tensor addmm copies the bias first, and the product then reads it again.
            yield torch.mm(part, by_feature.T, out=block).add_(b_enc)

    def _buffer(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor to write into, on `like`'s device."""
        held = self._buffers.get(name)
        if held is None or held.shape != shape:
            dtype = torch.bfloat16 if self.bf16 else torch.float32
            held = self._buffers[name] = torch.empty(shape, dtype=dtype, device=like.device)
        return held


def _largest(scores: Tensor, k: int) -> Tensor:
    """Indices of each row's k largest, (n, k): found among the k groups with the largest maxima, where they have to
    be."""
    n, width = scores.shape
    if scores.dtype == torch.bfloat16 and scores.device.type == "cpu":
        # As integers they compare faster and order alike where they are positive; a ReLU makes the others equal.
        scores = scores.view(torch.int16)
    if width % _GROUPS or width // _GROUPS < 4 * k:
        return torch.topk(scores, k, dim=-1, sorted=False).indices
    n_groups = width // _GROUPS
    maxima = scores.view(n, _GROUPS, n_groups).amax(dim=1)  # group g holds the columns g, g + n_groups, …
    groups = torch.topk(maxima, k, dim=-1, sorted=False).indices
    columns = (groups[:, :, None] + torch.arange(0, width, n_groups, device=scores.device)).view(n, -1)
    best = torch.topk(scores.gather(1, columns), k, dim=-1, sorted=False).indices
    return columns.gather(1, best)


def _sampled(scores: Tensor) -> Tensor:
    """Every so many scores as fp32, a copy: a block is overwritten by the next."""
    return scores.view(-1)[::_SAMPLE_STRIDE].to(torch.float32, copy=True)


def _above(scores: Tensor, edge: float) -> tuple[Tensor, Tensor]:
    """The features above `edge` row after row, and how many each row has."""
    n, width = scores.shape
    if scores.dtype == torch.bfloat16 and scores.device.type == "cpu" and edge >= 0:
        least = torch.tensor(edge, dtype=torch.bfloat16).view(torch.int16).item()
        mask = scores.view(torch.int16) > least
    else:
        mask = scores > edge
    if width % 8 or not mask.is_contiguous() or mask.device.type != "cpu":
        places = mask.view(-1).nonzero().squeeze(1)
    else:
        # Eight flags are one word: most words are zero, and looking for those that are not is eight times less work.
        words = mask.view(-1).view(torch.int64).nonzero().squeeze(1)
        word, bit = mask.view(-1, 8)[words].nonzero(as_tuple=True)
        places = words[word] * 8 + bit
    rows = places // width
    return places - rows * width, torch.bincount(rows, minlength=n)


def _joined(parts: list[tuple[Tensor, Tensor]], d_sae: int) -> Pairs:
    n_each = torch.cat([each for _, each in parts])
    offsets = torch.zeros(len(n_each) + 1, dtype=torch.long, device=n_each.device)
    torch.cumsum(n_each, 0, out=offsets[1:])
    return Pairs(torch.cat([features for features, _ in parts]), offsets, d_sae)
