"""How features are ranked: by the words they carry, by meaning, by both, by likeness, or by numbers from elsewhere.

Functions of a snapshot. What a score is depends on the rows alone and not on how they were written: words are looked up
in the full-text indices but weighed here (BM25 counts rows that are gone until LanceDB compacts them away), vectors are
compared one by one.

It knows the names of the columns, but not how rows got there, what a page is, nor who asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.runtime.snapshot import Snapshot

__all__ = [
    "MAX_WORDS",
    "SCORE_MEANS",
    "Ranking",
    "Scores",
    "by_meaning",
    "by_words",
    "first",
    "fused",
    "given",
    "likeness",
    "listed",
    "mean_of",
    "words_in",
]

FIELD_WEIGHTS = {"label": 1.0, "category": 0.8, "text": 0.6, "example_text": 0.2}
"""What a word counts in the best field that has it. A window of text around an example holds every common word."""

FIELD_NAMES = {
    "label": "label has",
    "category": "category has",
    "text": "top tokens have",
    "example_text": "examples have",
}

LABEL_SHARE = 0.65
"""What the label's likeness counts beside the examples'. Chosen on the embedded corpus (benchmarks/search.py)."""

MEANING_SHARE = 0.7
"""What meaning counts beside words in a hybrid ranking."""

DOUBT = 0.05
"""By what share a feature whose label is no better than chance counts less than a certain one in a hybrid ranking."""

SCORE_MEANS: dict[str, str] = {
    "text": "Share of the query's words that the feature carries, rare words weighing more: 1 is all of them in the "
    "label; a word in the category counts 0.8, in the top tokens 0.6, in the examples 0.2.",
    "meaning": "Mean cosine similarity of the query with the label (0.65) and with the top tokens (0.35), or with the "
    "one of them that there is: 1 is the same meaning, 0 none in common.",
    "hybrid": "0.7 times the score by meaning and 0.3 times the score by words; up to a twentieth less where the label "
    "has little confidence.",
    "similar": "Mean of the likeness in meaning (cosines of the label and example vectors) and of the decoder "
    "directions' cosine, or the one of them that there is.",
    "decoder": "Cosine similarity of the decoder directions.",
    "token": "Share of the feature's activations that are on the token.",
    "promotes": "The feature's effect on the tokens' logits, as a share of the largest found.",
    "suppresses": "The feature's effect on the tokens' logits, as a share of the largest found.",
    "list": "Nothing was compared: those that fire most often come first, SAE by SAE.",
}
"""What a score is, by mode; always within 0 and 1."""

MAX_WORDS = 16
"""Words of a query that are looked up. At 50,000 features each costs 3 ms, and one that no feature has 26 ms, as it is
looked for as it stands."""

FLAT_SCORE = 6
"""Decimals of a score: what floating point adds behind them must not decide an order."""


class Ranking(NamedTuple):
    """A score for every row of a snapshot, and why a row has it."""

    scores: NDArray[np.float64]
    """(n,), higher is better; nan where the row does not match."""

    why: Callable[[int], list[str]]
    """Of a place."""


class Scores(NamedTuple):
    """Numbers for some features of one SAE."""

    indices: NDArray[np.int64]
    """(n,)"""

    values: NDArray[np.float64]
    """(n,) 0 to 1."""

    why: Callable[[int], str]
    """Of one of `indices`, by its place in them."""


def words_in(query: str) -> list[str]:
    """The different words of a query; only the first `MAX_WORDS` are looked up."""
    return list(dict.fromkeys(query.split()))


def by_words(snapshot: Snapshot, query: str) -> Ranking:
    """Features by the words of `query` that they carry, which must not be blank.

    score = Σ idf · weight / Σ idf over the words, with idf = ln(1 + (N − n + ½) / (n + ½)) as in BM25: N features, n of
    which carry it.
    """
    words = words_in(query)[:MAX_WORDS]
    found = snapshot.carriers(words, list(FIELD_WEIGHTS))
    scores, matches, total_idf = np.zeros(len(snapshot)), np.zeros(len(snapshot), bool), 0.0
    for word in words:
        weights = np.zeros(len(snapshot))
        for field, weight in FIELD_WEIGHTS.items():
            places = found[word][field]
            weights[places] = np.maximum(weights[places], weight)
        n_carriers = int(np.count_nonzero(weights))
        idf = math.log1p((len(snapshot) - n_carriers + 0.5) / (n_carriers + 0.5))
        matches |= weights > 0
        scores += idf * weights
        total_idf += idf

    def why(place: int) -> list[str]:
        reasons = []
        for field, has in FIELD_NAMES.items():
            carried = [word for word in words if _has(found[word][field], place)]
            if carried:
                reasons.append(f"{has} {', '.join(f'“{word[:80]}”' for word in carried)}")
        return reasons

    return Ranking(np.where(matches, np.round(scores / total_idf, FLAT_SCORE), np.nan), why)


def _has(places: NDArray[np.int64], place: int) -> bool:
    """Whether a sorted array has a value."""
    at = int(np.searchsorted(places, place))
    return at < len(places) and int(places[at]) == place


def by_meaning(snapshot: Snapshot, unit: NDArray[np.float32]) -> Ranking:
    """Features by the cosine of the vector `unit` (dimension,) with their label and with their top tokens."""
    return Ranking(*_meaning(*snapshot.cosines(unit)))


def _meaning(
    label32: NDArray[np.float32], example32: NDArray[np.float32]
) -> tuple[NDArray[np.float64], Callable[[int], list[str]]]:
    label, example = label32.astype(np.float64), example32.astype(np.float64)
    both = LABEL_SHARE * label + (1 - LABEL_SHARE) * example
    scores = np.where(np.isnan(label), example, np.where(np.isnan(example), label, both))

    def why(place: int) -> list[str]:
        likenesses = (("label", label[place]), ("top tokens", example[place]))
        said = [f"{what} {cosine:.2f}" for what, cosine in likenesses if not math.isnan(cosine)]
        return [f"close in meaning (cosine: {', '.join(said)})"] if said else []

    return np.round(scores, FLAT_SCORE).astype(np.float64), why


def fused(snapshot: Snapshot, words: Ranking, meaning: Ranking) -> Ranking:
    """A weighted mean of both scores, less for labels of low confidence; a row that one does not have scores 0 there.

    Sums of scores with fixed bounds rank better than reciprocal ranks, which throw the distances away (Bruch, Gai and
    Ingber 2023, "An Analysis of Fusion Functions for Hybrid Retrieval").
    """
    by_words, by_meaning = np.nan_to_num(words.scores), np.maximum(np.nan_to_num(meaning.scores), 0)
    scores = MEANING_SHARE * by_meaning + (1 - MEANING_SHARE) * by_words
    # Balanced accuracy runs from ½, which is chance, to 1; a label that nobody measured is half believed.
    trust = np.clip(2 * np.nan_to_num(snapshot.confidence, nan=0.75) - 1, 0, 1)
    scores = np.round(scores * (1 - DOUBT * (1 - trust)), FLAT_SCORE)
    neither = np.isnan(words.scores) & np.isnan(meaning.scores)
    return Ranking(np.where(neither, np.nan, scores), lambda place: words.why(place) + meaning.why(place))


def likeness(snapshot: Snapshot, place: int) -> Ranking:
    """Features by how alike their labels and their top tokens are to those of the one at `place`, without itself."""
    label, example = snapshot.vectors_of(place)
    nothing = np.full(len(snapshot), np.nan, np.float32)
    scores, why = _meaning(
        nothing if label is None else snapshot.cosines(label)[0],
        nothing if example is None else snapshot.cosines(example)[1],
    )
    scores[place] = np.nan
    return Ranking(scores, why)


def given(snapshot: Snapshot, scores: Mapping[str, Scores]) -> Ranking:
    """Features by numbers that somebody else has, by SAE."""
    values = np.full(len(snapshot), np.nan)
    for sae, some in scores.items():
        places = snapshot.places_of(sae, some.indices)
        here = places >= 0
        values[places[here]] = np.round(some.values[here], FLAT_SCORE)

    def why(place: int) -> list[str]:
        some = scores.get(snapshot.saes[snapshot.sae[place]])
        at = [] if some is None else np.flatnonzero(some.indices == snapshot.index[place])
        return [some.why(int(at[0]))] if some is not None and len(at) else []

    return Ranking(values, why)


def mean_of(one: Ranking, other: Ranking) -> Ranking:
    """The mean of two scores, or the one that there is."""
    both = np.stack([one.scores, other.scores])
    n_known = (~np.isnan(both)).sum(0)
    scores = np.where(n_known > 0, np.nansum(both, axis=0) / np.maximum(n_known, 1), np.nan)
    return Ranking(np.round(scores, FLAT_SCORE).astype(np.float64), lambda place: one.why(place) + other.why(place))


def listed(snapshot: Snapshot) -> Ranking:
    """Every feature: SAE by SAE, those that fire most often first."""
    order = np.empty(len(snapshot))
    sae = np.argsort(np.argsort(snapshot.saes)) if snapshot.saes else np.zeros(0, np.int64)
    order[np.lexsort((snapshot.index, -snapshot.frequency, sae[snapshot.sae]))] = -np.arange(len(snapshot))
    return Ranking(order, lambda place: [])


def first(snapshot: Snapshot, ranking: Ranking, mask: NDArray[np.bool_], begin: int, end: int) -> list[int]:
    """The places of the hits `begin` to `end` among the rows of `mask`, best first.

    Of equal ones the labelled come first, then the shorter labels, then by SAE and index: the same order each time.
    """
    hits = np.flatnonzero(mask & ~np.isnan(ranking.scores))
    end = min(end, len(hits))
    if begin >= end:
        return []
    scores = ranking.scores[hits]
    last = -np.partition(-scores, end - 1)[end - 1]
    near = hits[scores >= last]  # all that equal the last one, too: their order decides
    order = np.lexsort((snapshot.order[near], -ranking.scores[near]))
    return [int(place) for place in near[order[begin:end]]]
