"""Losses and gradients: equal to SAELens's, equal on both paths, and right where autograd cannot say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from training_data import config, settings, sparse_activations

from mistudio_engine.api.sae_config import parse_sae_config
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.training import losses
from mistudio_engine.training.objectives import OBJECTIVES
from mistudio_engine.training.trainer import Trainer

CASES = ["gated", "jumprelu_step", "standard_l1", "topk"]
WINDOW = 640


def fixture_trainer(folder: Path, path: str) -> tuple[Trainer, dict[str, Any], dict[str, Tensor]]:
    """A trainer with SAELens's settings, weights and dead features of before the first step."""
    expected, before = json.loads((folder / "expected.json").read_text()), load_file(folder / "step0.safetensors")
    theirs = expected["config"]
    named = {name: theirs[name] for name in ("architecture", "d_in", "d_sae", "k") if name in theirs}
    values: dict[str, Any] = {"n_tokens": 640, "batch_size": 64, "lr": 1e-3, "scale_inputs": False}
    values |= {"lr_warm_up_fraction": 0.2, "lr_decay_fraction": 0.3, "dead_feature_window": WINDOW}
    if "l1_coefficient" in theirs:
        values |= {"sparsity_warm_up_fraction": theirs["l1_warm_up_steps"] / 10}
        values |= {"l1_coefficient": theirs["l1_coefficient"]}
    if theirs["architecture"] == "jumprelu":
        values |= {"l0_coefficient": theirs["l0_coefficient"], "sparsity_warm_up_fraction": 0}
        values |= {name: theirs[name] for name in ("jumprelu_bandwidth", "jumprelu_init_threshold")}
    if theirs["architecture"] == "topk":
        values |= {"topk_path": path}
    trainer = Trainer(parse_sae_config(named), Hyperparameters(**values))
    trainer.sae.load_state_dict({key[5:]: value for key, value in before.items() if key.startswith("init.")})
    trainer.tokens_since_fired[before["dead_mask"]] = WINDOW
    return trainer, expected, before


def paths() -> list[tuple[str, str]]:
    return [(case, path) for case in CASES for path in (["dense", "sparse"] if case == "topk" else ["auto"])]


@pytest.mark.parametrize(("case", "path"), paths())
def test_losses_and_gradients_equal_saelens(shared: Path, case: str, path: str) -> None:
    trainer, expected, before = fixture_trainer(shared / "fixtures/training" / case, path)
    architecture = trainer.cfg.architecture
    outcome = OBJECTIVES[architecture](trainer.sae, before["x"][0], trainer.dead, 1.0, trainer.hp)
    assert float(outcome.loss.detach()) == pytest.approx(expected["loss"], rel=1e-5)
    parts = {name: float(value.detach()) for name, value in outcome.parts.items()}
    assert parts == pytest.approx(expected["losses"], rel=1e-5)
    torch.testing.assert_close(outcome.sae_out.detach(), before["sae_out"], rtol=1e-5, atol=1e-5)
    assert torch.equal(outcome.n_fired, (before["feature_acts"] > 0).sum(0))
    outcome.loss.backward()
    for name, parameter in trainer.sae.named_parameters():
        theirs = before[f"grad.{name}"]
        assert parameter.grad is not None
        assert float((parameter.grad - theirs).norm() / theirs.norm()) < 1e-5, name
        assert float((parameter.grad - theirs).abs().max() / theirs.abs().max()) < 1e-5, name


@pytest.mark.parametrize(("case", "path"), paths())
def test_three_optimizer_steps_equal_saelens(shared: Path, case: str, path: str) -> None:
    folder = shared / "fixtures/training" / case
    trainer, expected, before = fixture_trainer(folder, path)
    after = load_file(folder / "after3.safetensors")
    for x, theirs in zip(before["x"], expected["trainer_steps"], strict=True):
        assert int(trainer.dead.sum()) == theirs["n_dead_before"]
        measured = trainer.step(x)
        assert measured.loss == pytest.approx(theirs["loss"], rel=1e-5)
        assert measured.l0 == theirs["l0"]
        assert measured.lr == pytest.approx(theirs["lr"])
    for name, parameter in trainer.sae.named_parameters():
        theirs = after[f"after3.{name}"]
        assert float((parameter.detach() - theirs).norm() / theirs.norm()) < 1e-5, name


@given(
    batch=st.integers(1, 40),
    d_in=st.integers(2, 24),
    d_sae=st.integers(2, 60),
    k=st.integers(1, 9),
    centre=st.booleans(),
    n_dead=st.integers(0, 60),
    seed=st.integers(0, 1000),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_the_sparse_path_equals_the_dense_one(
    batch: int, d_in: int, d_sae: int, k: int, centre: bool, n_dead: int, seed: int
) -> None:
    cfg = config("topk", d_in=d_in, d_sae=d_sae, k=min(k, d_sae), apply_b_dec_to_input=centre)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator)
    dead = torch.randperm(d_sae, generator=generator) < n_dead
    outcomes = []
    for path in ("dense", "sparse"):
        hp = settings(topk_path=path)
        sae = Trainer(cfg, hp, seed=seed).sae
        with torch.no_grad():
            for name in ("b_enc", "b_dec"):
                sae.get_parameter(name).copy_(torch.randn(sae.get_parameter(name).shape, generator=generator))
            sae.W_dec.mul_(torch.rand(d_sae, 1, generator=generator) + 0.5)
        generator = torch.Generator().manual_seed(seed)  # the same weights for both
        torch.randn(batch, d_in, generator=generator)
        torch.randperm(d_sae, generator=generator)
        outcome = OBJECTIVES["topk"](sae, x, dead, 1.0, hp)
        outcome.loss.backward()
        outcomes.append((outcome, {name: p.grad for name, p in sae.named_parameters()}))
    (dense, dense_grads), (sparse, sparse_grads) = outcomes
    torch.testing.assert_close(sparse.loss, dense.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.sae_out, dense.sae_out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.l1, dense.l1, rtol=1e-4, atol=1e-5)
    assert torch.equal(sparse.n_fired, dense.n_fired)
    for name, grad in dense_grads.items():
        assert grad is not None
        torch.testing.assert_close(sparse_grads[name], grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_auxk_reaches_the_encoders_of_dead_features(path: str) -> None:
    hp = settings(topk_path=path)
    sae = Trainer(config("topk"), hp).sae
    with torch.no_grad():
        sae.get_parameter("b_enc")[:10] = -50  # far below every other: never among the k, always negative
    dead = torch.arange(48) < 10
    OBJECTIVES["topk"](sae, sparse_activations(64), dead, 1.0, hp).loss.backward()
    assert sae.W_enc.grad is not None
    assert sae.W_dec.grad is not None
    assert bool((sae.W_enc.grad[:, :10].norm(dim=0) > 0).all())
    assert bool((sae.W_dec.grad[:10].norm(dim=1) > 0).all())


def test_the_l0_penalty_moves_thresholds_by_the_density_of_pre_activations() -> None:
    """d/dθ E[1[p > θ]] = −density of p at θ: for standard normal p it is known."""
    hidden_pre = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    for at in (0.1, 0.5, 1.0):
        threshold = torch.tensor([at], requires_grad=True)
        losses.step(hidden_pre, threshold, 0.05).sum(-1).mean().backward()
        density = math.exp(-(at**2) / 2) / math.sqrt(2 * math.pi)
        assert threshold.grad is not None
        assert float(threshold.grad) == pytest.approx(-density, rel=0.05)


def test_the_jump_moves_thresholds_by_the_height_of_the_jump_times_the_density() -> None:
    """d/dθ E[p·1[p > θ]] = −θ·density at θ."""
    hidden_pre = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    threshold = torch.tensor([0.7], requires_grad=True)
    losses.jump_relu(hidden_pre, threshold, 0.05).mean().backward()
    density = math.exp(-(0.7**2) / 2) / math.sqrt(2 * math.pi)
    assert threshold.grad is not None
    assert float(threshold.grad) == pytest.approx(-0.7 * density, rel=0.05)


@pytest.mark.parametrize("penalty", [{}, {"l0_penalty": "tanh"}, {"l0_penalty": "quadratic", "target_l0": 5}])
def test_every_l0_penalty_makes_a_jumprelu_sparser_and_trains_its_thresholds(penalty: dict[str, Any]) -> None:
    x = sparse_activations(256)

    def final_l0(coefficient: float) -> float:
        hp = settings(l0_coefficient=coefficient, n_tokens=32 * 300, lr=3e-3, jumprelu_init_threshold=0.1, **penalty)
        trainer = Trainer(config("jumprelu"), hp)
        trainer.prepare(x)
        before = trainer.sae.get_parameter("threshold").detach().clone()
        l0 = [trainer.step(x[i % 8 * 32 :][:32]).l0 for i in range(300)]
        moved = (trainer.sae.get_parameter("threshold").detach() - before).abs()
        assert bool((trainer.sae.get_parameter("threshold") >= 0).all())
        assert coefficient == 0 or float(moved.max()) > 0.01
        return sum(l0[-8:]) / 8

    assert final_l0(1.0) < 0.7 * final_l0(0.0)


def test_the_pre_activation_loss_pulls_dead_features_up() -> None:
    hp = settings(pre_act_loss_coefficient=1e-2)
    sae = Trainer(config("jumprelu"), hp).sae
    with torch.no_grad():
        sae.get_parameter("b_enc")[:4] = -50
    OBJECTIVES["jumprelu"](sae, sparse_activations(64), torch.arange(48) < 4, 1.0, hp).loss.backward()
    grad = sae.get_parameter("b_enc").grad
    assert grad is not None
    assert bool((grad[:4] < 0).all())
