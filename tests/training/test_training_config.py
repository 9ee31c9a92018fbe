"""Settings: the names that are understood, the values that are refused, and the memory that they will take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_data import config, settings

from mistudio_engine.api.errors import BadInput
from mistudio_engine.api.sae_config import activation_of
from mistudio_engine.api.training_config import (
    STEP_NAMES,
    Hyperparameters,
    belongs_to,
    buffer_bytes,
    check_training,
    training_bytes,
)
from mistudio_engine.saes import ARCHITECTURES
from mistudio_engine.training.objectives import OBJECTIVES
from mistudio_engine.training.trainer import Trainer

ALL = sorted(ARCHITECTURES)
OWN_VALUES: dict[str, Any] = {
    "l1_coefficient": 1.0,
    "l0_coefficient": 0.5,
    "l0_penalty": "tanh",
    "tanh_scale": 3.0,
    "jumprelu_bandwidth": 0.1,
    "jumprelu_init_threshold": 0.1,
    "pre_act_loss_coefficient": 0.1,
    "sparsity_warm_up_fraction": 0.3,
    "sparsity_decay_fraction": 0.3,
    "aux_loss_coefficient": 0.5,
    "threshold_lr": 0.1,
    "resample_interval": 1000,
}
"""A value of one's own for each setting that only some architectures have (target_l0 goes with a penalty)."""


def test_every_architecture_can_be_trained() -> None:
    assert sorted(OBJECTIVES) == ALL


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Hyperparameters.model_fields.items() if not field.description] == []


def test_the_documents_names_are_understood_and_steps_become_tokens() -> None:
    values = {"num_steps": 100, "batch_size": 64, "learning_rate": 1e-3, "l1_alpha": 2.0, "resample_steps": 10}
    hp = Hyperparameters.model_validate(values)
    assert (hp.n_tokens, hp.n_steps, hp.lr, hp.l1_coefficient, hp.resample_interval) == (6400, 100, 1e-3, 2.0, 640)


def test_settings_survive_json() -> None:
    hp = settings(l0_penalty="quadratic", target_l0=20.0)
    again = Hyperparameters.model_validate_json(hp.model_dump_json())
    assert again == hp
    check_training(config("jumprelu"), again)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n_steps": 3, "n_tokens": 5000}, "say the same thing"),
        ({"n_steps": "3"}, "whole number"),
        ({"n_tokens": 100, "batch_size": 200}, "less than one batch_size"),
        ({"buffer_tokens": 100, "batch_size": 200}, "does not hold one batch_size"),
        ({"lr": -1}, "greater than 0"),
        ({"lr": 2}, "less than 1"),
        ({"l1_coefficient": -0.1}, "greater than or equal to 0"),
        ({"lr_warm_up_fraction": 0.6, "lr_decay_fraction": 0.6}, "more than the whole run"),
        ({"l0_penalty": "quadratic"}, "give both or neither"),
        ({"target_l0": 10}, "give both or neither"),
        ({"l0_penalty": "tanh", "target_l0": 10}, "give both or neither"),
        ({"sparsity_warm_up_fraction": 0.6, "sparsity_decay_fraction": 0.6}, "more than the whole run"),
        ({"cache_dtype": "bfloat16"}, "cache_dtype belongs to"),
        ({"micro_batch_size": 0}, "greater than 0"),
        ({"path": "fast"}, "'auto', 'dense' or 'sparse'"),
        ({"learning_rat": 1e-3}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Hyperparameters.model_validate(values)


@pytest.mark.parametrize("architecture", ALL)
def test_a_setting_that_would_do_nothing_is_refused_and_one_that_does_is_not(architecture: str) -> None:
    for name, value in OWN_VALUES.items():
        if belongs_to(name, activation_of(architecture)):
            check_training(config(architecture), settings(**{name: value}))
        else:
            with pytest.raises(BadInput, match=f"{name}=.* has no meaning for a {architecture}") as raised:
                check_training(config(architecture), settings(**{name: value}))
            assert name in raised.value.fix
    check_training(config(architecture), settings())


def test_every_setting_that_only_some_have_is_in_the_test_above() -> None:
    activations = {activation_of(name) for name in ALL}
    some = {name for name in Hyperparameters.model_fields if not all(belongs_to(name, each) for each in activations)}
    assert some == {*OWN_VALUES, "target_l0"}


@pytest.mark.parametrize(
    ("architecture", "sae", "values", "said"),
    [
        ("jumprelu", {}, {"l0_penalty": "quadratic", "target_l0": 99}, "target_l0=99 is more than"),
        ("jumprelu_transcoder", {}, {"l0_penalty": "quadratic", "target_l0": 99}, "target_l0=99 is more than"),
        ("topk", {}, {"l0_penalty": "quadratic", "target_l0": 9}, "l0_penalty='quadratic' has no meaning"),
        ("standard", {"normalize_activations": "expected_average_only_in"}, {}, "scale_inputs=True"),
        ("topk", {"normalize_activations": "covariance_whitening"}, {}, "scale_inputs=True"),
        ("standard", {"normalize_activations": "layer_norm"}, {"centre_inputs": True}, "centre_inputs"),
        ("transcoder", {"normalize_activations": "layer_norm"}, {}, "whose output has another norm"),
    ],
)
def test_combinations_that_would_be_ignored_or_cannot_work_are_refused(
    architecture: str, sae: dict[str, Any], values: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        Trainer(config(architecture, **sae), settings(**values))
    assert raised.value.fix


def test_names_that_count_steps_and_names_in_tokens_exclude_each_other() -> None:
    for in_steps, in_tokens in STEP_NAMES.items():
        with pytest.raises(ValueError, match=f"{in_steps} and {in_tokens} say the same thing"):
            Hyperparameters.model_validate({in_steps: 10, in_tokens: 20480})


def test_lengths_that_are_left_out_follow_from_the_run() -> None:
    assert settings(n_tokens=32 * 200).dead_window == 640
    assert settings(n_tokens=1_000_000_000).dead_window == 10_000_000
    assert settings(dead_feature_window=7).dead_window == 7
    assert settings(n_tokens=32 * 50).threshold_rate == pytest.approx(0.2)
    assert settings(n_tokens=32 * 100_000).threshold_rate == 0.01
    assert settings(threshold_lr=0.5).threshold_rate == 0.5


@pytest.mark.parametrize("architecture", ALL)
def test_the_memory_estimate_covers_weights_gradients_and_moments(architecture: str) -> None:
    cfg, hp = config(architecture), settings()
    trainer = Trainer(cfg, hp)
    trainer.step(torch.randn(32, 16), torch.randn(32, 16) if cfg.is_transcoder else None)
    weights = sum(p.numel() * 4 for p in trainer.sae.parameters())
    moments = sum(t.numel() * 4 for state in trainer.optimizer.state.values() for t in state.values())
    assert 2 * weights + moments <= training_bytes(cfg, hp)
    assert training_bytes(cfg, hp) < training_bytes(cfg, settings(batch_size=64, n_tokens=6400))
    assert training_bytes(cfg, settings(micro_batch_size=8)) < training_bytes(cfg, hp)


def test_the_buffer_holds_every_hook_in_fp32() -> None:
    assert buffer_bytes(settings(), [16, 24]) == 160 * (16 + 24) * 4
