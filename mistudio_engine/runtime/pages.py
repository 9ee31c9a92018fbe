"""A page of an answer: the hits that it shows, how many were hidden, and the cursor of the next one.

It knows neither tables nor what makes a hit a good one.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, TypeAdapter

from mistudio_engine.api.errors import BadInput
from mistudio_engine.runtime.feature_rows import FeatureHit, FeatureHits, Where
from mistudio_engine.runtime.ranking import SCORE_MEANS, Ranking, first
from mistudio_engine.runtime.snapshot import Snapshot

__all__ = ["Position", "gone", "page_of", "read_cursor"]

BEST = 3
"""Matches of which those that are hidden as dense are named."""

HIT_COLUMNS = [name for name in FeatureHit.model_fields if name not in ("score", "why")]


class Position(NamedTuple):
    """Where a page begins: in which table, at which version of it, after how many hits, of which search."""

    generation: str
    version: int
    offset: int
    asked: str

    def cursor(self) -> str:
        """As it travels."""
        return base64.urlsafe_b64encode(json.dumps(self).encode()).decode().rstrip("=")


_Count = Annotated[int, Field(ge=0, lt=1 << 62)]

_CURSOR = TypeAdapter(tuple[str, _Count, _Count, str])
"""A cursor comes back from anybody."""


def read_cursor(cursor: str, asked: str) -> Position:
    """Where a page begins.

    Args:
        asked: the search that it is for.

    Raises:
        BadInput: it is no cursor, or of another search.
    """
    try:
        said = base64.urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4))
        position = Position(*_CURSOR.validate_json(said))
    except ValueError as error:
        raise BadInput(
            f"{cursor[:40]!r} is not a cursor.", fix="Pass next_cursor of the page before, or none."
        ) from error
    if position.asked != asked:
        raise BadInput(
            "The cursor belongs to another search.",
            fix="Repeat the query, mode and filters that it came with, or drop it.",
        )
    return position


def gone() -> BadInput:
    """The error for a position in a version that is no more."""
    return BadInput(
        "The version of the index that this cursor continues is gone.",
        why="It was rebuilt, or much has been written since.",
        fix="Search again without a cursor.",
    )


def page_of(
    snapshot: Snapshot,
    ranking: Ranking,
    where: Where,
    begin: Position,
    limit: int,
    *,
    mode: str,
    embedder: str | None,
) -> FeatureHits:
    """At most `limit` of the hits that a filter lets through, from a position on, best first."""
    mask = snapshot.mask(where)
    places = first(snapshot, ranking, mask, begin.offset, begin.offset + limit)
    total = int((mask & ~np.isnan(ranking.scores)).sum())
    end = begin._replace(offset=begin.offset + len(places))
    dense_best = [] if begin.offset or mode == "list" else _dense_best(snapshot, ranking, where)
    return FeatureHits(
        rows=_hits(snapshot, ranking, places, mode),
        total=total,
        shown=len(places),
        next_cursor=end.cursor() if places and end.offset < total else None,
        mode=mode,
        embedder=embedder,
        score_means=SCORE_MEANS[mode],
        hidden=_hidden(snapshot, ranking, where),
        dense_best=_hits(snapshot, ranking, dense_best, mode),
    )


def _hits(snapshot: Snapshot, ranking: Ranking, places: list[int], mode: str) -> list[FeatureHit]:
    rows = snapshot.rows.select(HIT_COLUMNS).take(pa.array(places, pa.int64())).to_pylist()
    return [_hit(row, ranking, place, mode) for row, place in zip(rows, places, strict=True)]


def _hit(row: dict[str, Any], ranking: Ranking, place: int, mode: str) -> FeatureHit:
    score = None if mode == "list" else min(1.0, max(0.0, float(ranking.scores[place])))
    confidence = row.pop("confidence")
    if confidence is not None and math.isnan(confidence):
        confidence = None
    return FeatureHit(score=score, why="; ".join(ranking.why(place)), confidence=confidence, **row)


def _hidden(snapshot: Snapshot, ranking: Ranking, where: Where) -> dict[str, int]:
    """How many match but for being dead, dense or badly scored; each is counted once, for the first of these."""
    left = snapshot.mask(where.model_copy(update={"dead": None, "dense": None, "min_confidence": None}))
    left &= ~np.isnan(ranking.scores)
    counts = {}
    for reason, out in (
        ("dead", snapshot.dead if where.dead is False else None),
        ("dense", snapshot.dense if where.dense is False else None),
        ("badly_scored", None if where.min_confidence is None else ~(snapshot.confidence >= where.min_confidence)),
    ):
        if out is not None:
            counts[reason] = int((left & out).sum())
            left &= ~out
    return {reason: count for reason, count in counts.items() if count}


def _dense_best(snapshot: Snapshot, ranking: Ranking, where: Where) -> list[int]:
    """Those of the best matches that are hidden because they are dense."""
    if where.dense is not False:
        return []
    either = snapshot.mask(where.model_copy(update={"dense": None}))
    return [place for place in first(snapshot, ranking, either, 0, BEST) if snapshot.dense[place]]
