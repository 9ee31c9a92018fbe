"""Metrics against their formulas written out by hand, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from training_data import sparse_activations

from mistudio_engine.training import metrics

N, D, D_SAE = 50, 16, 7
EXACT = 1e-12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = sparse_activations(N).double()
Y = X * 0.9 + normal(N, D) * 0.1
ACTS = (normal(N, D_SAE, seed=1) - 0.5).relu()
PAIRS = list(zip(X.tolist(), Y.tolist(), strict=True))
SSE = [sum((b - a) ** 2 for a, b in zip(p, q, strict=True)) for p, q in PAIRS]
NORMS = [(math.hypot(*p), math.hypot(*q)) for p, q in PAIRS]
DOTS = [sum(a * b for a, b in zip(p, q, strict=True)) for p, q in PAIRS]
MEAN = [sum(column) / N for column in zip(*X.tolist(), strict=True)]
SPREAD = [sum((a - m) ** 2 for a, m in zip(p, MEAN, strict=True)) for p, _ in PAIRS]


def close(expected: float) -> object:
    return pytest.approx(expected, rel=EXACT)


def test_mse_is_the_squared_distance_summed_over_dimensions() -> None:
    assert float(metrics.mse(X, Y)) == close(sum(SSE) / N)


def test_fvu_is_the_error_over_the_variance() -> None:
    fvu = metrics.fvu(metrics.mse(X, Y), X.pow(2).sum(-1).mean(), X.mean(0))
    assert float(fvu) == close(sum(SSE) / sum(SPREAD))
    assert float(metrics.explained_variance(fvu)) == close(1 - sum(SSE) / sum(SPREAD))


def test_the_legacy_explained_variance_weighs_every_token_alike() -> None:
    expected = sum(1 - error / spread for error, spread in zip(SSE, SPREAD, strict=True)) / N
    assert float(metrics.explained_variance_legacy(X, Y)) == close(expected)


def test_cosine_is_the_mean_over_tokens() -> None:
    expected = sum(dot / (a * b) for dot, (a, b) in zip(DOTS, NORMS, strict=True)) / N
    assert float(metrics.cosine(X, Y)) == close(expected)


def test_norms_and_their_ratio_are_means_over_tokens() -> None:
    assert float(metrics.l2_norm(X)) == close(sum(a for a, _ in NORMS) / N)
    assert float(metrics.l2_norm(Y)) == close(sum(b for _, b in NORMS) / N)
    assert float(metrics.l2_ratio(X, Y)) == close(sum(b / a for a, b in NORMS) / N)


def test_the_reconstruction_bias_is_the_gamma_by_which_the_output_is_nearest() -> None:
    gamma = metrics.relative_reconstruction_bias(float(Y.pow(2).sum() / N), float((X * Y).sum() / N))
    assert gamma is not None
    assert gamma == close(sum(b * b for _, b in NORMS) / sum(DOTS))
    errors = [float((Y / g - X).pow(2).sum()) for g in (gamma * 0.99, gamma, gamma * 1.01)]
    assert errors[1] == min(errors)
    assert metrics.relative_reconstruction_bias(2.0, 0.0) is None


def test_l0_counts_active_features_and_l1_adds_them_up() -> None:
    assert float(metrics.l0(ACTS)) == pytest.approx(sum(a > 0 for row in ACTS.tolist() for a in row) / N)
    assert float(metrics.l1(ACTS)) == close(sum(a for row in ACTS.tolist() for a in row) / N)


def test_an_activation_below_zero_is_active_and_does_not_cancel_another() -> None:
    signed = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    assert float(metrics.l0(signed)) == 1
    assert float(metrics.l1(signed)) == 1.5
    assert metrics.density(signed).tolist() == [0.5, 0.5, 0]


def test_density_is_the_share_of_tokens() -> None:
    expected = [sum(a > 0 for a in column) / N for column in zip(*ACTS.tolist(), strict=True)]
    assert metrics.density(ACTS).tolist() == pytest.approx(expected)
    assert float(metrics.dead_fraction(torch.tensor([0.0, 0.5, 0.0, 1.0]))) == 0.5


def test_the_density_histogram_counts_each_living_feature_once_in_its_quarter_of_a_decade() -> None:
    densities = [10 ** (-8 + i / 4) for i in range(33)] + [10 ** (-8 + i / 4) * 1.1 for i in range(32)]
    found = metrics.density_histogram(torch.tensor([*densities, 1e-12, 0.0, 0.0], dtype=torch.float64))
    assert found == [3, *[2] * 30, 3]
    for density in (0.001, 0.01, 0.1):  # on an edge: it belongs to the bin that begins there
        edge = round((math.log10(density) + 8) * 4)
        assert metrics.density_histogram(torch.tensor([density])).index(1) == edge
        assert metrics.density_histogram(torch.tensor([density * 0.99])).index(1) == edge - 1


def test_the_encoder_decoder_cosine_is_that_of_a_column_and_a_row() -> None:
    W_enc, W_dec = normal(D, D_SAE), normal(D_SAE, D, seed=1)
    W_dec[3] = 0
    expected = []
    for i in range(D_SAE):
        a, b = W_enc[:, i].tolist(), W_dec[i].tolist()
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        expected.append(dot / (math.hypot(*a) * math.hypot(*b)) if i != 3 else 0.0)
    assert metrics.encoder_decoder_cosine(W_enc, W_dec).tolist() == pytest.approx(expected, rel=EXACT)


def test_losses_of_logits_are_their_formulas() -> None:
    p, q = normal(5, 9), normal(5, 9, seed=1)
    targets = torch.tensor([0, 3, 8, 2, 2])
    soft_p, soft_q = p.exp() / p.exp().sum(-1, keepdim=True), q.exp() / q.exp().sum(-1, keepdim=True)
    ce = [-math.log(float(soft_p[i, t])) for i, t in enumerate(targets)]
    assert metrics.cross_entropy(p, targets).tolist() == pytest.approx(ce, rel=EXACT)
    kl = [sum(float(a * (a / b).log()) for a, b in zip(soft_p[i], soft_q[i], strict=True)) for i in range(5)]
    assert metrics.kl_div(p, q).tolist() == pytest.approx(kl, rel=EXACT)
    assert metrics.kl_div(p, p).tolist() == [0] * 5


def test_scores_are_one_for_no_loss_and_zero_for_that_of_zeroing() -> None:
    assert metrics.ce_loss_score(1.0, 1.5, 3.0) == 0.75
    assert (metrics.ce_loss_score(1.0, 1.0, 3.0), metrics.ce_loss_score(1.0, 3.0, 3.0)) == (1, 0)
    assert metrics.kl_div_score(0.5, 2.0) == 0.75
    assert (metrics.kl_div_score(0.0, 2.0), metrics.kl_div_score(2.0, 2.0)) == (1, 0)


def test_logits_of_half_precision_are_measured_in_fp32() -> None:
    p, q = normal(5, 9).bfloat16(), normal(5, 9, seed=1).bfloat16()
    targets = torch.tensor([0, 3, 8, 2, 2])
    assert torch.equal(metrics.kl_div(p, q), metrics.kl_div(p.float(), q.float()))
    assert torch.equal(metrics.cross_entropy(p, targets), metrics.cross_entropy(p.float(), targets))


def test_nothing_divides_by_zero() -> None:
    x = torch.ones(3, 4)
    assert math.isfinite(float(metrics.fvu(metrics.mse(x, x), x.pow(2).sum(-1).mean(), x.mean(0))))
    assert float(metrics.explained_variance_legacy(x, x)) == 1
    assert math.isfinite(float(metrics.l2_ratio(torch.zeros(3, 4), x)))
    assert metrics.ce_loss_score(2.0, 2.0, 2.0) == 1.0
    assert metrics.kl_div_score(0.0, 0.0) == 1.0
