"""A block of sparse feature activations: the only thing that the accumulators of an extraction ever see.

One entry is (feature, place, value). A block covers some contexts completely, so that whatever is decided per context
(the strongest position, whether a feature is silent) is decided inside one block. It does not know where the
activations came from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_engine.api.errors import BadInput
from mistudio_engine.saes.base import SAE

__all__ = ["Block", "Runs", "check_finite", "rank_in_run", "run_starts", "sparse_acts", "stable_order"]

_DENSE_CELLS = 1 << 24
"""Cells of a dense (tokens, d_sae) block at a time: 64 MiB in fp32."""


class Block(NamedTuple):
    """Entries ordered by feature, then by place; no (feature, place) twice."""

    contexts: NDArray[np.int64]
    """(n_contexts,) which contexts these are."""

    token_ids: NDArray[np.int32]
    """(n_contexts, context_size)."""

    feature: NDArray[np.int64]
    """(n,) row of the feature."""

    place: NDArray[np.int64]
    """(n,) row in the block * context_size + position in the context."""

    value: NDArray[np.float32]
    """(n,) feature activation, above 0."""

    @classmethod
    def of(
        cls, contexts: NDArray, token_ids: NDArray, feature: NDArray, place: NDArray, value: NDArray[np.float32]
    ) -> Block:
        """The same with the entries put in order."""
        n_places = token_ids.size
        order = stable_order(feature * np.int64(n_places) + place, (int(feature.max(initial=0)) + 1) * n_places)
        return cls(contexts, token_ids, feature[order], place[order], value[order])

    @property
    def tokens(self) -> NDArray[np.int32]:
        """(n,) token id at each entry."""
        return self.token_ids.reshape(-1)[self.place]

    def runs(self) -> Runs:
        """The entries joined to runs of one feature in one context."""
        row, position = np.divmod(self.place, self.token_ids.shape[1])
        starts = run_starts(self.feature * np.int64(len(self.contexts)) + row)
        length = np.diff(np.append(starts, len(self.place)))
        peak = np.maximum.reduceat(self.value, starts) if len(starts) else self.value[:0]
        at_peak = np.flatnonzero(self.value == np.repeat(peak, length))
        # A run may hold its maximum more than once: the earliest position counts.
        first = at_peak[run_starts(np.repeat(np.arange(len(starts)), length)[at_peak])]
        return Runs(self.feature[starts], row[starts], position[first], peak, starts, length)


class Runs(NamedTuple):
    """One row for every (feature, context) in which the feature fires, ordered by feature, then by row."""

    feature: NDArray[np.int64]
    row: NDArray[np.int64]
    """Row of the context in the block."""

    position: NDArray[np.int64]
    """Where the feature is strongest in this context; the earliest of equals."""

    value: NDArray[np.float32]
    """Its activation there."""

    start: NDArray[np.int64]
    """First entry of the run in the block."""

    length: NDArray[np.int64]
    """Number of entries."""


def stable_order(keys: NDArray[np.int64], bound: int) -> NDArray[np.int64]:
    """Indices that put `keys` (n,), all in [0, bound), in order; equal keys stay as they are."""
    shift = max(0, len(keys) - 1).bit_length()
    if bound.bit_length() + shift > 63:
        return np.argsort(keys, kind="stable")
    # numpy sorts 64-bit numbers ten times faster than it sorts their indices, so the index rides in the low bits.
    return np.sort((keys << shift) | np.arange(len(keys))) & ((1 << shift) - 1)


def run_starts(keys: NDArray) -> NDArray[np.int64]:
    """Indices at which a run of equal neighbours begins in `keys` (n,)."""
    if not len(keys):
        return np.zeros(0, dtype=np.int64)
    return np.append(0, np.flatnonzero(keys[1:] != keys[:-1]) + 1)


def rank_in_run(keys: NDArray) -> NDArray[np.int64]:
    """0, 1, 2, … within each run of equal neighbours of `keys` (n,)."""
    starts = run_starts(keys)
    return np.arange(len(keys)) - np.repeat(starts, np.diff(np.append(starts, len(keys))))


def sparse_acts(
    sae: SAE, x: Tensor, threshold: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The feature activations of `x` (n, d_in) above `threshold`: their rows, features and values.

    Raises:
        BadInput: an activation is NaN or infinite.
    """
    # An architecture with a sparse encoder of its own is asked for pairs; of the others the dense block is searched.
    is_sparse = type(sae).encode_sparse is not SAE.encode_sparse
    n_rows = max(1, _DENSE_CELLS // sae.cfg.d_sae)
    found = []
    for at in range(0, max(1, len(x)), n_rows):
        part = x[at : at + n_rows]
        acts, feature_ids = sae.encode_sparse(part) if is_sparse else (sae.encode(part), None)
        cells, width = acts.reshape(-1), acts.shape[-1]
        flat = _where_true(cells > threshold)
        row = torch.div(flat, width, rounding_mode="floor")
        feature = flat - row * width if feature_ids is None else feature_ids.reshape(-1)[flat]
        found.append((row + at, feature, cells[flat]))
    rows, features, values = (torch.cat(part).cpu() for part in zip(*found, strict=True))
    values = values.float()
    # NaN compares as "not above the threshold" and would vanish, so the input is looked at as well.
    check_finite("An activation", x, values)
    return rows.numpy(), features.numpy(), values.numpy()


def check_finite(what: str, *tensors: Tensor) -> None:
    """Refuse NaN and infinity in something that is computed from texts.

    Raises:
        BadInput: there is one.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise BadInput(
            f"{what} is NaN or infinite.",
            why="The model or the SAE overflowed on this text.",
            fix="Load the model with precision='fp32', or check the SAE with eval_sae.",
        )


def _where_true(mask: Tensor) -> Tensor:
    """Indices of the true cells of `mask` (n,); numpy's search is three times faster than torch's on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.nonzero(mask).squeeze(1)
