"""What the search index holds of a feature, what can be asked of it, and what a hit looks like.

Plain data and its way into Arrow. It knows neither tables nor ranking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
from pydantic import ConfigDict, Field

from mistudio_engine.api.errors import WrongShape
from mistudio_engine.api.records import Data, Page

__all__ = [
    "VECTORS",
    "AuthorKind",
    "FeatureHit",
    "FeatureHits",
    "FeatureRow",
    "SearchMode",
    "Where",
    "arrow_schema",
    "arrow_table",
    "author_kind",
    "category_key",
    "clean",
    "quoted",
    "unit_vector",
]

VECTORS = ("label_vector", "example_vector")

SearchMode = Literal["text", "meaning", "hybrid"]

AuthorKind = Literal["person", "agent", "job"]

Finite = Annotated[float, Field(allow_inf_nan=False)]


class FeatureRow(TypedDict):
    """One feature as it is indexed. A vector is float32 as an array, a sequence or bytes; None where there is none."""

    id: str
    sae: str
    index: int
    extraction: str
    """Which extraction its statistics are from."""

    label: str
    category: str
    author: str
    """Who wrote the label: `person`, `agent:<name>` or `job:<slug>`; empty without one."""

    confidence: float | None
    text: str
    """The tokens that tell most of it."""

    example_text: str
    frequency: float
    """0 where it is dead."""

    max_activation: float
    dense: bool
    label_vector: Any
    example_vector: Any


class Where(Data):
    """Which features a search may answer with; None does not restrict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sae: str | None = None
    category: str | None = None
    """A category path or the beginning of one: `Emotion > Positive` has `Emotion > Positive > Love` in it."""

    label: str | None = None
    """Text that the label has in it, in any case."""

    labelled: bool | None = None
    author: AuthorKind | None = None
    """Who wrote the label."""

    min_confidence: Finite | None = None
    """At least this confidence; a feature without any is left out."""

    dense: bool | None = None
    dead: bool | None = None
    min_frequency: Finite | None = None
    max_frequency: Finite | None = None
    min_activation: Finite | None = None
    """At least this maximum activation."""

    max_activation: Finite | None = None
    """At most this maximum activation."""


class FeatureHit(Data):
    """A feature that matches."""

    id: str
    sae: str
    index: int
    extraction: str
    label: str
    category: str
    author: str
    confidence: float | None
    text: str
    frequency: float
    max_activation: float
    dense: bool
    score: float | None
    """0 to 1; `score_means` of the page says what it is. None in a list, where nothing was compared."""

    why: str
    """What matched, in words."""


class FeatureHits(Page[FeatureHit]):
    """One page of an answer."""

    mode: str
    embedder: str | None = None
    """What made the vectors that were compared; None when only words were looked at."""

    score_means: str
    hidden: dict[str, int] = {}
    """How many match and were left out: `dense`, `dead`, `badly_scored`."""

    dense_best: list[FeatureHit] = []
    """On the first page, those of the three best matches that were left out as `dense`, best first."""


def arrow_schema(dimension: int | None) -> pa.Schema:
    """The columns, with vectors of this dimension or without any."""
    fields: list[tuple[str, pa.DataType]] = [
        ("id", pa.string()),
        ("sae", pa.string()),
        ("index", pa.int64()),
        ("extraction", pa.string()),
        ("label", pa.string()),
        ("category", pa.string()),
        ("category_key", pa.string()),
        ("author", pa.string()),
        ("confidence", pa.float64()),
        ("text", pa.string()),
        ("example_text", pa.string()),
        ("frequency", pa.float64()),
        ("max_activation", pa.float64()),
        ("dense", pa.bool_()),
    ]
    if dimension is not None:
        fields += [(name, pa.list_(pa.float32(), dimension)) for name in VECTORS]
    return pa.schema(fields)


def arrow_table(rows: Iterable[FeatureRow], dimension: int | None) -> pa.Table:
    """Rows as Arrow; of several with one id the last counts. Raises WrongShape for a vector of another dimension."""
    unique = list({row["id"]: row for row in rows}.values())
    columns = pa.Table.from_pylist([_plain(row) for row in unique], schema=arrow_schema(None))
    if dimension is not None:
        for name in VECTORS:
            columns = columns.append_column(name, _vector_column(unique, name, dimension))
    return columns


def _plain(row: FeatureRow) -> dict[str, Any]:
    return {
        "id": clean(row["id"]),
        "sae": clean(row["sae"]),
        "index": int(row["index"]),
        "extraction": clean(row["extraction"]),
        "label": clean(row["label"]),
        "category": clean(row["category"]),
        "category_key": category_key(row["category"]),
        "author": clean(row["author"]),
        "confidence": row["confidence"],
        "text": clean(row["text"]),
        "example_text": clean(row["example_text"]),
        "frequency": float(row["frequency"]),
        "max_activation": float(row["max_activation"]),
        "dense": bool(row["dense"]),
    }


def _vector_column(rows: list[FeatureRow], name: str, dimension: int) -> pa.FixedSizeListArray:
    vectors = np.zeros((len(rows), dimension), np.float32)
    missing = np.ones(len(rows), bool)
    for at, row in enumerate(rows):
        unit = unit_vector(row[name], dimension, f"{name} of {row['id']}")
        if unit is not None:
            vectors[at], missing[at] = unit, False
    return pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), dimension, mask=pa.array(missing))


def unit_vector(vector: Any, dimension: int, what: str) -> np.ndarray | None:
    """A vector scaled to length 1, (dimension,) float32; None where there is none or it has no direction."""
    if vector is None:
        return None
    array = np.frombuffer(vector, "<f4") if isinstance(vector, bytes) else np.asarray(vector, np.float32)
    if array.shape != (dimension,):
        raise WrongShape(f"The {what} has the shape {array.shape}; the index has vectors of shape ({dimension},).")
    norm = float(np.linalg.norm(array.astype(np.float64)))
    return (array / norm).astype(np.float32) if 0 < norm < math.inf else None


def clean(text: str) -> str:
    """Without lone surrogates, which no UTF-8 column can hold."""
    return text.encode("utf-8", "replace").decode()


def quoted(text: str) -> str:
    """A string as LanceDB's SQL has it: only the quote is special."""
    return "'" + clean(text).replace("'", "''") + "'"


def category_key(path: str) -> str:
    """A category path for comparing: `Emotion>positive ` is `emotion > positive`."""
    return " > ".join(clean(part).strip().lower() for part in path.split(">"))


def author_kind(author: str) -> str:
    """`person`, `agent` or `job`; empty where there is no label."""
    return author.partition(":")[0]
