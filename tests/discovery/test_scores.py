"""AUROC and the yes/no counts equal their definitions, ties and all."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistudio_engine.api.errors import BadInput
from mistudio_engine.discovery.scores import auroc, aurocs, confusion

samples = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: 0 < sum(positive for _, positive in rows) < len(rows)
)


def pairwise(scores: list[int], positive: list[bool]) -> Fraction:
    """The definition: over all pairs of a positive and a negative, in exact fractions."""
    wins = [
        Fraction(1) if p > q else Fraction(1, 2) if p == q else Fraction(0)
        for p, is_positive in zip(scores, positive, strict=True)
        if is_positive
        for q, other in zip(scores, positive, strict=True)
        if not other
    ]
    return sum(wins, Fraction(0)) / len(wins)


@given(samples)
def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_one_half(rows):
    scores, positive = [score for score, _ in rows], [positive for _, positive in rows]
    assert auroc(scores, positive) == float(pairwise(scores, positive))


@given(samples)
def test_auroc_does_not_change_when_scores_are_stretched_and_flips_when_they_are_negated(rows):
    scores, positive = np.array([score for score, _ in rows], float), [positive for _, positive in rows]
    assert auroc(np.exp(scores), positive) == auroc(scores, positive)
    assert auroc(-scores, positive) == pytest.approx(1 - auroc(scores, positive), abs=1e-15)


def test_aurocs_of_many_columns_equal_the_auroc_of_each():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 4, (300, 7)).astype(np.float32), rng.random(300) < 0.1
    assert aurocs(scores, positive).tolist() == [auroc(column, positive) for column in scores.T]


def test_auroc_knows_no_answer_without_both_classes_or_with_nan():
    with pytest.raises(BadInput, match="0 positives among 3"):
        auroc([1, 2, 3], [False] * 3)
    with pytest.raises(BadInput, match="NaN"):
        auroc([1.0, math.nan], [True, False])
    with pytest.raises(BadInput, match=r"\(3,\)"):
        auroc([1.0, 2.0], [True, False, True])


def test_a_rule_is_counted_into_four_numbers():
    found = confusion([1, 1, 0, 0, 1], [1, 0, 0, 1, 1])
    assert found == (2, 1, 1, 1)
    assert found.recall == found.precision == found.f1 == pytest.approx(2 / 3)
    assert found.specificity == 0.5
    assert found.balanced_accuracy == pytest.approx((2 / 3 + 0.5) / 2)
    assert math.isnan(confusion([0, 0], [0, 0]).balanced_accuracy)
