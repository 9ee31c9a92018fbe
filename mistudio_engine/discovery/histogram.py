"""Histograms of feature activations in fixed logarithmic bins, and their linear display.

A feature's maximum is not known before the last token, so linear bins of [0, maximum] cannot be filled in one pass.
Fixed bins can: 32 to an octave from 2^-16 to 2^16, cut at the bits of a float32, so that every edge is an exact number
and a count in a bin is an exact count. It knows nothing of where the values come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.discovery.activation_block import run_starts

__all__ = ["LOG_EDGES", "N_LOG_BINS", "Histogram", "LogHistograms", "linear_histogram", "log_bins"]

_BITS_PER_OCTAVE = 5
_FIRST_OCTAVE, _LAST_OCTAVE = -16, 16
_SHIFT = 23 - _BITS_PER_OCTAVE  # a float32 has 23 bits of mantissa
_OFFSET = (127 + _FIRST_OCTAVE) << _BITS_PER_OCTAVE  # 127 is the bias of its exponent

N_LOG_BINS = (_LAST_OCTAVE - _FIRST_OCTAVE) << _BITS_PER_OCTAVE
"""1024. The first bin also holds what is smaller, the last what is larger."""

LOG_EDGES: NDArray[np.float32] = ((np.arange(N_LOG_BINS + 1, dtype=np.int32) + _OFFSET) << _SHIFT).view(np.float32)
"""(N_LOG_BINS + 1,) bin i holds LOG_EDGES[i] <= value < LOG_EDGES[i + 1]."""


def log_bins(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of each positive value."""
    bins = (np.ascontiguousarray(values, dtype=np.float32).view(np.int32) >> _SHIFT).astype(np.int64) - _OFFSET
    return np.clip(bins, 0, N_LOG_BINS - 1, out=bins)


class LogHistograms:
    """One histogram a feature, filled block by block; 4 KiB a feature.

    `counts` is (n_features, N_LOG_BINS).
    """

    def __init__(self, n_features: int) -> None:
        self.counts = np.zeros((n_features, N_LOG_BINS), dtype=np.uint32)

    def add(self, feature: NDArray[np.int64], value: NDArray[np.float32]) -> None:
        """Count each value for its feature; both (n,)."""
        cells = np.sort(feature * N_LOG_BINS + log_bins(value))
        starts = run_starts(cells)
        self.counts.reshape(-1)[cells[starts]] += np.diff(np.append(starts, len(cells))).astype(np.uint32)

    def state(self) -> dict[str, NDArray]:
        """What `restore` needs to go on: the cells that hold something."""
        cells = np.flatnonzero(self.counts)
        return {"cells": cells, "counts": self.counts.reshape(-1)[cells]}

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where `state` was taken."""
        self.counts.reshape(-1)[state["cells"]] = state["counts"]


class Histogram(NamedTuple):
    """Counts between linear edges."""

    edges: NDArray[np.float64]
    """(n_bins + 1,) from 0 to the maximum."""

    counts: NDArray[np.int64]
    """(n_bins,); their sum is the number of active tokens."""


def linear_histogram(counts: NDArray, maximum: float, n_bins: int = 50) -> Histogram:
    """The linear histogram of [0, maximum] that log counts (N_LOG_BINS,) show.

    Up to any of its edges it counts what is really there, give or take the entries of the one log bin that this edge
    cuts (within a cut bin values are taken as evenly spread). A log bin is 1.6 to 3.1 % wide.
    """
    edges = np.linspace(0.0, maximum, n_bins + 1)
    if maximum <= 0:
        return Histogram(edges, np.zeros(n_bins, dtype=np.int64))
    log_edges = LOG_EDGES.astype(np.float64)
    log_edges[0] = 0.0
    # Nothing lies above the maximum: it ends its own bin (and the last bin, which has no end of its own).
    top = int(log_bins(np.array([maximum], dtype=np.float32))[0])
    log_edges = np.append(log_edges[: top + 1], maximum)
    cumulative = np.append(0, np.cumsum(counts[: top + 1], dtype=np.int64))
    at_edges = np.rint(np.interp(edges, log_edges, cumulative)).astype(np.int64)
    return Histogram(edges, np.diff(at_edges))
