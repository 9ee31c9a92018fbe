"""The interval of a balanced accuracy holds the truth as often as it says, whatever the accuracy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mistudio_engine.api.errors import BadInput
from mistudio_engine.discovery.labelling.bootstrap import balanced_accuracies
from mistudio_engine.discovery.scores import confusion


def one(answers, truth, context=None, **settings):
    answers = np.asarray(answers, bool)
    context = np.arange(len(answers)) if context is None else context
    return balanced_accuracies(answers[None], np.ones_like(answers)[None], truth, context, **settings)[0][0]


@pytest.mark.parametrize(("recall", "specificity"), [(0.5, 0.5), (0.7, 0.9), (0.95, 0.95), (1.0, 0.9)])
def test_ninety_five_percent_intervals_hold_the_truth_in_about_that_many_runs(recall, specificity):
    generator = np.random.default_rng(0)
    truth = np.repeat([True, False], 20)
    n_held, n_runs = 0, 400
    for run in range(n_runs):
        right = generator.random(40) < np.where(truth, recall, specificity)
        found = one(right == truth, truth, seed=run)
        n_held += found.low <= (recall + specificity) / 2 <= found.high
    assert 0.92 <= n_held / n_runs <= 1.0


def test_contexts_count_once_however_many_items_they_have():
    """Ten copies of each item: an interval that took them for independent would be three times too narrow."""
    generator = np.random.default_rng(1)
    n_held, n_runs = 0, 300
    for run in range(n_runs):
        truth = np.repeat([True, False], 15)
        right = generator.random(30) < 0.75
        copies = np.repeat(np.arange(30), 10)
        found = one((right == truth)[copies], truth[copies], copies, seed=run)
        n_held += found.low <= 0.75 <= found.high
    assert n_held / n_runs >= 0.92


def test_with_one_item_a_context_it_is_the_interval_of_jeffreys():
    """With specificity beyond doubt, the recall of k in n has a known posterior: Beta(k + ½, n − k + ½)."""
    truth = np.repeat([True, False], [20, 5000])
    right = np.ones(len(truth), bool)
    right[:6] = False
    found = one(right == truth, truth)
    low, high = stats.beta.ppf([0.025, 0.975], 14.5, 6.5)
    assert found.value == pytest.approx((14 / 20 + 1) / 2)
    assert found.low == pytest.approx((low + 1) / 2, abs=0.015)
    assert found.high == pytest.approx((high + 1) / 2, abs=0.015)


@given(st.data())
def test_the_value_is_the_balanced_accuracy_and_lies_in_its_interval(data):
    n = data.draw(st.integers(2, 30))
    truth = np.array([True, False, *data.draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2))])
    answers = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    context = np.array(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)))
    found = one(answers, truth, context)
    assert found.value == pytest.approx(confusion(answers, truth).balanced_accuracy)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_all_right_is_not_taken_for_certainty_and_all_wrong_is_the_mirror():
    truth = np.repeat([True, False], 20)
    best, worst = one(truth, truth), one(~truth, truth)
    assert best.value == best.high == 1 and 0.9 < best.low < 0.99
    assert worst.value == worst.low == 0 and 0.01 < worst.high < 0.1


def test_items_without_an_answer_do_not_count():
    truth = np.repeat([True, False], 10)
    known = np.arange(20) % 2 == 0
    part = balanced_accuracies((truth & known)[None], known[None], truth, np.arange(20))[0][0]
    assert part.value == 1
    assert part.low < one(truth, truth).low


def test_a_lead_is_measured_on_the_same_items():
    truth = np.repeat([True, False], 20)
    answers = np.stack([truth, truth, ~truth, np.ones(40, bool)])
    accuracies, leads = balanced_accuracies(answers, np.ones_like(answers), truth, np.arange(40))
    assert [each.value for each in accuracies] == [1, 1, 0, 0.5]
    assert leads[0] == (0, 0, 0)
    assert leads[1].value == 1 and leads[1].low > 0.8
    assert leads[2].value == 0.5 and leads[2].low > 0


def test_without_a_class_there_is_no_accuracy():
    found = one(np.ones(5, bool), np.ones(5, bool))
    assert np.isnan(found).all()


def test_the_same_seed_gives_the_same_interval():
    truth = np.repeat([True, False], 10)
    answers = np.arange(20) % 3 == 0
    assert one(answers, truth, seed=3) == one(answers, truth, seed=3)
    assert one(answers, truth, seed=3) != one(answers, truth, seed=4)


def test_shapes_that_do_not_fit_and_impossible_levels_are_refused():
    with pytest.raises(BadInput, match="expected twice"):
        balanced_accuracies(np.ones((1, 3)), np.ones((1, 3)), np.ones(4), np.ones(4))
    with pytest.raises(BadInput, match=r"level is 1\.5"):
        one(np.ones(2), np.array([True, False]), level=1.5)
