"""Activations are brought to mean norm √d, and features that will never fire are foreseen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from training_data import config, settings, sparse_activations

from mistudio_engine.api.errors import BadInput
from mistudio_engine.training.scaling import Scaling, dead_forecast, mean_and_spread
from mistudio_engine.training.trainer import Trainer

N, D = 8192, 64
WIDE = 2048
"""Features: enough that the share of dead ones is known to a hundredth."""


def activations(kind: str, ratio: float) -> Tensor:
    """(N, D) with ‖mean‖ = ratio · ‖standard deviation‖."""
    generator = torch.Generator().manual_seed(99)  # not the weights' own
    if kind == "sparse":
        x = sparse_activations(N, D)
    else:
        widths = torch.linspace(0.1, 3, D) if kind == "uneven" else torch.ones(D)
        x = torch.randn(N, D, generator=generator) * widths
    mean = torch.randn(D, generator=generator)
    return x - x.mean(dim=0) + mean / mean.norm() * x.std(dim=0).norm() * ratio


def never_firing(trainer: Trainer, x: Tensor) -> float:
    """Share of features that no token of x activates."""
    return float((trainer.sae.encode(trainer.scaling(x)) == 0).all(dim=0).float().mean())


@pytest.mark.parametrize("kind", ["normal", "uneven", "sparse"])
@pytest.mark.parametrize("ratio", [0, 1, 5, 15])
@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_transcoder", "standard"])
def test_the_forecast_is_the_share_of_features_that_never_fire(architecture: str, ratio: float, kind: str) -> None:
    """Within 0.06: the furthest of this many normal numbers lies about 0.56 below √(2 ln n), which at the slope of the
    normal distribution is 0.03 at most; three times 0.01 is chance. JumpReLU's first threshold, which the forecast does
    not know, is a tenth of what the mean scatters by, and keeps another 0.04 below it."""
    x = activations(kind, ratio)
    more = {} if "transcoder" in architecture else {"apply_b_dec_to_input": False}
    cfg = config(architecture, d_in=D, d_sae=WIDE, **more)
    hp = settings(n_tokens=N, buffer_tokens=N, dead_feature_window=N, centre_inputs=False)
    trainer = Trainer(cfg, hp)
    trainer.prepare(x, x if cfg.is_transcoder else None)
    assert trainer.forecast is not None
    assert trainer.forecast.outlier_ratio == pytest.approx(ratio, abs=0.01)
    assert trainer.forecast.dead_fraction == pytest.approx(
        never_firing(trainer, x), abs=0.1 if "jumprelu" in architecture else 0.06
    )
    assert len(trainer.warnings) == (trainer.forecast.dead_fraction > 0.05)
    if trainer.warnings:
        assert "start dead" in trainer.warnings[0]
        assert f"{ratio:.1f} times their spread. centre_inputs=True" in trainer.warnings[0]


@pytest.mark.parametrize("kind", ["normal", "uneven", "sparse"])
@pytest.mark.parametrize("ratio", [1, 5, 15])
def test_centring_leaves_no_feature_dead_and_is_what_transcoders_get(ratio: float, kind: str) -> None:
    x = activations(kind, ratio)
    hp = settings(n_tokens=N, buffer_tokens=N, dead_feature_window=N)
    for architecture in ("transcoder", "standard"):
        cfg = config(architecture, d_in=D, d_sae=WIDE)
        trainer = Trainer(cfg, hp)
        trainer.prepare(x, x if cfg.is_transcoder else None)
        assert trainer.forecast is not None
        assert trainer.forecast.outlier_ratio == pytest.approx(ratio, abs=0.01)
        assert trainer.forecast.dead_fraction == 0
        assert never_firing(trainer, x) == pytest.approx(0, abs=0.01)
        assert trainer.warnings == []
        assert (trainer.scaling.mean is not None) == cfg.is_transcoder


def test_a_longer_window_leaves_fewer_dead() -> None:
    x = activations("normal", 5)
    shares = [dead_forecast(x, False, window).dead_fraction for window in (1, 100, 10_000, 10_000_000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] < 0.5
    assert shares[-1] > 0.05
    assert dead_forecast(x, True, 100).dead_fraction == 0


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_z_has_mean_norm_root_d(scale: bool, centre: bool) -> None:
    x = activations("uneven", 3) * 29
    scaling = Scaling.estimate(x, scale=scale, centre=centre)
    z = scaling(x)
    assert (scaling.mean is not None) == centre
    if centre:
        torch.testing.assert_close(z.mean(dim=0) / z.norm(dim=-1).mean(), torch.zeros(D), rtol=0, atol=1e-6)
    if scale:
        assert float(z.norm(dim=-1).mean()) == pytest.approx(math.sqrt(D), rel=1e-5)
    elif not centre:
        assert torch.equal(z, x)
    assert torch.equal(Scaling()(x), x)


def test_sums_are_exact_enough_for_outlier_dimensions() -> None:
    """One dimension a million times the others, worse than real residual streams: fp32 sums would lose its spread."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3 * 8192 + 17, 5, generator=generator)
    x[:, 2] = x[:, 2] + 1e6
    mean, spread = mean_and_spread(x)
    torch.testing.assert_close(mean.double(), x.double().mean(dim=0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(spread.double(), x.double().std(dim=0, correction=0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("centre", [False, True])
def test_activations_without_a_scale_are_refused(bad: float, centre: bool) -> None:
    with pytest.raises(BadInput, match=r"mean norm is (nan|inf|0\.0)") as raised:
        Scaling.estimate(torch.full((20, 4), bad), scale=True, centre=centre)
    assert raised.value.fix
    one = torch.randn(20, 4)
    one[3, 2] = math.nan
    with pytest.raises(BadInput, match="mean norm is nan"):
        Scaling.estimate(one, scale=False, centre=centre)
