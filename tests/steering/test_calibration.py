"""Strengths in every unit become lengths."""

from __future__ import annotations

import pytest
import torch

from mistudio_engine.api.errors import BadInput, EmptyData
from mistudio_engine.steering.calibration import length_of, typical_norm


def test_lengths_follow_the_unit() -> None:
    assert length_of(3.0, "raw") == 3.0
    assert length_of(2.0, "max_act", 5.0) == 10.0
    assert length_of(2.0, "max_act", max_act=5.0, decoder_norm=0.5) == 5.0
    assert length_of(-0.5, "norm", typical_norm=8.0) == -4.0


def test_a_unit_without_its_number_is_refused() -> None:
    with pytest.raises(BadInput, match="units of max_act"):
        length_of(1.0, "max_act")
    with pytest.raises(BadInput, match="it is 0"):
        length_of(1.0, "max_act", max_act=0.0)
    with pytest.raises(BadInput, match="typical norm"):
        length_of(1.0, "norm", max_act=3.0)
    with pytest.raises(BadInput, match="'volts'"):
        length_of(1.0, "volts")  # pyright: ignore[reportArgumentType]


def test_the_typical_norm_is_the_median_where_the_mask_is_true() -> None:
    acts = torch.zeros(1, 4, 2)
    acts[0, :, 0] = torch.tensor([1000.0, 1.0, 2.0, 3.0])
    assert typical_norm(acts, torch.tensor([[False, True, True, True]])) == 2.0
    with pytest.raises(EmptyData):
        typical_norm(acts, torch.zeros(1, 4, dtype=torch.bool))
