"""Which features fire on the same tokens: pair counts on a sample of the tokens, and each feature's strongest partners.

All pairs of all tokens would be too many, so the tokens that come first are kept as a sparse matrix, until there are
enough of them or their pairs become too many to count; contexts are visited in a random order, so these are a fair
sample of them. On the sample every count is exact:

    n_ij = #{tokens on which i and j fire},   cosine = n_ij / √(n_i · n_j),   lift = n_ij · N / (n_i · n_j)

The cosine is that of the two 0/1 columns (Ochiai 1957); a lift of 1 is what independent features would have. It does
not know what else is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from mistudio_engine.discovery.activation_block import Block, rank_in_run
from mistudio_engine.discovery.top_tokens import rank_by

__all__ = ["CoactivationSample", "Partners", "strongest"]

N_TOKENS = 1 << 15
"""Tokens in the sample at most."""

N_PAIRS = 1 << 28
"""Pairs in the sample at most: about three seconds of counting on one core."""


class Partners(NamedTuple):
    """The strongest partners of some features, ordered by feature, then by falling cosine."""

    feature: NDArray[np.int64]
    partner: NDArray[np.int64]
    count: NDArray[np.int64]
    """Sampled tokens on which both fire."""


class CoactivationSample:
    """Collects the sample.

    Args:
        n_features: number of features.
        n_tokens: tokens to sample at most.
        n_pairs: pairs to count at most.
    """

    def __init__(self, n_features: int, n_tokens: int = N_TOKENS, n_pairs: int = N_PAIRS) -> None:
        self.n_features, self.max_tokens, self.max_pairs = n_features, n_tokens, n_pairs
        self.n_tokens = self.n_pairs = 0
        self.full = False
        self._token: list[NDArray[np.int32]] = []
        self._feature: list[NDArray[np.int32]] = []

    def add(self, block: Block, counted: NDArray[np.bool_]) -> None:
        """Take in a block, or as much of it as there is room for.

        Args:
            block: entries.
            counted: (n_contexts * context_size,) True at the places that count as tokens.
        """
        if self.full:
            return
        l0 = np.bincount(block.place, minlength=len(counted))
        n_tokens = self.n_tokens + np.cumsum(counted)
        n_pairs = self.n_pairs + np.cumsum(l0.astype(np.int64) ** 2)
        fits = (n_tokens <= self.max_tokens) & (n_pairs <= self.max_pairs)
        self.full = not fits.all()
        end = len(fits) if fits.all() else int(np.argmin(fits))
        if not end:
            return
        kept = block.place < end
        self._token.append((self.n_tokens + np.cumsum(counted) - 1)[block.place[kept]].astype(np.int32))
        self._feature.append(block.feature[kept].astype(np.int32))
        self.n_tokens, self.n_pairs = int(n_tokens[end - 1]), int(n_pairs[end - 1])

    @property
    def n_active(self) -> NDArray[np.int64]:
        """(n_features,) sampled tokens on which each feature fires."""
        return np.bincount(_joined(self._feature), minlength=self.n_features)

    def matrix(self) -> csr_array:
        """(n_tokens, n_features) 1 where a feature fires on a sampled token."""
        token, feature = _joined(self._token), _joined(self._feature)
        ones = np.ones(len(token), dtype=np.int32)
        return csr_array((ones, (token, feature)), shape=(self.n_tokens, self.n_features))

    def state(self) -> dict[str, NDArray]:
        """What `restore` needs to go on."""
        numbers = np.array([self.n_tokens, self.n_pairs, self.full], dtype=np.int64)
        return {"token": _joined(self._token), "feature": _joined(self._feature), "numbers": numbers}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where `state` was taken."""
        self._token, self._feature = [state["token"]], [state["feature"]]
        self.n_tokens, self.n_pairs, self.full = (int(number) for number in state["numbers"])


def strongest(matrix: csr_array, n_active: NDArray[np.int64], features: slice, n: int) -> Partners:
    """The `n` features with the largest cosine to each of `features`, of those that ever fire together with it.

    Args:
        matrix: (n_tokens, n_features) of the sample.
        n_active: (n_features,) its column sums.
        features: which to look at.
        n: partners of each; of equal ones the smaller index counts.
    """
    counts = (matrix[:, features].T @ matrix).tocoo()
    feature, partner, count = counts.row + features.start, counts.col, counts.data
    other = feature != partner
    feature, partner, count = feature[other].astype(np.int64), partner[other].astype(np.int64), count[other]
    cosine = count / np.sqrt(n_active[feature].astype(np.float64) * n_active[partner])
    # Sorting them all in double precision costs more than counting: single precision rounds, but never turns an order
    # round, so that whatever equals the n-th there may be among the first n.
    rank = rank_by(feature, cosine)
    least = np.zeros(features.stop - features.start, dtype=np.float32)
    last = rank == n - 1
    least[feature[last] - features.start] = cosine[last].astype(np.float32)
    near = np.flatnonzero(cosine.astype(np.float32) >= least[feature - features.start])
    order = near[np.lexsort((partner[near], -cosine[near], feature[near]))]
    kept = order[rank_in_run(feature[order]) < n]
    return Partners(feature[kept], partner[kept], count[kept].astype(np.int64))


def _joined(parts: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
