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
    "FeatureHit",
    "FeatureHits",
    "FeatureRow",
    "SearchMode",
    "Where",
    "arrow_schema",
    "arrow_table",
    "clean",
    "quoted",
    "unit_vector",
]

SearchMode = Literal["text", "meaning", "hybrid"]

Finite = Annotated[float, Field(allow_inf_nan=False)]


class FeatureRow(TypedDict):
    """One feature as it is indexed. A vector is float32 as an array, a sequence or bytes; None where there is none."""

    id: str
    sae: str
    index: int
    label: str
    category: str
    text: str
    example_text: str
    frequency: float
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

    labelled: bool | None = None
    dense: bool | None = None
    min_frequency: Finite | None = None
    max_frequency: Finite | None = None
    min_activation: Finite | None = None
    """At least this maximum activation."""

    def sql(self) -> str | None:
        """The filter as LanceDB takes it; every value is quoted or a number."""
        parts = []
        if self.sae is not None:
            parts.append(f"sae = {quoted(self.sae)}")
        if self.category is not None:
            path = quoted(_category_key(self.category))
            parts.append(f"(category_key = {path} OR starts_with(category_key, concat({path}, ' > ')))")
        if self.labelled is not None:
            parts.append("label != ''" if self.labelled else "label = ''")
        if self.dense is not None:
            parts.append("dense" if self.dense else "NOT dense")
        if self.min_frequency is not None:
            parts.append(f"frequency >= {self.min_frequency!r}")
        if self.max_frequency is not None:
            parts.append(f"frequency <= {self.max_frequency!r}")
        if self.min_activation is not None:
            parts.append(f"max_activation >= {self.min_activation!r}")
        return " AND ".join(parts) or None


class FeatureHit(Data):
    """A feature that matches."""

    id: str
    sae: str
    index: int
    label: str
    category: str
    text: str
    frequency: float
    max_activation: float
    dense: bool
    score: float
    """0 to 1; `score_means` of the page says what it is."""

    why: str
    """What matched, in words."""


class FeatureHits(Page[FeatureHit]):
    """One page of an answer."""

    mode: SearchMode
    embedder: str | None = None
    """What made the vectors that were compared; None when only words were looked at."""

    score_means: str


def arrow_schema(dimension: int | None) -> pa.Schema:
    """The columns, with vectors of this dimension or without any."""
    fields: list[tuple[str, pa.DataType]] = [
        ("id", pa.string()),
        ("sae", pa.string()),
        ("index", pa.int64()),
        ("label", pa.string()),
        ("category", pa.string()),
        ("category_key", pa.string()),
        ("text", pa.string()),
        ("example_text", pa.string()),
        ("frequency", pa.float64()),
        ("max_activation", pa.float64()),
        ("dense", pa.bool_()),
    ]
    if dimension is not None:
        vector = pa.list_(pa.float32(), dimension)
        fields += [("label_vector", vector), ("example_vector", vector)]
    return pa.schema(fields)


def arrow_table(rows: Iterable[FeatureRow], dimension: int | None) -> pa.Table:
    """Rows as Arrow; of several with one id the last counts. Raises WrongShape for a vector of another dimension."""
    unique = {row["id"]: row for row in rows}
    return pa.Table.from_pylist([_columns(row, dimension) for row in unique.values()], schema=arrow_schema(dimension))


def _columns(row: FeatureRow, dimension: int | None) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "id": clean(row["id"]),
        "sae": clean(row["sae"]),
        "index": int(row["index"]),
        "label": clean(row["label"]),
        "category": clean(row["category"]),
        "category_key": _category_key(row["category"]),
        "text": clean(row["text"]),
        "example_text": clean(row["example_text"]),
        "frequency": float(row["frequency"]),
        "max_activation": float(row["max_activation"]),
        "dense": bool(row["dense"]),
    }
    if dimension is not None:
        for name in ("label_vector", "example_vector"):
            columns[name] = unit_vector(row[name], dimension, f"{name} of {row['id']}")
    return columns


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


def _category_key(path: str) -> str:
    """A category path for comparing: `Emotion>positive ` is `emotion > positive`."""
    return " > ".join(clean(part).strip().lower() for part in path.split(">"))
