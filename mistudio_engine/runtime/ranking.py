"""How features are ranked: by the words they carry, by meaning, and by both.

Functions of a LanceDB table that stays at one version. What a score is depends on the rows alone and not on how they
were written: words are looked up in the full-text indices but weighed here, vectors are compared one by one. (BM25
counts rows that are gone until LanceDB compacts them away, and an approximate vector index answers differently each
time it is built. Exact, 50,000 features of 384 dimensions cost about 100 ms.)

It knows the names of the columns, but not how rows got there, what a page is, nor who asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from lancedb.query import FullTextOperator, LanceQueryBuilder, LanceVectorQueryBuilder, MatchQuery
from lancedb.table import Table

from mistudio_engine.runtime.feature_rows import quoted

__all__ = ["FIELD_WEIGHTS", "SCORE_MEANS", "Ranking", "best", "by_meaning", "by_words", "fused", "take"]

FIELD_WEIGHTS = {"label": 1.0, "category": 0.8, "text": 0.6, "example_text": 0.4}
"""What a word counts in the best field that has it."""

FIELD_NAMES = {
    "label": "label has",
    "category": "category has",
    "text": "top tokens have",
    "example_text": "examples have",
}

SCORE_MEANS: dict[str, str] = {
    "text": "Share of the query's words that the feature carries, rare words weighing more: 1 is all of them in the "
    "label; a word in the category counts 0.8, in the top tokens 0.6, in the examples 0.4.",
    "meaning": "Cosine similarity of the query with the label or with the examples, whichever is closer: 1 is the same "
    "meaning, 0 is none in common.",
    "hybrid": "Reciprocal rank fusion of the rankings by words and by meaning: 1 is first in both, 0.5 is first in one "
    "and absent from the other.",
}
"""What a score is, by mode; always within 0 and 1."""

RRF_K = 60
"""Cormack, Clarke and Büttcher 2009, "Reciprocal rank fusion outperforms Condorcet", section 2."""

MAX_PARTS = 16
"""Words of a query that are looked up; those beyond it are left out."""

DEPTH = 1000
"""How far down a ranking by meaning counts in a fusion, and how much of it is fetched at the least."""

FLAT_SCORE = 6
"""Decimals of a score: what floating point adds behind them must not decide an order."""


class Ranking(NamedTuple):
    """Row ids and their scores, in no particular order; how many rows match in all; and why a row does."""

    rows: np.ndarray  # (n,) uint64
    scores: np.ndarray  # (n,) float64, higher is better
    total: int
    why: Callable[[int], list[str]]


def by_words(table: Table, query: str, condition: str | None) -> Ranking:
    """Features by the words of `query` that they carry, which must not be blank.

    score = Σ idf · weight / Σ idf over the words, with idf = ln(1 + N / (1 + n)): N features, n of which carry it.
    """
    n_rows = max(1, table.count_rows())
    found = {part: _carriers(table, part, condition) for part in list(dict.fromkeys(query.split()))[:MAX_PARTS]}
    rows, gains, total_idf = [], [], 0.0
    for fields in found.values():
        carriers = np.unique(np.concatenate(list(fields.values())))
        weights = np.zeros(len(carriers))
        for field, ids in fields.items():
            at = np.searchsorted(carriers, ids)
            weights[at] = np.maximum(weights[at], FIELD_WEIGHTS[field])
        idf = math.log1p(n_rows / (1 + len(carriers)))
        rows.append(carriers)
        gains.append(idf * weights)
        total_idf += idf
    unique, inverse = np.unique(np.concatenate(rows), return_inverse=True)
    scores = np.bincount(inverse, weights=np.concatenate(gains), minlength=len(unique)) / total_idf

    def why(row: int) -> list[str]:
        reasons = []
        for field, has in FIELD_NAMES.items():
            words = [part for part, fields in found.items() if _has(fields[field], row)]
            if words:
                reasons.append(f"{has} {', '.join(f'“{word[:80]}”' for word in words)}")
        return reasons

    return Ranking(unique, np.round(scores, FLAT_SCORE), len(unique), why)


def _has(ids: np.ndarray, row: int) -> bool:
    """Whether a sorted array has a value."""
    at = int(np.searchsorted(ids, np.uint64(row)))
    return at < len(ids) and int(ids[at]) == row


def _carriers(table: Table, part: str, condition: str | None) -> dict[str, np.ndarray]:
    """Row ids that carry one part of a query, by field: as a word, else as it stands.

    What full text does not know is punctuation, a part of a word, a script without spaces.
    """
    everything = max(1, table.count_rows())
    found = {}
    if any(character.isalnum() for character in part):
        for field in FIELD_WEIGHTS:
            match = MatchQuery(
                part,
                field,
                boost=1.0,
                fuzziness=0,
                max_expansions=50,
                operator=FullTextOperator.AND,  # one part may be several words: "don't", "blue-green"
                prefix_length=0,
                document_granularity=None,
            )
            found[field] = _row_ids(
                _where(table.search(match, query_type="fts").select(["_score"]), condition), everything
            )
    if any(len(ids) for ids in found.values()):
        return found
    for field in FIELD_WEIGHTS:
        contains = f"contains(lower({field}), {quoted(part[:200].lower())})"
        both = f"({condition}) AND {contains}" if condition else contains
        found[field] = _row_ids(_where(table.search().select(["index"]), both), everything)
    return found


def _where(query: LanceQueryBuilder, condition: str | None) -> LanceQueryBuilder:
    return query.where(condition) if condition else query


def _row_ids(query: LanceQueryBuilder, limit: int) -> np.ndarray:
    return np.sort(query.with_row_id(True).limit(limit).to_arrow()["_rowid"].to_numpy())


def by_meaning(table: Table, unit: np.ndarray, condition: str | None, need: int) -> Ranking:
    """Features by the cosine of the vector `unit` (dimension,) with their label or their examples, the closer one.

    At least the first `need` of them are right and complete; the total counts all that have a vector.
    """
    label = _nearest(table, "label_vector", unit, condition, need)
    example = _nearest(table, "example_vector", unit, condition, need)
    # A row that only one of the two lists has is no closer by the other than that list's last, so the maximum over what
    # is known is right for the first `need`.
    nearest = {row: max(label.get(row, -1.0), example.get(row, -1.0)) for row in label.keys() | example.keys()}
    vectors = "(label_vector IS NOT NULL OR example_vector IS NOT NULL)"
    total = table.count_rows(f"({condition}) AND {vectors}" if condition else vectors)

    def why(row: int) -> list[str]:
        if row not in nearest:
            return []
        closer = "the label is" if label.get(row, -1.0) >= example.get(row, -1.0) else "the examples are"
        return [f"{closer} close in meaning (cosine {nearest[row]:.2f})"]

    rows = np.fromiter(nearest, np.uint64, len(nearest))
    return Ranking(rows, np.fromiter(nearest.values(), float, len(nearest)), total, why)


def _nearest(table: Table, column: str, unit: np.ndarray, condition: str | None, need: int) -> dict[int, float]:
    """Row id → cosine, of at least the `need` nearest rows."""
    everything = max(1, table.count_rows())
    limit = min(everything, max(DEPTH, need) * 4)
    rows, cosines = _closest(table, column, unit, condition, limit)
    if len(rows) == limit < everything:
        # Of the rows as far away as the last one some are missing: they are left out, or fetched when they are needed.
        complete = cosines > cosines.min()
        if complete.sum() >= need:
            rows, cosines = rows[complete], cosines[complete]
        else:
            rows, cosines = _closest(table, column, unit, condition, everything)
    return dict(zip(rows.tolist(), cosines.tolist(), strict=True))


def _closest(
    table: Table, column: str, unit: np.ndarray, condition: str | None, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    search = table.search(unit, vector_column_name=column, query_type="vector")
    assert isinstance(search, LanceVectorQueryBuilder)
    query = _where(search.distance_type("cosine").select(["_distance"]), condition)
    found = query.with_row_id(True).limit(limit).to_arrow()
    return found["_rowid"].to_numpy(), np.round(1.0 - found["_distance"].to_numpy().astype(float), FLAT_SCORE)


def fused(words: Ranking, meaning: Ranking) -> Ranking:
    """Reciprocal rank fusion, Σ 1 / (60 + rank), scaled so that first in both is 1. Equal scores share a rank."""
    gains: dict[int, float] = {}
    for ranking in (words, meaning):
        ranks = 1 + np.searchsorted(np.sort(-ranking.scores), -ranking.scores, side="left")  # 1 + how many are better
        counted = (ranks <= DEPTH) | (ranking is words)
        for row, rank in zip(ranking.rows[counted].tolist(), ranks[counted].tolist(), strict=True):
            gains[row] = gains.get(row, 0.0) + 1.0 / (RRF_K + rank)
    scores = np.fromiter(gains.values(), float, len(gains)) * (RRF_K + 1) / 2
    rows = np.fromiter(gains, np.uint64, len(gains))
    return Ranking(rows, np.round(scores, FLAT_SCORE), len(gains), lambda row: words.why(row) + meaning.why(row))


def best(table: Table, ranking: Ranking, offset: int, limit: int) -> dict[int, float]:
    """Row id → score of the places `offset` to `offset + limit`, best first.

    Of equal ones the labelled come first, then the shorter labels, then by SAE and index: the same order each time.
    """
    end = min(offset + limit, len(ranking.rows))
    if offset >= end:
        return {}
    # Names are fetched only of those that can be among them: whatever is better, and all that equal the last.
    last = -np.partition(-ranking.scores, end - 1)[end - 1]
    near = ranking.scores >= last
    scores = dict(zip(ranking.rows[near].tolist(), ranking.scores[near].tolist(), strict=True))
    names = take(table, list(scores), ["sae", "index", "label"])

    def place(row: int) -> tuple[Any, ...]:
        name = names[row]
        return -scores[row], not name["label"], len(name["label"]), name["sae"], name["index"]

    return {row: scores[row] for row in sorted(names, key=place)[offset:end]}


def take(table: Table, rows: list[int], columns: list[str]) -> dict[int, dict[str, Any]]:
    """Columns by row id; LanceDB gives rows in an order of its own."""
    found: pa.Table = table.take_row_ids(rows).select(columns).with_row_id().to_arrow()
    return {row.pop("_rowid"): row for row in found.to_pylist()}
