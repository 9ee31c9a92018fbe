"""How sure a balanced accuracy is: an interval from a bootstrap over contexts.

It knows yes/no answers, their truth, and which of them come from one context; nothing of features, texts or judges.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mistudio_engine.api.errors import BadInput

__all__ = ["Interval", "balanced_accuracies"]

_N_DRAWS = 1000

_LEAST_SHAPE = 0.25
"""Of the weights' distribution, with two contexts or one."""


class Interval(NamedTuple):
    """A number with the range in which it lies with the confidence asked for."""

    value: float
    low: float
    high: float


def balanced_accuracies(
    answers: ArrayLike, known: ArrayLike, truth: ArrayLike, context: ArrayLike, *, level: float = 0.95, seed: int = 0
) -> tuple[list[Interval], list[Interval]]:
    """Balanced accuracy of several judges on the same items, and by how much the first exceeds each of the others.

    A Bayesian bootstrap (Rubin 1981): every context has a random weight, its items share it, and the interval holds
    the middle of the recomputed values. To each class a made-up right and a made-up wrong answer are added with weights
    from Gamma(1/2), Jeffreys' prior: with one item a context and many of them the interval of a recall is then the one
    of Brown, Cai and DasGupta (2001), which keeps its level where resampling with replacement fails, namely with 20
    items that are all right, where it would say that nothing is uncertain. Rubin's weights are from Exp(1); with few
    contexts they are too even, as a variance divided by n is too small, and here two of them are taken off all
    together. A lead is of the items that both judges answered, and both have the same weights.

    Args:
        answers: (n_judges, n) yes or no.
        known: (n_judges, n) False where there is no answer: such an item does not count for that judge.
        truth: (n,) booleans.
        context: (n,) number of the context that an item comes from.
        level: 0 to 1.
        seed: of the weights.

    Returns:
        `n_judges` intervals of balanced accuracy (0 to 1, 0.5 is chance; NaN without answers on both classes), each of
        what that judge answered, and `n_judges - 1` of the first judge's lead over another (-1 to 1; NaN likewise).

    Raises:
        BadInput: the shapes do not fit, or `level` is not between 0 and 1.
    """
    answers, known = np.asarray(answers, dtype=bool), np.asarray(known, dtype=bool)
    truth, context = np.asarray(truth, dtype=bool), np.asarray(context)
    if answers.ndim != 2 or answers.shape != known.shape or not truth.shape == context.shape == answers.shape[1:]:
        shapes = f"{answers.shape}, {known.shape}, {truth.shape} and {context.shape}"
        raise BadInput(f"Answers, known, truth and context have shapes {shapes}; expected twice (k, n) and twice (n,).")
    if not 0 < level < 1:
        raise BadInput(f"level is {level}.", fix="Use a number between 0 and 1, such as 0.95.")
    generator = np.random.default_rng(seed)
    contexts, which = np.unique(context, return_inverse=True)
    weights = generator.standard_gamma(max(1 - 2 / len(contexts), _LEAST_SHAPE), (_N_DRAWS, len(contexts)))
    # The judges, then the first one and then the others, on what they have answered in common.
    n_judges, both = len(answers), known[:1] & known[1:]
    first = np.broadcast_to(answers[:1], both.shape)
    answers, known = np.concatenate([answers, first, answers[1:]]), np.concatenate([known, both, both])
    values, draws = np.zeros(len(answers)), np.zeros((len(answers), _N_DRAWS))
    for side in (truth, ~truth):
        prior = generator.gamma(0.5, size=(2, _N_DRAWS))  # right, wrong
        right, counted = known & side & (answers == truth), known & side
        n_right, n_counted = _by_context(right, which, len(contexts)), _by_context(counted, which, len(contexts))
        with np.errstate(invalid="ignore"):  # NaN where a judge has no answer on one side
            values += right.sum(axis=1) / counted.sum(axis=1) / 2
        draws += (n_right @ weights.T + prior[0]) / (n_counted @ weights.T + prior.sum(axis=0)) / 2
    n_upto = n_judges + len(both)
    leads, lead_draws = values[n_judges:n_upto] - values[n_upto:], draws[n_judges:n_upto] - draws[n_upto:]
    return (
        [_interval(value, drawn, level) for value, drawn in zip(values[:n_judges], draws, strict=False)],
        [_interval(value, drawn, level) for value, drawn in zip(leads, lead_draws, strict=True)],
    )


def _by_context(items: NDArray[np.bool_], which: NDArray, n_contexts: int) -> NDArray[np.float64]:
    """(k, n_contexts) how many items of each context are true."""
    return np.stack([np.bincount(which, weights=row, minlength=n_contexts) for row in items]).astype(np.float64)


def _interval(value: float, draws: NDArray[np.float64], level: float) -> Interval:
    if np.isnan(value):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    # With every answer right the made-up wrong one keeps the interval below 1: it ends at the value then.
    return Interval(float(value), float(min(low, value)), float(max(high, value)))
