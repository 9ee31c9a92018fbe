"""Settings: the names that are understood, the values that are refused, and the memory that they will take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_data import config, settings

from mistudio_engine.api.errors import BadInput, MistudioError, Unsupported
from mistudio_engine.api.training_config import TRAINABLE, Hyperparameters, check_training, training_bytes
from mistudio_engine.training.objectives import OBJECTIVES
from mistudio_engine.training.trainer import Trainer


def test_every_trainable_architecture_has_an_objective_and_the_other_way_round() -> None:
    assert sorted(TRAINABLE) == sorted(OBJECTIVES)


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
        ({"learning_rat": 1e-3}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Hyperparameters.model_validate(values)


@pytest.mark.parametrize(
    ("architecture", "sae", "values", "error", "said"),
    [
        ("transcoder", {"d_out": 3}, {}, Unsupported, r"cannot be trained here.*standard, gated"),
        ("topk", {}, {"l1_coefficient": 1.0}, BadInput, "l1_coefficient=1.0 has no meaning for a topk"),
        ("standard", {}, {"aux_loss_coefficient": 0.5}, BadInput, "no meaning for a standard"),
        ("topk", {}, {"resample_interval": 1000}, BadInput, "no meaning for a topk"),
        ("jumprelu", {}, {"l0_penalty": "quadratic", "target_l0": 99}, BadInput, "target_l0=99 is more than"),
        ("standard", {"normalize_activations": "expected_average_only_in"}, {}, BadInput, "scale_inputs=True"),
    ],
)
def test_combinations_that_would_be_ignored_or_cannot_work_are_refused(
    architecture: str, sae: dict[str, Any], values: dict[str, Any], error: type[MistudioError], said: str
) -> None:
    with pytest.raises(error, match=said) as raised:
        Trainer(config(architecture, **sae), settings(**values))
    assert raised.value.fix


@pytest.mark.parametrize("architecture", TRAINABLE)
def test_the_memory_estimate_covers_weights_gradients_moments_and_buffer(architecture: str) -> None:
    cfg, hp = config(architecture), settings()
    trainer = Trainer(cfg, hp)
    trainer.step(torch.randn(32, 16))
    weights = sum(p.numel() * 4 for p in trainer.sae.parameters())
    moments = sum(t.numel() * 4 for state in trainer.optimizer.state.values() for t in state.values())
    assert 2 * weights + moments + hp.buffer_tokens * 16 * 4 <= training_bytes(cfg, hp)
