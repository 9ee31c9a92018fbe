"""Presets: every architecture has all three, and what they set is what the architecture knows."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from mistudio_engine.api.operations.training import Architecture, TrainSAE
from mistudio_engine.api.presets import L1_PER_ROOT_WIDTH, PRESETS, Preset, default_l1_coefficient
from mistudio_engine.api.sae_config import activation_of
from mistudio_engine.api.training_config import belongs_to

CALL = {"model": "m", "dataset": "d", "hook_name": "blocks.1.hook_resid_post"}


@pytest.mark.parametrize("architecture", get_args(Architecture))
@pytest.mark.parametrize("preset", get_args(Preset))
def test_every_architecture_takes_every_preset(architecture: str, preset: Preset) -> None:
    out = {"hook_name_out": "blocks.1.hook_mlp_out"} if "transcoder" in architecture else {}
    call = TrainSAE(**CALL, **out, architecture=architecture, preset=preset)  # type: ignore[arg-type]
    activation = activation_of(architecture)
    words = {**PRESETS[activation][preset]}
    assert call.k == words.pop("k", None)
    assert {name: getattr(call.hyperparameters, name) for name in words} == words
    assert all(belongs_to(name, activation) for name in words)
    assert words or call.k or preset in L1_PER_ROOT_WIDTH[activation]


def test_what_a_call_says_itself_goes_before_the_preset() -> None:
    assert TrainSAE(**CALL, preset="sparse", k=5).k == 5
    call = TrainSAE(**CALL, architecture="jumprelu", preset="sparse", target_l0=9)
    assert call.hyperparameters.target_l0 == 9


def test_a_call_with_a_preset_is_the_same_call_after_it_was_kept() -> None:
    call = TrainSAE(**CALL, architecture="jumprelu", preset="faithful", lr=1e-3)
    assert TrainSAE.model_validate(call.model_dump(mode="json")) == call


def test_sparser_presets_have_more_weight_and_it_grows_with_the_root_of_the_width() -> None:
    for activation in L1_PER_ROOT_WIDTH:
        weights = [default_l1_coefficient(activation, 64, preset) for preset in get_args(Preset)]
        assert weights == sorted(weights, reverse=True)
        assert default_l1_coefficient(activation, 256) == pytest.approx(
            2 * default_l1_coefficient(activation, 64), rel=1e-3
        )


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValidationError, match="'sparse', 'balanced' or 'faithful'"):
        TrainSAE(**CALL, preset="dense")  # type: ignore[arg-type]
