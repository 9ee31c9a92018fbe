"""How well a dictionary carries the known concepts: one feature, five features, and the activations themselves.

For each concept a feature, five features and a linear probe are chosen on one half of the text and scored on the other,
so that the choice among hundreds of features is not counted as a finding. It knows activations and masks, nothing of
models, dictionaries or the grammar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from mistudio_engine.demo.concepts import CONCEPTS, Concept

__all__ = ["ConceptScore", "auroc", "concept_scores", "linear_probe", "summary"]


class ConceptScore(NamedTuple):
    """How one concept is carried; every AUROC is on text that had no part in choosing or fitting."""

    concept: str
    kind: Literal["lexical", "contextual"]
    n_tokens: int
    """Scored tokens inside the concept."""

    feature: int
    """The feature with the highest AUROC on the choosing half."""

    single: float
    """AUROC of that one feature, 0 to 1; 0.5 is chance."""

    five: float
    """AUROC of a logistic regression on the five features whose means inside and outside differ most, 0 to 1."""

    ceiling: float
    """AUROC of a logistic regression on the raw activations, 0 to 1: below about 0.99 the model itself is unsure."""


def auroc(scores: Any, truth: Any) -> torch.Tensor:
    """Area under the ROC curve of each column: the chance that a true token scores above a false one, ties half.

    `scores` is (n_tokens,) or (n_tokens, n_columns) and `truth` bool (n_tokens,); returns float64 () or (n_columns,).
    0.5 is chance, 1 is perfect, 0 is perfectly wrong; nan if the tokens are all true or all false. Exact: the rank-sum
    statistic of Mann and Whitney with mean ranks for ties.
    """
    scores, truth = torch.as_tensor(scores), torch.as_tensor(truth).bool()
    columns = scores[:, None] if scores.dim() == 1 else scores
    areas = areas_of(mean_ranks(columns), truth)
    return areas[0] if scores.dim() == 1 else areas


def mean_ranks(columns: torch.Tensor) -> torch.Tensor:
    """Each number's rank in its column, from 1; equal ones share their mean rank. Float64 (n_tokens, n_columns)."""
    ranks = torch.empty(columns.shape, dtype=torch.float64)
    for number, column in enumerate(columns.T):
        ordered, order = column.contiguous().sort()
        _, counts = torch.unique_consecutive(ordered, return_counts=True)
        mean_rank = counts.cumsum(0).double() - (counts.double() - 1) / 2
        ranks[order, number] = torch.repeat_interleave(mean_rank, counts)
    return ranks


def areas_of(ranks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """`auroc` of columns whose `mean_ranks` are known already; float64 (n_columns,)."""
    n_true = int(truth.sum())
    n_pairs = n_true * (len(truth) - n_true)
    if not n_pairs:
        return torch.full((ranks.shape[1],), torch.nan, dtype=torch.float64)
    return (truth.double() @ ranks - n_true * (n_true + 1) / 2) / n_pairs


def linear_probe(x: torch.Tensor, truth: torch.Tensor, l2: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (n_columns,) and bias () of a logistic regression on standardised columns, for use on the raw ones.

    Minimises mean cross-entropy + l2/2 · |weights|² by L-BFGS; the bias is free.
    """
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    z, y = (x - mean) / spread, truth.to(x.dtype)
    weights = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros((), dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(z @ weights + bias, y) + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weights = weights.detach() / spread
    return weights, bias.detach() - mean @ weights


def concept_scores(
    feature_acts: Any,
    sae_in: Any,
    masks: Any,
    choosing: Any,
    concepts: Sequence[Concept] = CONCEPTS,
) -> list[ConceptScore]:
    """Score every concept.

    `feature_acts` (n_tokens, d_sae) and `sae_in` (n_tokens, d_in) are float, `masks` bool (n_tokens, n_concepts), and
    `choosing` bool (n_tokens,) names the tokens that features are chosen and probes fitted on; the others are scored.
    Leave out special tokens, and let no document lie in both halves.
    """
    acts, raw = dense(feature_acts), dense(sae_in)
    masks, choosing = torch.as_tensor(masks).bool(), torch.as_tensor(choosing).bool()
    alive = (acts[choosing] > 0).any(0).nonzero().squeeze(1)
    chosen_acts, scored_acts = acts[choosing][:, alive], acts[~choosing][:, alive]
    chosen_raw, scored_raw = raw[choosing], raw[~choosing]
    spread = chosen_acts.std(0).clamp_min(1e-6)
    ranks = mean_ranks(chosen_acts)  # sorting is most of the work, and the same for every concept
    found = []
    for concept, truth in zip(concepts, masks.T, strict=True):
        inside, scored = truth[choosing], truth[~choosing]
        best = int(areas_of(ranks, inside).argmax())
        difference = (chosen_acts[inside].mean(0) - chosen_acts[~inside].mean(0)) / spread
        five = difference.abs().topk(min(5, len(alive))).indices
        found.append(
            ConceptScore(
                concept.name,
                concept.kind,
                int(scored.sum()),
                int(alive[best]),
                auroc(scored_acts[:, best], scored).item(),
                probe_auroc(chosen_acts[:, five], inside, scored_acts[:, five], scored),
                probe_auroc(chosen_raw, inside, scored_raw, scored),
            )
        )
    return found


def probe_auroc(fit_x: torch.Tensor, fit_y: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    weights, bias = linear_probe(fit_x, fit_y)
    return auroc(x @ weights + bias, y).item()


def dense(x: Any) -> torch.Tensor:
    x = torch.as_tensor(x)
    return (x.to_dense() if x.layout != torch.strided else x).float()


def summary(scores: Sequence[ConceptScore], threshold: float = 0.95) -> dict[str, float]:
    """Share of concepts above the threshold, 0 to 1: by one feature, five, the raw activations; in all and by kind."""
    shares = {}
    for kind in ("all", "lexical", "contextual"):
        some = [score for score in scores if kind in ("all", score.kind)]
        for field in ("single", "five", "ceiling"):
            shares[f"{kind}_{field}"] = sum(getattr(score, field) > threshold for score in some) / max(1, len(some))
    return shares
