"""How well numbers or rules separate positives from negatives: AUROC, balanced accuracy, and their relatives.

Each function's body is its formula, on numpy arrays. It knows nothing of features, texts or labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mistudio_engine.api.errors import BadInput

__all__ = ["Confusion", "auroc", "aurocs", "confusion"]

_CELLS = 1 << 21
"""Scores sorted at once: bounds the working memory at about 100 MB whatever the number of columns."""


def auroc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie counting one half.

    Exact, from mid-ranks (Mann and Whitney 1947). 1 separates perfectly, 0.5 is chance, 0 is perfectly wrong.

    Args:
        scores: (n,) numbers.
        positive: (n,) booleans.

    Raises:
        BadInput: a length differs, a score is NaN, or one of the two classes is empty.
    """
    scores = np.asarray(scores)
    if scores.ndim != 1:
        raise BadInput(f"auroc() takes one score a sample, got an array of shape {scores.shape}.", fix="Use aurocs().")
    return float(aurocs(scores[:, None], positive)[0])


def aurocs(scores: ArrayLike, positive: ArrayLike) -> NDArray[np.float64]:
    """`auroc` of every column of `scores` (n, m) against the same `positive` (n,); gives (m,)."""
    scores, positive = np.asarray(scores), np.asarray(positive, dtype=bool)
    if scores.ndim != 2 or positive.shape != scores.shape[:1]:
        raise BadInput(f"Scores have shape {scores.shape} and labels {positive.shape}; expected (n, m) and (n,).")
    if np.isnan(scores).any():
        raise BadInput("A score is NaN, so the samples have no order.")
    n, n_positive = len(positive), int(positive.sum())
    if not 0 < n_positive < n:
        raise BadInput(f"AUROC needs both classes, got {n_positive} positives among {n} samples.")

    n_columns = max(1, _CELLS // n)
    blocks = [_by_mid_ranks(scores[:, at : at + n_columns], positive) for at in range(0, scores.shape[1], n_columns)]
    return np.concatenate(blocks) if blocks else np.zeros(0)


def _by_mid_ranks(scores: NDArray, positive: NDArray[np.bool_]) -> NDArray[np.float64]:
    n, n_positive = len(positive), int(positive.sum())
    order = np.argsort(scores, axis=0, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=0)
    # Mid-ranks without a loop: twice the mid-rank of a sample is (first + last) place of its run of equal scores.
    place = np.arange(n)[:, None]
    starts = np.ones_like(ordered, dtype=bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    ends = np.ones_like(starts)
    ends[:-1] = starts[1:]
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=0)
    last = np.minimum.accumulate(np.where(ends, place, n)[::-1], axis=0)[::-1]
    # Places count from 0 and ranks from 1, hence the 2 a positive. Integers up to the division: no rounding at all.
    twice_rank_sum = np.where(positive[order], first + last + 2, 0).sum(axis=0)
    return (twice_rank_sum - n_positive * (n_positive + 1)) / (2.0 * n_positive * (n - n_positive))


class Confusion(NamedTuple):
    """Counts (or weights) of a yes/no rule against the truth."""

    true_positive: float
    false_positive: float
    true_negative: float
    false_negative: float

    @property
    def recall(self) -> float:
        """Share of the positives that the rule finds; NaN without positives."""
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def specificity(self) -> float:
        """Share of the negatives that the rule leaves out; NaN without negatives."""
        return _ratio(self.true_negative, self.true_negative + self.false_positive)

    @property
    def precision(self) -> float:
        """Share of what the rule picks that is positive; NaN when it picks nothing."""
        return _ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of recall and specificity: 1 is perfect, 0.5 is chance; NaN when a class is empty."""
        return (self.recall + self.specificity) / 2

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall: 1 is perfect, 0 finds nothing."""
        return _ratio(2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative)


def confusion(predicted: ArrayLike, actual: ArrayLike) -> Confusion:
    """The four counts of `predicted` against `actual`, booleans of one shape."""
    predicted, actual = np.asarray(predicted, dtype=bool), np.asarray(actual, dtype=bool)
    if predicted.shape != actual.shape:
        raise BadInput(f"Predictions have shape {predicted.shape} and the truth {actual.shape}; they must be equal.")
    both = int((predicted & actual).sum())
    n_predicted, n_actual = int(predicted.sum()), int(actual.sum())
    return Confusion(both, n_predicted - both, predicted.size - n_predicted - n_actual + both, n_actual - both)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
