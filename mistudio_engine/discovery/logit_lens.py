"""Which tokens a direction promotes and suppresses: decoder rows through the unembedding, in blocks.

    logits = W_dec @ (gain ∘ W_U)ᵀ        (n, d_vocab)

The gain is the final norm's, folded into W_U, because whatever a feature writes passes that norm before it becomes
logits; the plain form leaves it out, as Neuronpedia does. The norm's division by the length of the whole residual
stream is a factor common to all tokens and is left out in both. Source of the method: nostalgebraist 2020,
"Interpreting GPT: the logit lens". It does not know which feature a row belongs to.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_engine.api.errors import BadInput, EmptyData, WrongShape

__all__ = ["LogitLens", "LogitLensProgress", "logit_lens"]

_STEP_CELLS_CPU, _STEP_CELLS_GPU = 1 << 23, 1 << 28
"""Logits in memory at once: 32 MiB on a CPU, 1 GiB on a GPU."""

_STEP_FLOPS_CPU = 8e9
"""Arithmetic in one step: a tenth or two of a second on two cores."""


class LogitLensProgress(NamedTuple):
    """One step."""

    n_done: int
    """Directions done so far."""

    n_total: int

    @property
    def fraction(self) -> float:
        """Share that is done."""
        return self.n_done / self.n_total


class LogitLens(NamedTuple):
    """Effects of n directions on the logits."""

    promoted_ids: NDArray[np.int32]
    """(n, k) token ids with the largest logits, largest first."""

    promoted_values: NDArray[np.float32]
    suppressed_ids: NDArray[np.int32]
    """(n, k) token ids with the smallest logits, smallest first."""

    suppressed_values: NDArray[np.float32]
    mean: NDArray[np.float32]
    """(n,) mean over the vocabulary."""

    std: NDArray[np.float32]
    skewness: NDArray[np.float32]
    """(n,) third standardised moment: above 0 when few tokens are promoted strongly."""

    kurtosis: NDArray[np.float32]
    """(n,) fourth standardised moment; 3 for a normal distribution. High means that the effect is on few tokens."""

    histogram_counts: NDArray[np.int32]
    """(n, n_bins) tokens in equal bins from the smallest logit to the largest."""

    def histogram_edges(self, row: int) -> NDArray[np.float64]:
        """(n_bins + 1,) edges of one row's histogram."""
        low, high = self.suppressed_values[row, 0], self.promoted_values[row, 0]
        return np.linspace(float(low), float(high), self.histogram_counts.shape[1] + 1)


def logit_lens(
    W_dec: Tensor, W_U: Tensor, gain: Tensor | None = None, *, k: int = 20, n_bins: int = 50
) -> Generator[LogitLensProgress, None, LogitLens]:
    """The logit lens of many directions; a generator of small steps.

    Args:
        W_dec: (n, d_model) directions, a feature is a row.
        W_U: (d_vocab, d_model) unembedding.
        gain: (d_model,) of the final norm; None for the plain form.
        k: tokens kept at each end.
        n_bins: bins of the histogram; 0 for neither histogram nor moments, which about halves the time.

    Raises:
        WrongShape: the widths differ.
        EmptyData: there are no directions.
        BadInput: k is not between 1 and d_vocab, or n_bins is negative.
    """
    n, d_model = W_dec.shape
    d_vocab = W_U.shape[0]
    if W_U.shape[1] != d_model or (gain is not None and gain.shape != (d_model,)):
        raise WrongShape(
            f"Directions of width {d_model} do not fit an unembedding {tuple(W_U.shape)}"
            + ("." if gain is None else f" with a gain {tuple(gain.shape)}."),
            why="Only what is written into the residual stream has a logit lens.",
            fix="Use an SAE of a residual, attention-out or MLP-out hook of this model.",
        )
    if not n:
        raise EmptyData("There are no directions to look at.", fix="Give at least one feature.")
    if not 1 <= k <= d_vocab or n_bins < 0:
        raise BadInput(f"k = {k} and n_bins = {n_bins} cannot be used.", fix=f"k is 1 to {d_vocab}, n_bins at least 0.")
    W_U = W_U.float()
    directions = W_dec.detach().to(W_U.device, torch.float32)
    # (gain ∘ W_U) is (d_vocab, d_model); scaling the rows instead costs a block of directions and no second W_U.
    if gain is not None:
        directions = directions * gain.to(directions)
    on_cpu = W_U.device.type == "cpu"
    n_cells = min(_STEP_CELLS_CPU, int(_STEP_FLOPS_CPU / (2 * d_model))) if on_cpu else _STEP_CELLS_GPU
    n_rows = max(1, n_cells // d_vocab)
    blocks = []
    for at in range(0, n, n_rows):
        logits = directions[at : at + n_rows] @ W_U.T  # (n_rows, d_vocab)
        blocks.append([part.cpu().numpy() for part in _look(logits, k, n_bins)])
        yield LogitLensProgress(min(at + n_rows, n), n)
    return LogitLens(*(np.concatenate(column) for column in zip(*blocks, strict=True)))


def _look(logits: Tensor, k: int, n_bins: int) -> tuple[Tensor, ...]:
    """The fields of LogitLens for one block (n, d_vocab)."""
    promoted, suppressed = torch.topk(logits, k), torch.topk(logits, k, largest=False)
    ends = (promoted.indices.int(), promoted.values, suppressed.indices.int(), suppressed.values)
    n, d_vocab = logits.shape
    if not n_bins:
        nothing = logits.new_zeros(n)
        return *ends, nothing, nothing, nothing, nothing, logits.new_zeros(n, 0, dtype=torch.int32)
    low, high = suppressed.values[:, :1], promoted.values[:, :1]
    scale = n_bins / (high - low).clamp_min(torch.finfo(logits.dtype).tiny)
    bins = ((logits - low) * scale).int().clamp_(0, n_bins - 1)
    bins += torch.arange(n, device=logits.device, dtype=torch.int32)[:, None] * n_bins
    counts = torch.bincount(bins.reshape(-1), minlength=n * n_bins).reshape(n, n_bins)
    mean = logits.mean(1, keepdim=True)
    centred = logits.sub_(mean)  # the logits themselves are not needed any more
    square = centred * centred
    variance = square.mean(1)
    third = torch.einsum("nv,nv->n", square, centred) / d_vocab
    fourth = torch.einsum("nv,nv->n", square, square) / d_vocab
    std = variance.sqrt()
    unit = torch.where(std > 0, std, 1.0)  # a direction of zeros has moments 0, not NaN
    return *ends, mean.squeeze(1), std, third / unit**3, fourth / unit**4, counts.int()
