"""A trainer learns, folds what it learnt with, keeps dead features in view, and stops before NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_data import D_SAE, Synthetic, alone, config, run, settings, sparse_activations

from mistudio_engine.api.errors import BadInput, Cancelled, JobFailed, WrongShape
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.saes import load_sae, save_sae
from mistudio_engine.training import metrics
from mistudio_engine.training.trainer import Trainer

LONG = {"n_tokens": 64 * 400, "batch_size": 64, "lr": 5e-3, "buffer_tokens": 1024}
SPARSITY: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.2},
    "gated": {"l1_coefficient": 0.2},
    "jumprelu": {"l0_coefficient": 0.05, "jumprelu_init_threshold": 0.05},
    "topk": {},
}


@pytest.mark.parametrize("architecture", TRAINED)
def test_training_explains_most_of_the_variance_and_the_finished_sae_works_on_raw_activations(
    tmp_path: Path, architecture: str
) -> None:
    x = sparse_activations(1024) * 37  # far from norm √d
    trainer = Trainer(config(architecture), settings(**LONG, **SPARSITY[architecture]))
    progress, sae = run(alone(trainer, Synthetic(x, 64)))
    last = [step.metrics for step in progress if step.metrics][-1]
    assert last["fvu"] < 0.35
    feature_acts = sae.encode(x)
    sae_out = sae.decode(feature_acts)
    fvu = metrics.fvu(metrics.mse(x, sae_out), x.pow(2).sum(-1).mean(), x.mean(0))
    assert float(fvu) == pytest.approx(last["fvu"], abs=0.1)
    assert float(metrics.l0(feature_acts)) == pytest.approx(last["l0"], rel=0.3)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    assert sae.cfg.normalize_activations == "none"
    assert (sae.cfg.model_name, sae.cfg.hook_name) == ("synthetic", "blocks.1.hook_resid_post")
    training = sae.cfg.metadata["mistudio"]["training"]
    assert training["n_tokens"] == 64 * 400
    assert training["input_scale"] == trainer.scaling.scale
    again = load_sae(save_sae(sae, tmp_path / "sae", sparsity=trainer.density))
    assert again.cfg == sae.cfg
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize("architecture", TRAINED)
def test_the_finished_sae_is_the_trained_one_in_raw_units(architecture: str) -> None:
    x = sparse_activations(256) * 5
    trainer = Trainer(config(architecture), settings(**SPARSITY[architecture]))
    trainer.prepare(x)
    for i in range(8):
        trainer.step(x[i * 32 : i * 32 + 32])
    finished = trainer.finished_sae()
    inside = trainer.sae(x * trainer.scaling.scale) / trainer.scaling.scale
    torch.testing.assert_close(finished(x), inside.detach(), rtol=1e-4, atol=1e-4)


def test_inputs_are_scaled_to_mean_norm_root_d_and_b_dec_starts_at_their_mean() -> None:
    x = sparse_activations(512) * 9
    trainer = Trainer(config("standard"), settings())
    trainer.prepare(x)
    scaled = x * trainer.scaling.scale
    assert float(scaled.norm(dim=-1).mean()) == pytest.approx(math.sqrt(16), rel=1e-5)
    torch.testing.assert_close(trainer.sae.b_dec.detach(), scaled.mean(0))
    plain = Trainer(config("standard"), settings(scale_inputs=False))
    plain.prepare(x)
    assert plain.scaling.scale == 1.0


def test_a_run_time_norm_is_trained_in_and_kept() -> None:
    x = sparse_activations(1024) * 4
    trainer = Trainer(config("topk", normalize_activations="layer_norm"), settings(**LONG))
    _, sae = run(alone(trainer, Synthetic(x, 64)))
    assert sae.cfg.normalize_activations == "layer_norm"
    assert trainer.scaling.scale == 1.0
    assert float(metrics.mse(x, sae(x)) / x.var(0).sum()) < 0.5


def test_the_finished_sae_has_the_type_that_was_asked_for() -> None:
    trainer = Trainer(config("jumprelu", dtype="bfloat16"), settings())
    trainer.step(sparse_activations(32))
    assert trainer.sae.dtype == torch.float32
    assert trainer.finished_sae().dtype == torch.bfloat16


def test_the_same_seed_gives_the_same_sae_and_another_seed_another() -> None:
    def trained(seed: int) -> torch.Tensor:
        return run(alone(Trainer(config("topk"), settings(), seed), Synthetic(sparse_activations(256), 32)))[1].W_dec

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


def test_the_learning_rate_rises_stays_and_falls_to_nearly_nothing() -> None:
    hp = settings(lr_warm_up_fraction=0.25, lr_decay_fraction=0.25)
    trainer = Trainer(config("standard"), hp)
    rates = [trainer.step(sparse_activations(32)).lr / hp.lr for _ in range(20)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 12, 0.8, 0.6, 0.4, 0.2])


def test_dead_features_are_counted_in_tokens() -> None:
    trainer = Trainer(config("standard"), settings(dead_feature_window=96))
    with torch.no_grad():
        trainer.sae.get_parameter("b_enc")[:7] = -100
    fractions = [trainer.step(sparse_activations(32)).dead_fraction for _ in range(5)]
    assert fractions[:3] == [0, 0, 0]
    assert fractions[3] == pytest.approx(7 / 48)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_resampling_revives_dead_features_and_forgets_their_moments(architecture: str) -> None:
    hp = settings(dead_feature_window=64, resample_interval=128, lr_decay_fraction=0.1, **SPARSITY[architecture])
    trainer = Trainer(config(architecture), hp)
    bias = "b_gate" if architecture == "gated" else "b_enc"
    with torch.no_grad():
        trainer.sae.get_parameter(bias)[:5] = -100
    x = sparse_activations(320)
    for i in range(4):
        trainer.step(x[i * 32 : i * 32 + 32])
    assert not bool(trainer.dead[:5].any())
    assert bool((trainer.sae.get_parameter(bias)[:5] == 0).all())
    assert float(trainer.optimizer.state[trainer.sae.W_enc]["exp_avg"][:, :5].abs().max()) == 0
    assert float(trainer.optimizer.state[trainer.sae.W_enc]["exp_avg"][:, 5:].abs().max()) > 0
    trainer.step(x[128:160])
    assert bool((trainer.tokens_since_fired[:5] == 0).any())


def test_density_is_that_of_the_end_of_training() -> None:
    trainer = Trainer(config("topk"), settings(lr_decay_fraction=0.5))
    assert trainer.density is None
    for _ in range(20):
        trainer.step(sparse_activations(32))
    assert trainer.density is not None
    assert trainer.n_counted == 10 * 32
    assert float(trainer.density.sum()) == pytest.approx(4, abs=0.5)


@pytest.mark.parametrize("bad", [1e30, float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(bad: float) -> None:
    trainer = Trainer(config("topk"), settings())
    trainer.step(sparse_activations(32))
    before = [p.detach().clone() for p in trainer.sae.parameters()]
    with pytest.raises(JobFailed, match=r"NaN or infinite|diverged") as raised:
        trainer.step(torch.full((32, 16), bad))
    assert raised.value.fix
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.sae.parameters(), strict=True))
    assert trainer.n_steps_done == 1


def test_activations_that_cannot_be_trained_on_are_refused_at_the_start() -> None:
    trainer = Trainer(config("topk"), settings())
    with pytest.raises(BadInput, match="mean norm is nan"):
        trainer.prepare(torch.full((4, 16), float("nan")))
    with pytest.raises(BadInput, match=r"mean norm is 0\.0"):
        trainer.prepare(torch.zeros(4, 16))
    with pytest.raises(WrongShape, match=r"\(32, 15\) does not fit"):
        trainer.step(torch.zeros(32, 15))


def test_progress_has_every_metric_and_ends_at_one() -> None:
    trainer = Trainer(config("topk"), settings(log_interval=7))
    progress, _ = run(alone(trainer, Synthetic(sparse_activations(256), 32)))
    logged = [step.metrics for step in progress if step.metrics]
    assert [metrics["n_tokens"] for metrics in logged] == [7 * 32, 14 * 32, 20 * 32]
    names = {"loss", "mse", "l0", "l1", "fvu", "dead_fraction", "grad_norm", "lr", "tokens_per_second", "n_tokens"}
    assert set(logged[0]) == names
    assert all(math.isfinite(value) for metrics in logged for value in metrics.values())
    assert progress[-1].fraction == 1
    assert not any(step.checkpointed for step in progress)


def test_stop_keeps_a_usable_sae() -> None:
    trainer = Trainer(config("topk"), settings(log_interval=1))
    job = alone(trainer, Synthetic(sparse_activations(256), 32))
    next(job)
    with pytest.raises(StopIteration) as end:
        job.send(Signal.STOP)
    sae = end.value.value
    assert sae.cfg.metadata["mistudio"]["training"]["n_tokens"] == 32
    assert bool(sae(sparse_activations(8)).isfinite().all())


def test_stopping_before_the_first_step_leaves_nothing_to_keep() -> None:
    class Slow(Synthetic):
        def batches(self) -> Any:
            while True:
                yield None

    job = train(Trainer(config("topk"), settings()), Slow(sparse_activations(32), 32))
    assert next(job).stage == "running the model"
    with pytest.raises(Cancelled, match="before its first step"):
        job.send(Signal.STOP)


def test_checkpoints_are_written_when_told_and_at_intervals() -> None:
    written: list[int] = []

    def checkpoint(trainer: Trainer, _stream: Synthetic) -> None:
        written.append(trainer.n_steps_done)

    trainer = Trainer(config("topk"), settings(log_interval=1, checkpoint_interval=5 * 32))
    job = alone(trainer, Synthetic(sparse_activations(256), 32), checkpoint=checkpoint)
    next(job)
    told: Progress = job.send(Signal.CHECKPOINT)
    assert told.checkpointed
    assert written == [1]
    steps = [(trainer.n_steps_done, step.checkpointed) for step in job]
    assert [n for n, checkpointed in steps if checkpointed] == [5, 10, 15, 20]
    assert written == [1, 5, 10, 15, 20]
