"""On which tokens each feature fires: count, mean and maximum for every (feature, token) that occurs.

A sparse table, sorted by feature and token, that takes blocks in and merges them now and then. Its size is bounded:
past the capacity the rarest tokens of the crowded features are dropped, and the largest count that may be missing is
kept and reported, so a count is exact or says how far off it can be. It does not know what a token looks like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.discovery.activation_block import Block, rank_in_run, run_starts, stable_order

__all__ = ["TokenTable", "TopTokens", "best_tokens", "rank_by"]

_MERGE_AT = 1 << 19
"""Entries that wait at least until they are merged; merging at every block would sort the whole table each time."""

_COLUMNS = ("key", "count", "sum", "max")
"""Of the table while it grows; a key is feature * d_vocab + token id."""


class TokenTable(NamedTuple):
    """Rows (feature, token), ordered by feature, then by token."""

    feature: NDArray[np.int64]
    token_id: NDArray[np.int64]
    count: NDArray[np.int64]
    """Number of tokens of this id on which the feature is active."""

    sum: NDArray[np.float64]
    """Sum of its activations there."""

    max: NDArray[np.float32]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean activation where active."""
        return self.sum / self.count

    def rows(self, keep: NDArray | slice) -> TokenTable:
        """These rows only."""
        return TokenTable(self.feature[keep], self.token_id[keep], self.count[keep], self.sum[keep], self.max[keep])


class TopTokens:
    """Accumulates the table.

    Args:
        n_features: number of features.
        d_vocab: number of token ids.
        capacity: rows kept at most after a merge; by default 256 a feature and no fewer than four million (40 bytes
            each).
    """

    def __init__(self, n_features: int, d_vocab: int, capacity: int | None = None) -> None:
        self.n_features, self.d_vocab = n_features, d_vocab
        self.capacity = max(4_000_000, 256 * n_features) if capacity is None else capacity
        self.undercount = np.zeros(n_features, dtype=np.int64)
        """(n_features,) the most that any count of the feature may be too low; 0 where all are exact."""

        self._table = _reduce(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.float32))
        self._pending: list[tuple[NDArray, ...]] = []
        self._n_pending = 0

    def add(self, block: Block) -> None:
        """Take in a block."""
        if not len(block.feature):
            return
        ones = np.ones(len(block.feature), dtype=np.int64)
        key = block.feature * np.int64(self.d_vocab) + block.tokens
        part = _reduce(key, ones, block.value.astype(np.float64), block.value)
        self._pending.append(part)
        self._n_pending += len(part[0])
        if self._n_pending >= max(_MERGE_AT, len(self._table[0]) // 2):
            self._merge()

    def table(self) -> TokenTable:
        """All that was taken in so far."""
        self._merge()
        key, count, total, top = self._table
        return TokenTable(key // self.d_vocab, key % self.d_vocab, count, total, top)

    def state(self) -> dict[str, NDArray]:
        """What `restore` needs to go on; what waits to be merged goes on waiting, so that nothing is rounded anew."""
        found = {"undercount": self.undercount, **dict(zip(_COLUMNS, self._table, strict=True))}
        if self._pending:
            columns = [np.concatenate(column) for column in zip(*self._pending, strict=True)]
            found |= {f"pending_{name}": column for name, column in zip(_COLUMNS, columns, strict=True)}
        return found

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where `state` was taken."""
        self.undercount = state["undercount"]
        self._table = tuple(state[name] for name in _COLUMNS)
        if f"pending_{_COLUMNS[0]}" in state:
            self._pending = [tuple(state[f"pending_{name}"] for name in _COLUMNS)]
            self._n_pending = len(self._pending[0][0])

    def _merge(self) -> None:
        if not self._pending:
            return
        parts = [self._table, *self._pending]
        self._table = _reduce(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        self._pending, self._n_pending = [], 0
        if len(self._table[0]) > self.capacity:
            self._prune()

    def _prune(self) -> None:
        """Keep the commonest tokens of each feature, and the strongest, and remember the largest count dropped."""
        key, count, _, top = self._table
        feature = key // self.d_vocab
        share = max(1, self.capacity // (2 * self.n_features))
        keep = (rank_by(feature, count) < share) | (rank_by(feature, top) < max(1, share // 4))
        dropped = np.zeros(self.n_features, dtype=np.int64)
        np.maximum.at(dropped, feature[~keep], count[~keep])
        self.undercount += dropped
        self._table = tuple(column[keep] for column in self._table)


def best_tokens(table: TokenTable, n: int) -> TokenTable:
    """The rows that are among the `n` first of their feature by count, by mean or by maximum."""
    ranks = [rank_by(table.feature, column) for column in (table.count, table.mean, table.max)]
    return table.rows(np.minimum.reduce(ranks) < n)


def rank_by(group: NDArray[np.int64], score: NDArray) -> NDArray[np.int64]:
    """Rank of each row by falling `score` within its `group` (sorted); of equal scores the earlier row is first.

    Scores are counts below 2^32, or numbers of at least 0, which are compared in single precision.
    """
    if np.issubdtype(score.dtype, np.integer):
        bits = score.astype(np.int64)
    else:  # the bits of floats that are not negative are in the order of the floats
        bits = score.astype(np.float32).view(np.int32).astype(np.int64)
    local = group - group[0] if len(group) else group
    keys = (local << 32) | (0xFFFFFFFF - bits)
    order = stable_order(keys, (int(local.max(initial=0)) + 1) << 32)
    ranks = np.empty(len(group), dtype=np.int64)
    ranks[order] = rank_in_run(group[order])
    return ranks


def _reduce(key: NDArray, count: NDArray, total: NDArray, top: NDArray) -> tuple[NDArray, ...]:
    """Rows of one key joined to one."""
    order = stable_order(key, int(key.max(initial=0)) + 1)
    key = key[order]
    starts = run_starts(key)
    if not len(starts):
        return key, count, total, top
    return (
        key[starts],
        np.add.reduceat(count[order], starts),
        np.add.reduceat(total[order], starts),
        np.maximum.reduceat(top[order], starts),
    )
