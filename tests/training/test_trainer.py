"""A trainer learns, folds what it learnt with, keeps dead features in view, and stops before NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_data import (
    D_IN,
    D_SAE,
    HOOK,
    HOOK_OUT,
    Synthetic,
    alone,
    both,
    config,
    run,
    settings,
    sparse_activations,
    stream_for,
)

from mistudio_engine.api.errors import BadInput, JobFailed, WrongShape
from mistudio_engine.api.sae_config import activation_of
from mistudio_engine.saes import ARCHITECTURES, SAE, load_sae, new_sae, save_sae
from mistudio_engine.training import metrics
from mistudio_engine.training.objectives import OBJECTIVES, Moment
from mistudio_engine.training.paths import Paths
from mistudio_engine.training.trainer import Trainer

TRAINED = sorted(ARCHITECTURES)
TRANSCODERS = [name for name in TRAINED if "transcoder" in name]
PENALISED = [name for name in TRAINED if activation_of(name) not in ("topk", "batchtopk")]
LONG = {"n_tokens": 64 * 400, "batch_size": 64, "lr": 5e-3, "buffer_tokens": 1024}


def sparsity(architecture: str) -> dict[str, Any]:
    """Penalties that leave a small SAE able to learn."""
    return {
        "relu": {"l1_coefficient": 0.2},
        "gated": {"l1_coefficient": 0.2},
        "jumprelu": {"l0_coefficient": 0.05, "jumprelu_init_threshold": 0.05},
    }.get(activation_of(architecture), {})


def steps(trainer: Trainer, n: int, factor: float = 1.0) -> list[Any]:
    """Train for n steps on synthetic activations, prepared on the first."""
    stream = stream_for(trainer, 512, factor)
    out = HOOK_OUT if trainer.cfg.is_transcoder else None
    if not trainer.prepared:
        trainer.prepare(stream.buffer[HOOK], stream.buffer[out] if out else None)
    batches = (batch for batch in stream.batches() if batch is not None)
    measured = []
    for _ in range(n):
        batch = next(batches)
        measured.append(trainer.step(batch[HOOK], batch[out] if out else None))
    return measured


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}


@pytest.mark.parametrize("architecture", TRAINED)
def test_training_explains_most_of_the_variance_and_the_finished_sae_works_on_raw_activations(
    tmp_path: Path, architecture: str
) -> None:
    trainer = Trainer(config(architecture), settings(**LONG, **sparsity(architecture)))
    stream = stream_for(trainer, 1024, factor=37)  # far from norm √d
    progress, sae = run(alone(trainer, stream))
    last = [step.metrics for step in progress if step.metrics][-1]
    assert last["fvu"] < 0.35
    x = stream.buffer[HOOK]
    y = stream.buffer[HOOK_OUT] if trainer.cfg.is_transcoder else x
    fvu = metrics.fvu(metrics.mse(y, sae(x)), y.pow(2).sum(-1).mean(), y.mean(0))
    assert float(fvu) == pytest.approx(last["fvu"], abs=0.1)
    assert float(metrics.l0(sae.encode(x))) == pytest.approx(last["l0"], rel=0.3)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(D_SAE))
    assert sae.cfg.normalize_activations == "none"
    assert (sae.cfg.model_name, sae.cfg.hook_name) == ("synthetic", HOOK)
    assert sae.cfg.hook_name_out == (HOOK_OUT if trainer.cfg.is_transcoder else None)
    training = sae.cfg.metadata["mistudio"]["training"]
    assert training["n_tokens"] == 64 * 400
    assert training["input_scale"] == trainer.scaling.scale
    again = load_sae(save_sae(sae, tmp_path / "sae", format="native", sparsity=trainer.density))
    assert again.cfg == sae.cfg
    assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "batchtopk", "topk_skip_transcoder"])
def test_training_in_bfloat16_ends_where_fp32_does(architecture: str, path: str) -> None:
    ends = []
    for precision in ("fp32", "bf16"):
        hp = settings(**LONG, **sparsity(architecture), path=path, precision=precision)
        trainer = Trainer(config(architecture), hp)
        last = steps(trainer, 200)[-20:]
        ends.append((sum(step.fvu for step in last) / 20, sum(step.l0 for step in last) / 20))
        assert trainer.sae.dtype == torch.float32
    assert ends[1] == pytest.approx(ends[0], rel=0.15)


def inside(trainer: Trainer) -> SAE:
    """The SAE in training as it runs on normalised activations; BatchTopK's with the threshold that it has learnt."""
    sae = new_sae(trainer.sae.cfg, weights_of(trainer))
    if trainer.cfg.activation == "batchtopk":
        assert trainer.batch_threshold is not None
        sae.get_parameter("threshold").copy_(trainer.batch_threshold / sae.W_dec.norm(dim=-1))
    return sae


@pytest.mark.parametrize("centre", [None, True, False])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("architecture", TRAINED)
def test_the_finished_sae_does_on_raw_activations_what_the_trained_one_does_on_normalised_ones(
    architecture: str, scale: bool, centre: bool | None
) -> None:
    d_out = {"d_out": D_IN + 5} if architecture in TRANSCODERS else {}
    hp = settings(scale_inputs=scale, centre_inputs=centre, **sparsity(architecture))
    trainer = Trainer(config(architecture, **d_out), hp)
    x, y = both(trainer.cfg, 512)
    x = x * 5 + torch.linspace(-3, 9, D_IN)
    y = None if y is None else y * 0.1 - torch.linspace(-2, 1, D_IN + 5)
    trainer.prepare(x, y)
    for i in range(12):
        rows = slice(i * 32, i * 32 + 32)
        trainer.step(x[rows], None if y is None else y[rows])
    finished, sae = trainer.finished_sae(), inside(trainer)
    z = trainer.scaling(x)
    expected = sae(z) / trainer.target_scaling.scale
    if trainer.target_scaling.mean is not None:
        expected = expected + trainer.target_scaling.mean
    norms = sae.W_dec.norm(dim=-1) / trainer.target_scaling.scale
    acts = sae.encode(z)
    # TopK's activations have the norm in them already where it is what they are chosen by.
    acts = acts / trainer.target_scaling.scale if trainer.cfg.activation == "topk" else acts * norms
    ours = finished.encode(x)
    borderline = ((ours > 0) != (acts > 0)).any(dim=1)  # a pre-activation that rounds to the other side of its edge
    assert float(borderline.float().mean()) < 0.02
    torch.testing.assert_close(ours[~borderline], acts[~borderline], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(finished(x)[~borderline], expected[~borderline], rtol=1e-3, atol=1e-3)
    centred = architecture in TRANSCODERS if centre is None else centre
    assert (trainer.scaling.mean is not None) == centred
    training = finished.cfg.metadata["mistudio"]["training"]
    assert training["centred"] == centred
    if architecture in TRANSCODERS:
        assert training["output_scale"] == trainer.target_scaling.scale
        assert (trainer.target_scaling.scale == trainer.scaling.scale) == (not scale)


@pytest.mark.parametrize("architecture", ["standard", "transcoder"])
def test_b_dec_starts_at_the_mean_of_what_is_to_be_reconstructed(architecture: str) -> None:
    trainer = Trainer(config(architecture), settings(centre_inputs=False))
    x, y = both(trainer.cfg, 512)
    trainer.prepare(x * 9, y)
    target = trainer.target_scaling(x * 9 if y is None else y)
    assert float(target.norm(dim=-1).mean()) == pytest.approx(math.sqrt(D_IN), rel=1e-5)
    torch.testing.assert_close(trainer.sae.b_dec.detach(), target.mean(0))
    centred = Trainer(config(architecture), settings(centre_inputs=True))
    centred.prepare(x * 9, y)
    torch.testing.assert_close(centred.sae.b_dec.detach(), torch.zeros(D_IN), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["topk", "standard", "batchtopk"])
def test_a_run_time_norm_is_trained_in_and_kept(architecture: str, norm: str) -> None:
    x = sparse_activations(1024) * 4
    cfg = config(architecture, normalize_activations=norm)
    trainer = Trainer(cfg, settings(**LONG, **sparsity(architecture)))
    _, sae = run(alone(trainer, Synthetic(x, 64)))
    assert sae.cfg.normalize_activations == norm
    assert trainer.scaling.scale == 1.0
    assert float(metrics.mse(x, sae(x)) / x.var(0).sum()) < 0.5


def test_the_finished_sae_has_the_type_that_was_asked_for() -> None:
    trainer = Trainer(config("jumprelu", dtype="bfloat16"), settings())
    trainer.step(sparse_activations(32))
    assert trainer.sae.dtype == torch.float32
    assert trainer.finished_sae().dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_batchtopk_comes_out_as_a_jumprelu_that_says_what_it_was(tmp_path: Path, architecture: str) -> None:
    trainer = Trainer(config(architecture), settings())
    steps(trainer, 3)
    sae = trainer.finished_sae()
    assert sae.cfg.architecture == "jumprelu"
    assert sae.cfg.metadata["training_architecture"] == architecture
    training = sae.cfg.metadata["mistudio"]["training"]
    assert training["k"] == 4
    assert training.get("widths") == ([12, 24, 48] if architecture == "matryoshka_batchtopk" else None)
    assert load_sae(save_sae(sae, tmp_path / "sae")).cfg == sae.cfg  # SAELens has jumprelu


@pytest.mark.parametrize("architecture", TRAINED)
def test_the_same_seed_gives_the_same_sae_and_another_seed_another(architecture: str) -> None:
    def trained(seed: int) -> Tensor:
        trainer = Trainer(config(architecture), settings(**sparsity(architecture)), seed)
        steps(trainer, 5)
        return trainer.sae.W_dec.detach()

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


def test_a_step_says_which_learning_rate_it_took() -> None:
    hp = settings(lr_warm_up_fraction=0.25, lr_decay_fraction=0.25)
    rates = [step.lr / hp.lr for step in steps(Trainer(config("standard"), hp), 20)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 12, 0.8, 0.6, 0.4, 0.2])


# The optimizer


@pytest.mark.parametrize("clip", [0.3, 1e6])
@pytest.mark.parametrize("architecture", TRAINED)
def test_a_step_is_clip_grad_norm_and_adam(architecture: str, clip: float) -> None:
    hp = settings(clip_grad_norm=clip, adam_beta1=0.8, adam_beta2=0.97, lr_warm_up_fraction=0.5)
    hp = hp.model_copy(update=sparsity(architecture))
    trainer = Trainer(config(architecture), hp)
    plain = Trainer(config(architecture), hp).sae
    plain.load_state_dict(trainer.sae.state_dict())
    trained = [p for name, p in plain.named_parameters() if name in trainer._trained]
    plain.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    adam = torch.optim.Adam(trained, betas=(0.8, 0.97), foreach=False)
    paths = Paths(trainer.cfg, hp, False)
    x, y = both(trainer.cfg, 512)
    for i in range(10):
        rows = slice(i * 32, i * 32 + 32)
        z, target = x[rows], x[rows] if y is None else y[rows]
        moment = Moment(hp, min(1, i / max(1, hp.sparsity_warm_up_steps)), trainer.dead, plain.skip(z))
        outcome = OBJECTIVES[architecture](paths.code(plain, plain.centre(z).detach()), target, moment)
        adam.zero_grad()
        outcome.loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, clip)
        measured = trainer.step(z, None if y is None else target)
        assert measured.grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert (measured.grad_norm > clip) == (clip < 1)
        adam.param_groups[0]["lr"] = measured.lr
        adam.step()
        if trainer.cfg.activation == "jumprelu":
            plain.get_parameter("threshold").data.clamp_(min=0)
        paths.learn(measured.l0)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(trainer.sae.get_parameter(name), weight, rtol=1e-4, atol=1e-6)


def test_thresholds_never_go_below_zero_and_come_back_from_it() -> None:
    hp = settings(lr=0.02, l0_coefficient=0.0, jumprelu_init_threshold=0.01, jumprelu_bandwidth=1.0)
    trainer = Trainer(config("jumprelu"), hp)
    lows = []
    for _ in range(20):
        steps(trainer, 1)
        lows.append(float(weights_of(trainer)["threshold"].min()))
    assert min(lows) == 0
    assert float((weights_of(trainer)["threshold"] > 0).float().mean()) > 0.2


# Dead features


@pytest.mark.parametrize("architecture", TRAINED)
def test_dead_features_are_counted_in_tokens(architecture: str) -> None:
    trainer = Trainer(config(architecture), settings(dead_feature_window=96, **sparsity(architecture)))
    bias = "b_gate" if architecture == "gated" else "b_enc"
    with torch.no_grad():
        trainer.sae.get_parameter(bias)[:7] = -100
    fractions = [step.dead_fraction for step in steps(trainer, 5)]
    assert fractions[:3] == [0, 0, 0]
    assert fractions[3] >= 7 / 48 - 1e-6
    assert bool(trainer.dead[:7].all())


@pytest.mark.parametrize("architecture", PENALISED)
def test_resampling_revives_dead_features_and_forgets_their_moments(architecture: str) -> None:
    hp = settings(dead_feature_window=64, resample_interval=128, lr_decay_fraction=0.1, **sparsity(architecture))
    trainer = Trainer(config(architecture), hp)
    bias = "b_gate" if architecture == "gated" else "b_enc"
    with torch.no_grad():
        trainer.sae.get_parameter(bias)[:5] = -100
    steps(trainer, 4)
    assert not bool(trainer.dead[:5].any())
    assert bool((trainer.sae.get_parameter(bias)[:5] == 0).all())
    for name in ("W_enc", "W_dec", bias):
        moment = trainer.optimizer.state[trainer._leaves[name]]["exp_avg"]
        assert moment.shape[0] == D_SAE, name
        assert float(moment[:5].abs().max()) == 0, name
        assert float(moment[5:].abs().max()) > 0, name
    assert float(trainer.optimizer.state[trainer._leaves["b_dec"]]["exp_avg"].abs().min()) > 0
    norms = trainer.sae.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(norms[:5], norms[5:].mean().expand(5), rtol=0.05, atol=0)
    steps(trainer, 1)
    assert bool((trainer.tokens_since_fired[:5] == 0).any())


def test_resampling_leaves_alone_what_is_not_by_feature_where_the_widths_are_equal() -> None:
    hp = settings(dead_feature_window=64, resample_interval=128, lr_decay_fraction=0.1, l1_coefficient=0.2)
    trainer = Trainer(config("skip_transcoder", d_in=16, d_sae=16), hp)
    with torch.no_grad():
        trainer.sae.get_parameter("b_enc")[:5] = -100
    steps(trainer, 4)
    for name in ("b_dec", "W_skip"):
        moment = trainer.optimizer.state[trainer._leaves[name]]["exp_avg"]
        assert float(moment[:5].abs().max()) > 0, name


def test_a_feature_that_fires_again_is_not_dead() -> None:
    trainer = Trainer(config("topk"), settings(dead_feature_window=32))
    trainer.tokens_since_fired.fill_(1000)
    steps(trainer, 1)
    fired = trainer.n_fired > 0
    assert bool(fired.any())
    assert torch.equal(trainer.tokens_since_fired == 0, fired)
    assert torch.equal(trainer.dead, ~fired)


def test_density_is_that_of_the_end_of_training() -> None:
    trainer = Trainer(config("topk"), settings(lr_decay_fraction=0.5))
    assert trainer.density is None
    steps(trainer, 20)
    assert trainer.density is not None
    assert trainer.n_counted == 10 * 32
    assert float(trainer.density.sum()) == pytest.approx(4, abs=0.5)


# What is refused, and what fails


@pytest.mark.parametrize("architecture", TRAINED)
@pytest.mark.parametrize("bad", [1e30, math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(bad: float, architecture: str) -> None:
    trainer = Trainer(config(architecture), settings())
    steps(trainer, 1)
    before = weights_of(trainer)
    y = torch.ones(32, D_IN) if architecture in TRANSCODERS else None
    with pytest.raises(JobFailed, match=r"NaN or infinite|diverged") as raised:
        trainer.step(torch.full((32, D_IN), bad), y)
    assert raised.value.fix
    assert all(torch.equal(p, before[name]) for name, p in trainer.sae.named_parameters())
    assert trainer.n_steps_done == 1
    assert trainer.take_score() is not None or architecture in PENALISED
    steps(trainer, 1)  # a batch of its own kind goes well again
    assert trainer.n_steps_done == 2


def test_a_loss_that_has_exploded_stops_after_twenty_steps_and_not_for_one_bad_batch() -> None:
    trainer = Trainer(config("standard"), settings(lr=1e-8, n_tokens=32 * 200))
    steps(trainer, 2)
    with torch.no_grad():
        trainer.sae.W_dec.mul_(1e4)
    assert all(step.fvu > 100 for step in steps(trainer, 19))
    with torch.no_grad():
        trainer.sae.W_dec.mul_(1e-4)
    assert steps(trainer, 1)[0].fvu < 100  # the count begins anew
    with torch.no_grad():
        trainer.sae.W_dec.mul_(1e4)
    steps(trainer, 19)
    before = weights_of(trainer)
    with pytest.raises(JobFailed, match=r"times the variance for long.*diverged"):
        steps(trainer, 1)
    assert all(torch.equal(p, before[name]) for name, p in trainer.sae.named_parameters())


def test_activations_that_cannot_be_trained_on_are_refused_at_the_start() -> None:
    trainer = Trainer(config("topk"), settings())
    with pytest.raises(BadInput, match="mean norm is nan"):
        trainer.prepare(torch.full((4, D_IN), math.nan))
    with pytest.raises(BadInput, match=r"mean norm is 0\.0"):
        trainer.prepare(torch.zeros(4, D_IN))
    with pytest.raises(WrongShape, match=r"\(32, 15\) does not fit"):
        trainer.step(torch.zeros(32, 15))
    assert not trainer.prepared
    transcoder = Trainer(config("transcoder"), settings())
    with pytest.raises(BadInput, match=r"mean norm is 0\.0"):
        transcoder.prepare(torch.randn(4, D_IN), torch.zeros(4, D_IN))
    with pytest.raises(WrongShape, match=r"A target of shape \(32, 3\)"):
        transcoder.step(torch.zeros(32, D_IN), torch.zeros(32, 3))


@pytest.mark.parametrize("architecture", TRAINED)
def test_a_transcoder_wants_a_target_and_an_sae_wants_none(architecture: str) -> None:
    trainer = Trainer(config(architecture), settings())
    x = sparse_activations(32)
    with pytest.raises(BadInput, match=r"trained on (one hook|two hooks)"):
        trainer.step(x, None if architecture in TRANSCODERS else x)


# BatchTopK's threshold


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_the_threshold_gives_about_k_active_features_on_activations_never_seen(architecture: str) -> None:
    hp = settings(n_tokens=256 * 400, batch_size=256, buffer_tokens=4096, lr=4e-3)
    trainer = Trainer(config(architecture), hp)
    x = sparse_activations(256 * 110, seed=0)
    trainer.prepare(x[:4096])
    for i in range(400):
        at = i % 100 * 256
        trainer.step(x[at : at + 256])
    fresh = x[256 * 100 :]
    assert float(metrics.l0(trainer.finished_sae().encode(fresh))) == pytest.approx(4, rel=0.1)


def test_the_threshold_follows_the_smallest_chosen_activations() -> None:
    trainer = Trainer(config("batchtopk"), settings(threshold_lr=0.25))
    assert trainer.batch_threshold is None
    smallest, expected = [], None
    for i in range(4):
        x = sparse_activations(320)[i * 32 : i * 32 + 32]
        sae = trainer.sae
        scores = ((sae.centre(x) @ sae.W_enc + sae.get_parameter("b_enc")) * sae.W_dec.norm(dim=1)).detach().relu()
        smallest.append(float(scores.flatten().topk(4 * 32).values[-1]))
        expected = smallest[-1] if expected is None else 0.75 * expected + 0.25 * smallest[-1]
        trainer.step(x)
        assert trainer.batch_threshold == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_any_active_feature_leaves_the_threshold_alone() -> None:
    trainer = Trainer(config("batchtopk"), settings(lr=1e-6))
    steps(trainer, 2)
    before = trainer.batch_threshold
    with torch.no_grad():
        trainer.sae.get_parameter("b_enc").fill_(-1000)
    assert steps(trainer, 1)[0].l0 == 0
    assert trainer.batch_threshold == before


# The score that checkpoints are compared by


def test_the_score_is_the_loss_a_dimension_since_it_was_last_asked() -> None:
    trainer = Trainer(config("topk"), settings())
    assert trainer.take_score() is None
    measured = steps(trainer, 3)
    expected = sum(step.mse for step in measured) / 3 / D_IN
    assert trainer.take_score() == pytest.approx(expected, rel=1e-5)
    assert trainer.take_score() is None
    later = steps(trainer, 1)
    assert trainer.take_score() == pytest.approx(later[0].mse / D_IN, rel=1e-5)


def test_auxk_does_not_count_in_the_score_and_a_penalty_does() -> None:
    trainer = Trainer(config("topk"), settings(dead_feature_window=32))
    trainer.tokens_since_fired.fill_(1000)
    measured = steps(trainer, 1)[0]
    assert measured.loss > 1.01 * measured.mse
    assert trainer.take_score() == pytest.approx(measured.mse / D_IN, rel=1e-5)
    penalised = Trainer(config("standard"), settings(sparsity_warm_up_fraction=0, l1_coefficient=2.0))
    measured = steps(penalised, 1)[0]
    assert measured.loss > 1.01 * measured.mse
    assert penalised.take_score() == pytest.approx(measured.loss / D_IN, rel=1e-5)


def test_there_is_no_score_while_the_penalty_warms_up() -> None:
    trainer = Trainer(config("standard"), settings(sparsity_warm_up_fraction=0.25))
    steps(trainer, 5)
    assert trainer.take_score() is None
    steps(trainer, 1)
    assert trainer.take_score() is not None
