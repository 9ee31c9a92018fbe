"""The learning rate and the penalty rise and fall as functions of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from training_data import settings

from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.training.schedule import lr_factor, sparsity_factor


def rates(hp: Hyperparameters) -> list[float]:
    return [lr_factor(step, hp) for step in range(hp.n_steps)]


def weights(hp: Hyperparameters) -> list[float]:
    return [sparsity_factor(step, hp) for step in range(hp.n_steps)]


def test_the_learning_rate_rises_stays_and_falls_to_nearly_nothing() -> None:
    hp = settings(lr_warm_up_fraction=0.25, lr_decay_fraction=0.25)
    assert rates(hp) == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 12, 0.8, 0.6, 0.4, 0.2])


def test_the_learning_rate_falls_to_the_share_that_was_asked_for() -> None:
    hp = settings(lr_warm_up_fraction=0, lr_decay_fraction=0.25, lr_end_fraction=0.5)
    assert rates(hp) == pytest.approx([*[1.0] * 16, 0.9, 0.8, 0.7, 0.6])
    assert lr_factor(hp.n_steps, hp) == pytest.approx(0.5)
    constant = settings(lr_warm_up_fraction=0, lr_decay_fraction=0)
    assert rates(constant) == [1.0] * 20


def test_a_cosine_begins_and_ends_where_the_line_does_and_is_half_way_in_the_middle() -> None:
    hp = settings(lr_warm_up_fraction=0, lr_decay_fraction=0.5, lr_decay="cosine", lr_end_fraction=0.1)
    line = settings(lr_warm_up_fraction=0, lr_decay_fraction=0.5, lr_end_fraction=0.1)
    for step in (0, 10, 20):
        assert lr_factor(step, hp) == pytest.approx(lr_factor(step, line))
    assert lr_factor(15, hp) == pytest.approx(0.55)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(1, 10)]
    assert rates(hp)[11:] == pytest.approx(expected)


def test_the_penalty_rises_from_nothing_stays_and_falls() -> None:
    hp = settings(sparsity_warm_up_fraction=0.2, sparsity_decay_fraction=0.2)
    assert weights(hp) == pytest.approx([0, 0.25, 0.5, 0.75, *[1.0] * 13, 0.75, 0.5, 0.25])
    assert weights(settings(sparsity_warm_up_fraction=0)) == [1.0] * 20


fractions = st.floats(0, 1)


@given(
    steps=st.integers(1, 60),
    rise=fractions,
    fall=fractions,
    end=fractions,
    decay=st.sampled_from(["linear", "cosine"]),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_a_schedule_stays_between_nothing_and_all_and_turns_once(
    steps: int, rise: float, fall: float, end: float, decay: str
) -> None:
    if rise + fall > 1:
        rise, fall = 1 - rise, 1 - fall
    values: dict[str, Any] = {"n_tokens": 32 * steps, "lr_warm_up_fraction": rise, "lr_decay_fraction": fall}
    values |= {"sparsity_warm_up_fraction": rise, "sparsity_decay_fraction": fall}
    hp = settings(**values, lr_end_fraction=end, lr_decay=decay)
    for curve in (rates(hp), weights(hp)):
        assert all(0 <= value <= 1 for value in curve)
        top = curve.index(max(curve))
        assert curve[: top + 1] == sorted(curve[: top + 1])
        assert curve[top:] == sorted(curve[top:], reverse=True)
    assert all(value > 0 for value in rates(hp))
