"""AUROC against its definition, probes against separable data, and scores that cannot be had by choosing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio_engine.demo.concepts import Concept
from mistudio_engine.demo.truth import auroc, concept_scores, linear_probe, summary


def pairs_won(scores: list[float], truth: list[bool]) -> float:
    """The definition, pair by pair."""
    inside = [score for score, true in zip(scores, truth, strict=True) if true]
    outside = [score for score, true in zip(scores, truth, strict=True) if not true]
    won = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    return won / (len(inside) * len(outside))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.0, 0.25, 1.0, 3.5, -2.0]), st.booleans()), min_size=2, max_size=60))
def test_auroc_is_the_share_of_pairs_in_order_with_ties_half(rows: list[tuple[float, bool]]) -> None:
    scores, truth = [score for score, _ in rows], [true for _, true in rows]
    found = auroc(torch.tensor(scores), torch.tensor(truth)).item()
    if all(truth) or not any(truth):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(pairs_won(scores, truth), abs=1e-12)


def test_auroc_of_many_columns_is_that_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 70, generator=generator).relu()
    truth = torch.rand(300, generator=generator) < 0.2
    together = auroc(scores, truth)
    assert together.shape == (70,)
    assert torch.equal(together, torch.stack([auroc(column, truth) for column in scores.T]))


def test_a_probe_finds_the_direction_that_made_the_labels() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 8, generator=generator) * torch.logspace(-2, 2, 8) + 5
    direction = torch.randn(8, generator=generator) / torch.logspace(-2, 2, 8)
    truth = (x - 5) @ direction > 0
    weights, bias = linear_probe(x, truth)
    assert auroc(x @ weights + bias, truth) > 0.999


def test_a_probe_agrees_with_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    z = (z - z.mean(0)) / z.std(0)
    truth = z[:, 0] - z[:, 1] + torch.randn(500, generator=generator) > 0.3
    weights, bias = linear_probe(z, truth, l2=1e-2)
    theirs = linear_model.LogisticRegression(C=1 / (1e-2 * 500), tol=1e-10, max_iter=1000).fit(z.numpy(), truth.numpy())
    assert weights.numpy() == pytest.approx(theirs.coef_[0], rel=1e-3)
    assert bias.item() == pytest.approx(theirs.intercept_[0], rel=1e-2, abs=1e-3)


@pytest.fixture
def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[Concept]]:
    """Features, activations, masks and the choosing half, in which feature 7 is one concept and 1 or 2 another."""
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(4000, 2, generator=generator) < 0.3
    acts = torch.rand(4000, 40, generator=generator) * (torch.rand(4000, 40, generator=generator) < 0.1)
    acts[:, 7] = masks[:, 0] * (1 + torch.rand(4000, generator=generator))
    side = torch.rand(4000, generator=generator) < 0.5
    acts[:, 1], acts[:, 2] = (masks[:, 1] & side).float(), (masks[:, 1] & ~side).float()
    sae_in = torch.cat([masks.float(), torch.randn(4000, 3, generator=generator)], dim=1)
    concepts = [Concept("whole", "lexical", "in one feature"), Concept("split", "contextual", "in two features")]
    return acts, sae_in, masks, torch.arange(4000) % 2 == 0, concepts


def test_a_concept_in_one_feature_and_one_split_over_two_are_told_apart(planted) -> None:
    whole, split = concept_scores(*planted)
    assert (whole.feature, whole.single, whole.n_tokens) == (7, 1.0, int(planted[2][1::2, 0].sum()))
    assert split.feature in (1, 2) and 0.7 < split.single < 0.8
    assert whole.five > 0.999 and split.five > 0.999 and whole.ceiling > 0.999


def test_sparse_activations_score_as_dense_ones_do(planted) -> None:
    acts, *rest = planted
    assert concept_scores(acts.to_sparse(), *rest) == concept_scores(acts, *rest)


def test_noise_is_not_found_however_many_features_there_are_to_choose_from() -> None:
    generator = torch.Generator().manual_seed(4)
    acts, sae_in = torch.rand(2000, 400, generator=generator), torch.randn(2000, 8, generator=generator)
    masks = torch.rand(2000, 1, generator=generator) < 0.2
    (score,) = concept_scores(acts, sae_in, masks, torch.arange(2000) < 1000, [Concept("noise", "lexical", "none")])
    assert all(abs(value - 0.5) < 0.08 for value in (score.single, score.five, score.ceiling))


def test_the_summary_counts_concepts_above_the_threshold_by_kind(planted) -> None:
    shares = summary(concept_scores(*planted))
    assert (shares["all_single"], shares["lexical_single"], shares["contextual_single"]) == (0.5, 1.0, 0.0)
    assert shares["all_five"] == shares["contextual_ceiling"] == 1.0
