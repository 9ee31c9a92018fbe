"""Which contexts are shown for a feature, chosen while the tokens go by, for all features at once.

Every group is per-context: a context stands for its strongest position, once.

- *top*: the contexts with the largest activations; equal ones by context number.
- *stratified*: a reservoir in each sixteenth of (0, 2^e], 2^e the power of two above the largest activation so far.
  When the maximum outgrows 2^e, neighbouring sixteenths become one, and so do their reservoirs, without loss: the
  first n of a union are among the first n of its parts. That is why the strata are powers of two and not fractions of
  a maximum that is known only at the end.
- *random*: contexts in which the feature fires, whatever the value.
- *zero*: contexts in which it never fires.

The last three are "the first n that come", which is a uniform sample **because the caller visits the contexts in a
random order**. For each chosen context the feature's activations all over the context are kept (sparse), so that any
window can be cut later. It knows no text and writes no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.discovery.activation_block import Block, Runs, rank_in_run, run_starts, stable_order

__all__ = ["Chosen", "ExamplePool", "joined"]

_N_STRATA = 16
_COMPACT_AT = 1 << 20
"""Stored activations below which forgotten examples are not worth collecting."""


class Chosen(NamedTuple):
    """Chosen examples, one row each."""

    feature: NDArray[np.int64]
    """Row of the feature."""

    context: NDArray[np.int64]
    position: NDArray[np.int64]
    """The strongest position of the context."""

    value: NDArray[np.float32]
    """The activation there."""

    record: NDArray[np.int64]
    """Where the pool keeps the activations of the context; -1 where it is silent."""

    def take(self, rows: NDArray) -> Chosen:
        """These rows, by index or by mask."""
        return Chosen(self.feature[rows], self.context[rows], self.position[rows], self.value[rows], self.record[rows])


def joined(groups: Sequence[Chosen]) -> Chosen:
    """Several groups, one after another."""
    return Chosen(
        feature=np.concatenate([group.feature for group in groups]),
        context=np.concatenate([group.context for group in groups]),
        position=np.concatenate([group.position for group in groups]),
        value=np.concatenate([group.value for group in groups]),
        record=np.concatenate([group.record for group in groups]),
    )


class ExamplePool:
    """Chooses and keeps examples.

    Args:
        n_features: number of features.
        n_top: contexts a feature in the group *top*.
        n_stratified: contexts a stratum.
        n_random: contexts in the group *random*.
        n_zero: contexts in the group *zero*.
    """

    def __init__(self, n_features: int, *, n_top: int, n_stratified: int, n_random: int, n_zero: int) -> None:
        self.n_features = n_features
        self._top = np.full((n_features, n_top), -1, dtype=np.int64)
        self._strata = np.full((n_features * _N_STRATA, n_stratified), -1, dtype=np.int64)
        self._random = np.full((n_features, n_random), -1, dtype=np.int64)
        self._zero = np.full((n_features, n_zero), -1, dtype=np.int64)
        self._exponent = np.full(n_features, -1_000, dtype=np.int32)  # of the power of two above the maximum so far
        self._records = _Records()

    def add(self, block: Block) -> None:
        """Take in a block."""
        runs = block.runs()
        self._keep_zero(block, runs)
        if not len(runs.feature):
            return
        self._grow_strata(runs)
        cell = runs.feature * _N_STRATA + self._stratum(runs)
        to_top = self._may_be_top(runs)
        to_strata, to_random = _room(self._strata, cell), _room(self._random, runs.feature)

        kept = np.flatnonzero(to_top | to_strata | to_random)
        record = np.full(len(runs.feature), -1, dtype=np.int64)
        record[kept] = self._records.append(block, runs, kept)
        _append(self._strata, cell[to_strata], record[to_strata])
        _append(self._random, runs.feature[to_random], record[to_random])
        self._merge_top(runs.feature[to_top], record[to_top])
        if len(self._records.values) > self._records.compact_at:
            self._forget()

    def top(self, features: slice) -> Chosen:
        """The top group of these features, by falling value."""
        return self._chosen(self._top, features, 1)

    def random(self, features: slice) -> Chosen:
        """The random group of these features."""
        return self._chosen(self._random, features, 1)

    def stratified(self, features: slice) -> Chosen:
        """All reservoirs of these features, by feature, then in the order of their choice."""
        chosen = self._chosen(self._strata, features, _N_STRATA)
        return chosen.take(np.lexsort((chosen.record, chosen.feature)))

    def zero(self, features: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Features and contexts of the zero group."""
        cells = self._zero[features]
        row, column = np.nonzero(cells >= 0)
        return row + features.start, cells[row, column]

    def activations(self, record: NDArray[np.int64]) -> tuple[NDArray, NDArray[np.int32], NDArray[np.float32]]:
        """Offsets (n + 1,), positions and values of the activations in these examples' contexts; none for record -1."""
        return self._records.gather(record)

    def state(self) -> dict[str, NDArray]:
        """What `restore` needs to go on."""
        groups = {"top": self._top, "strata": self._strata, "random": self._random, "zero": self._zero}
        return {**groups, "exponent": self._exponent, **self._records.state()}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where `state` was taken."""
        self._top, self._strata, self._random = state["top"], state["strata"], state["random"]
        self._zero, self._exponent = state["zero"], state["exponent"]
        self._records.restore(state)

    def _keep_zero(self, block: Block, runs: Runs) -> None:
        n_zero = self._zero.shape[1]
        n_kept = (self._zero >= 0).sum(axis=1)
        wanting = np.flatnonzero(n_kept < n_zero)
        if not len(wanting):
            return
        fires = np.zeros((self.n_features, len(block.contexts)), dtype=bool)
        fires[runs.feature, runs.row] = True
        silent = ~fires[wanting]
        slot = n_kept[wanting][:, None] + np.cumsum(silent, axis=1) - 1
        which, row = np.nonzero(silent & (slot < n_zero))
        self._zero[wanting[which], slot[which, row]] = block.contexts[row]

    def _grow_strata(self, runs: Runs) -> None:
        """Raise the exponent of features with a new maximum, and join the strata that become one."""
        starts = run_starts(runs.feature)
        touched = runs.feature[starts]
        exponent = np.frexp(np.maximum.reduceat(runs.value, starts))[1]
        growth = exponent - self._exponent[touched]
        grown, growth = touched[growth > 0], growth[growth > 0]
        if not len(grown):
            return
        self._exponent[grown] += growth
        cells = self._strata.reshape(self.n_features, _N_STRATA, -1)
        old = cells[grown]
        which, stratum, slot = np.nonzero(old >= 0)
        record = old[which, stratum, slot]
        self._strata.reshape(self.n_features, -1)[grown] = -1
        cell = grown[which] * _N_STRATA + (stratum >> np.minimum(growth[which], 30))
        order = np.lexsort((record, cell))  # records are numbered in the order of arrival
        cell, record = cell[order], record[order]
        first = rank_in_run(cell) < self._strata.shape[1]
        _append(self._strata, cell[first], record[first])

    def _stratum(self, runs: Runs) -> NDArray[np.int64]:
        scaled = np.ldexp(runs.value.astype(np.float64), -self._exponent[runs.feature])  # in (0, 1), exact
        return (scaled * _N_STRATA).astype(np.int64)

    def _may_be_top(self, runs: Runs) -> NDArray[np.bool_]:
        if not self._top.shape[1]:
            return np.zeros(len(runs.feature), dtype=bool)
        last = self._top[:, -1]
        weakest = np.zeros(self.n_features, dtype=np.float32)
        weakest[last >= 0] = self._records.value[last[last >= 0]]
        return runs.value >= weakest[runs.feature]  # an equal one may have the smaller context number

    def _merge_top(self, feature: NDArray, record: NDArray) -> None:
        touched = feature[run_starts(feature)]
        old = self._top[touched]
        row, slot = np.nonzero(old >= 0)
        feature = np.concatenate([feature, touched[row]])
        record = np.concatenate([record, old[row, slot]])
        # By context first; then, stable, by feature and falling value.
        by_context = stable_order(self._records.context[record], int(self._records.context.max(initial=0)) + 1)
        feature, record = feature[by_context], record[by_context]
        falling = 0x7FFFFFFF - self._records.value[record].view(np.int32).astype(np.int64)
        order = stable_order((feature << 31) | falling, self.n_features << 31)
        feature, record = feature[order], record[order]
        rank = rank_in_run(feature)
        best = rank < self._top.shape[1]
        self._top[feature[best], rank[best]] = record[best]

    def _forget(self) -> None:
        """Drop the records that no group holds any more."""
        groups = (self._top, self._strata, self._random)
        held = np.zeros(len(self._records.context), dtype=bool)
        for group in groups:
            held[group[group >= 0]] = True
        new_number = self._records.compact(held)
        for group in groups:
            group[group >= 0] = new_number[group[group >= 0]]

    def _chosen(self, cells: NDArray, features: slice, cells_per_feature: int) -> Chosen:
        part = cells[features.start * cells_per_feature : features.stop * cells_per_feature]
        row, slot = np.nonzero(part >= 0)
        record = part[row, slot]
        kept = self._records
        return Chosen(
            row // cells_per_feature + features.start,
            kept.context[record],
            kept.position[record].astype(np.int64),
            kept.value[record],
            record,
        )


class _Records:
    """Examples by number, in the order of their arrival, and the activations of their contexts end to end."""

    def __init__(self) -> None:
        self.context = np.zeros(0, dtype=np.int64)
        self.position = np.zeros(0, dtype=np.int32)
        self.value = np.zeros(0, dtype=np.float32)
        self.start = np.zeros(1, dtype=np.int64)  # one more than there are examples: where the next one begins
        self.positions = np.zeros(0, dtype=np.int32)
        self.values = np.zeros(0, dtype=np.float32)
        self.compact_at = _COMPACT_AT

    def append(self, block: Block, runs: Runs, kept: NDArray[np.int64]) -> NDArray[np.int64]:
        """Keep these runs of the block; their numbers."""
        n = len(self.context)
        entries = _ranges(runs.start[kept], runs.length[kept])
        self.context = np.concatenate([self.context, block.contexts[runs.row[kept]]])
        self.position = np.concatenate([self.position, runs.position[kept].astype(np.int32)])
        self.value = np.concatenate([self.value, runs.value[kept]])
        self.start = np.concatenate([self.start, self.start[-1] + np.cumsum(runs.length[kept])])
        context_size = block.token_ids.shape[1]
        self.positions = np.concatenate([self.positions, (block.place[entries] % context_size).astype(np.int32)])
        self.values = np.concatenate([self.values, block.value[entries]])
        return np.arange(n, len(self.context))

    def gather(self, record: NDArray[np.int64]) -> tuple[NDArray, NDArray[np.int32], NDArray[np.float32]]:
        """Offsets (n + 1,), positions and values; none for record -1."""
        known = record >= 0
        length = np.zeros(len(record), dtype=np.int64)
        length[known] = self.start[record[known] + 1] - self.start[record[known]]
        entries = _ranges(self.start[record], length)
        return np.append(0, np.cumsum(length)), self.positions[entries], self.values[entries]

    def state(self) -> dict[str, NDArray]:
        columns = ("context", "position", "value", "start", "positions", "values")
        compact_at = np.array([self.compact_at], dtype=np.int64)
        return {name: getattr(self, name) for name in columns} | {"compact_at": compact_at}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        self.context, self.position, self.value = state["context"], state["position"], state["value"]
        self.start, self.positions, self.values = state["start"], state["positions"], state["values"]
        self.compact_at = int(state["compact_at"][0])

    def compact(self, held: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Keep the held ones only, in the same order; the new number of each old one."""
        record = np.flatnonzero(held)
        self.start, self.positions, self.values = self.gather(record)
        self.context, self.position, self.value = self.context[record], self.position[record], self.value[record]
        self.compact_at = max(_COMPACT_AT, 2 * len(self.values))
        return np.cumsum(held) - 1


def _ranges(start: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """start[0], start[0] + 1, … (length[0] of them), start[1], … as one array."""
    ends = np.cumsum(length)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(start - (ends - length), length)


def _room(cells: NDArray[np.int64], cell: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of these newcomers, in the order they stand, find a free slot in their cell."""
    n_slots = cells.shape[1]
    if not n_slots or not len(cell):
        return np.zeros(len(cell), dtype=bool)
    accepted = cells[cell, -1] < 0
    candidates = np.flatnonzero(accepted)
    wanted = cell[candidates]
    order = stable_order(wanted, len(cells))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = rank_in_run(wanted[order])
    accepted[candidates] = (cells[wanted] >= 0).sum(axis=1) + rank < n_slots
    return accepted


def _append(cells: NDArray[np.int64], cell: NDArray[np.int64], content: NDArray[np.int64]) -> None:
    """Put each newcomer into the next free slot of its cell; `_room` has made sure that there is one."""
    order = stable_order(cell, len(cells))
    cell, content = cell[order], content[order]
    slot = (cells[cell] >= 0).sum(axis=1) + rank_in_run(cell)
    cells[cell, slot] = content
