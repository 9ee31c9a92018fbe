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

__all__ = ["RESIDUAL_SITES", "LogitLens", "LogitLensProgress", "logit_lens"]

_STEP_CELLS_CPU, _STEP_CELLS_GPU = 1 << 24, 1 << 28
"""Logits in memory at once: 64 MiB on a CPU, 1 GiB on a GPU."""

_STEP_FLOPS_CPU = 2e10
"""Arithmetic in one step: a tenth or two of a second on two cores."""

_CHUNK = 64
"""Tokens of which only the largest logit is looked at, unless it is among the k largest of all chunks."""

_SLAB_CELLS = 1 << 20
"""Logits that moments and histograms are taken of at once: 4 MiB, which a cache holds with the copies."""

_LINE = 16
"""float32 numbers in a cache line."""

RESIDUAL_SITES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Sites whose values are added to the residual stream: not `attn.hook_z`, though it is as wide in most models."""


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
    """Effects of n directions on the logits; of equal logits that of the smaller token id comes first."""

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
        n_bins: bins of the histogram; 0 for neither histogram nor moments.

    Raises:
        WrongShape: the widths differ.
        EmptyData: there are no directions.
        BadInput: k is not between 1 and d_vocab, n_bins is negative, or a logit is NaN or infinite.
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
    W_U = W_U.detach().float()
    directions = W_dec.detach().to(W_U.device, torch.float32)
    # (gain ∘ W_U) is (d_vocab, d_model); scaling the rows instead costs a block of directions and no second W_U.
    if gain is not None:
        directions = directions * gain.to(directions)
    n_rows = _rows_at_once(d_model, d_vocab, on_cpu=W_U.device.type == "cpu")
    blocks = []
    buffer = W_U.new_empty(d_vocab * min(n_rows, n))  # fresh memory for each block would cost a tenth of the time
    for at in range(0, n, n_rows):
        block = directions[at : at + n_rows]
        # Tokens by directions: this way round the product is faster, and reductions over tokens run along memory.
        logits = buffer[: d_vocab * len(block)].view(d_vocab, -1)
        torch.mm(W_U, block.T, out=logits)
        blocks.append([part.cpu().numpy() for part in _look(logits, k, n_bins)])
        yield LogitLensProgress(min(at + n_rows, n), n)
    return LogitLens(*(np.concatenate(column) for column in zip(*blocks, strict=True)))


def _rows_at_once(d_model: int, d_vocab: int, *, on_cpu: bool) -> int:
    """Directions in one step; whole cache lines of them where they are many."""
    n_cells = min(_STEP_CELLS_CPU, int(_STEP_FLOPS_CPU / (2 * d_model))) if on_cpu else _STEP_CELLS_GPU
    n_rows = max(1, n_cells // d_vocab)
    return n_rows - n_rows % _LINE if n_rows > _LINE else n_rows


def _look(logits: Tensor, k: int, n_bins: int) -> tuple[Tensor, ...]:
    """The fields of LogitLens for one block (d_vocab, n).

    Raises:
        BadInput: a logit is NaN or infinite.
    """
    d_vocab, n = logits.shape
    tails = [logits[d_vocab - d_vocab % _CHUNK :]] if d_vocab % _CHUNK else []
    whole = logits[: d_vocab - d_vocab % _CHUNK].view(-1, _CHUNK, n)
    maxima = torch.cat([whole.amax(1), *(tail.amax(0, keepdim=True) for tail in tails)]).T.contiguous()
    minima = torch.cat([whole.amin(1), *(tail.amin(0, keepdim=True) for tail in tails)]).T.contiguous()
    # A NaN anywhere makes its chunk's maximum NaN; nothing else would show it.
    if not (torch.isfinite(maxima).all() and torch.isfinite(minima).all()):
        raise BadInput(
            "A logit is NaN or infinite.",
            why="A decoder row or the unembedding is not finite, or overflowed.",
            fix="Check the SAE with eval_sae, or load the model with precision='fp32'.",
        )
    promoted_ids, promoted = _strongest(logits, maxima, k, 1.0)
    suppressed_ids, suppressed = _strongest(logits, minima, k, -1.0)
    ends = (promoted_ids, promoted, suppressed_ids, suppressed)
    if not n_bins:
        nothing = logits.new_zeros(n)
        return *ends, nothing, nothing, nothing, nothing, logits.new_zeros(n, 0, dtype=torch.int32)
    return *ends, *_moments_and_histogram(logits, suppressed[:, 0], promoted[:, 0], n_bins)


def _strongest(logits: Tensor, extremes: Tensor, k: int, sign: float) -> tuple[Tensor, Tensor]:
    """Ids and logits (n, k) of the k tokens with the largest sign · logit, of equal ones the smaller id first.

    Exact: with ties broken by place, a token among the k first stands in one of the k chunks with the first extremes.
    For if k other chunks come before its own, the extreme of each of them comes before the token.

    Args:
        logits: (d_vocab, n).
        extremes: (n, n_chunks) the largest sign · logit of each chunk of tokens, with its own sign.
    """
    d_vocab = len(logits)
    chunks = _first(extremes * sign, torch.arange(extremes.shape[1], device=logits.device), min(k, extremes.shape[1]))
    ids = (chunks[:, :, None] * _CHUNK + torch.arange(_CHUNK, device=logits.device)).flatten(1)  # (n, candidates)
    values = logits.T.gather(1, ids.clamp_max(d_vocab - 1)) * sign
    values.masked_fill_(ids >= d_vocab, -torch.inf)
    best = _first(values, ids, k)
    return best.int(), logits.T.gather(1, best)


def _first(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """The ids (n, k) of the k largest `values` (n, m), of equal ones the smaller id first."""
    bits = (values + 0.0).view(torch.int32)  # −0 becomes 0: equal numbers, equal bits
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    keys = (ordered.long() << 32) | (0xFFFFFFFF - ids)
    return 0xFFFFFFFF - (torch.topk(keys, k).values & 0xFFFFFFFF)


def _moments_and_histogram(logits: Tensor, low: Tensor, high: Tensor, n_bins: int) -> tuple[Tensor, ...]:
    """Mean, std, skewness and kurtosis (n,) of each column of `logits` (d_vocab, n), and counts (n, n_bins).

    The bins of a column are equally wide from `low` to `high` (n,).
    """
    d_vocab, n = logits.shape
    mean = logits.mean(0)
    scale = n_bins / (high - low).clamp_min(torch.finfo(logits.dtype).tiny)
    column = torch.arange(n, device=logits.device, dtype=torch.int32) * n_bins
    counts = torch.zeros(n * n_bins, dtype=torch.int64, device=logits.device)
    second, third, fourth = (torch.zeros_like(mean) for _ in range(3))
    for part in logits.split(max(1, _SLAB_CELLS // n)):  # what is computed on the way stays in the cache
        bins = torch.sub(part, low).mul_(scale).int().clamp_(0, n_bins - 1).add_(column)
        counts += torch.bincount(bins.view(-1), minlength=n * n_bins)
        centred = part - mean
        square = centred * centred
        second += square.sum(0)
        third += centred.mul_(square).sum(0)
        fourth += square.mul_(square).sum(0)
    std = (second / d_vocab).sqrt()
    unit = torch.where(std > 0, std, 1.0)  # a direction of zeros has moments 0, not NaN
    skewness, kurtosis = third / d_vocab / unit**3, fourth / d_vocab / unit**4
    return mean, std, skewness, kurtosis, counts.view(n, n_bins).int()
