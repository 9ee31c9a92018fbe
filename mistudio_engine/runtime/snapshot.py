"""One version of the feature table in memory: what filters and rankings look at, row by row.

LanceDB keeps the rows, their versions and the full-text indices; comparing 50,000 vectors takes it 27 ms a column, and
this 4 ms for both. A snapshot costs about 3 KB a feature with vectors of 384 numbers. The next version's takes over the
vectors of every row that did not change, so an edit costs a read of the other columns.

It knows neither what makes a hit a good one (`ranking.py`), nor pages, nor who writes (`index.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.background_loop import LOOP
from lancedb.query import FullTextOperator, MatchQuery
from lancedb.table import AsyncTable, Table
from numpy.typing import NDArray

from mistudio_engine.runtime.feature_rows import VECTORS, Where, author_kind, category_key, clean, quoted

__all__ = ["Snapshot", "quantised"]

STEPS = 2048.0
"""Components are kept as multiples of 1/2048. Products of two are then multiples of 2⁻²², and as no part of a sum over
two unit vectors exceeds 1, float32 holds each exactly: a cosine is the same number in whatever order a BLAS adds
it up, hence in a rebuilt index, too. It differs from the unrounded one by about 0.0002."""

KEPT_PLACES = 2_000_000
"""Places of words looked up that are kept, 16 MB: common ones, which take longest, are asked for again and again."""

SCALARS = (
    *("id", "sae", "index", "extraction", "label", "category", "category_key", "author", "confidence"),
    *("text", "frequency", "max_activation", "dense"),
)
"""Columns that are kept; the examples' text is looked up in LanceDB alone."""


def quantised(vectors: NDArray) -> NDArray[np.float32]:
    """Vectors with components that are multiples of 1/2048."""
    return (np.rint(vectors * STEPS) / STEPS).astype(np.float32)


class _Vectors:
    """A growing matrix of quantised unit vectors; what is in it stays in its place, so snapshots can share it."""

    def __init__(self, dimension: int, capacity: int) -> None:
        self.matrix = np.zeros((max(16, capacity), dimension), np.float32)
        self.n_used = 0

    def add(self, column: pa.ChunkedArray) -> NDArray[np.int64]:
        """Put a column's vectors in; the place of each row's, -1 for a null."""
        array = column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # of an empty table
            return np.zeros(0, np.int64)
        present = np.asarray(array.is_valid())
        new = quantised(array.flatten().to_numpy().reshape(-1, self.matrix.shape[1]))
        end = self.n_used + len(new)
        if end > len(self.matrix):
            grown = np.zeros((end + end // 2, self.matrix.shape[1]), np.float32)
            grown[: self.n_used] = self.matrix[: self.n_used]
            self.matrix = grown
        self.matrix[self.n_used : end] = new
        places = np.full(len(present), -1, np.int64)
        places[present] = np.arange(self.n_used, end)
        self.n_used = end
        return places


class Snapshot:
    """The rows of a table at its checked-out version, in the order of their row ids.

    Args:
        table: a handle of its own, checked out.
        folder: where the table lies.
        dimension: of its vectors; None where it has none.
        previous: another version of the same table, whose vectors can be taken over.
    """

    def __init__(self, table: Table, folder: Path, dimension: int | None, previous: Snapshot | None = None) -> None:
        self.table, self.folder, self.version = table, folder, table.version
        read = _read(table, list(SCALARS))
        order = np.argsort(read["_rowid"].to_numpy())
        self.rows: pa.Table = read.take(order).combine_chunks()
        self.row_ids: NDArray[np.uint64] = self.rows["_rowid"].to_numpy()
        self.index = self.rows["index"].to_numpy()
        self.frequency = self.rows["frequency"].to_numpy()
        self.max_activation = self.rows["max_activation"].to_numpy()
        self.dense = np.asarray(self.rows["dense"])
        self.dead = self.frequency == 0
        self.confidence: NDArray[np.float64] = self.rows["confidence"].to_numpy()  # nan where there is none
        self.label_length = pc.utf8_length(self.rows["label"]).to_numpy()  # type: ignore[attr-defined]
        self.saes, self.sae = _coded(self.rows["sae"])
        self._looked_up: dict[tuple[str, tuple[str, ...]], dict[str, NDArray[np.int64]]] = {}
        self._n_kept = 0
        self._vectors: _Vectors | None = None
        self._label_place = self._example_place = np.full(len(self), -1, np.int64)
        if dimension is not None:
            self._take_vectors(dimension, previous)

    def __len__(self) -> int:
        return len(self.row_ids)

    def _take_vectors(self, dimension: int, previous: Snapshot | None) -> None:
        """The vectors of all rows: those of rows that the previous version has are there already."""
        known = np.zeros(len(self), bool)
        shared = previous._vectors if previous is not None else None
        if previous is not None and shared is not None and shared.n_used < 4 * len(self) + 1000:
            at = previous.places(self.row_ids)
            known = at >= 0
            self._vectors = shared
            places = [column[at[known]] for column in (previous._label_place, previous._example_place)]
        else:  # the first time, or half of what the matrix holds is of rows that are gone
            self._vectors = _Vectors(dimension, 2 * len(self))
            places = [np.zeros(0, np.int64)] * 2
        missing = self.row_ids[~known]
        if len(missing) == len(self):
            read = _read(self.table, list(VECTORS))
        else:
            read = self.table.take_row_ids(missing.tolist()).select(list(VECTORS)).with_row_id().to_arrow()
        read = read.take(np.argsort(read["_rowid"].to_numpy()))
        columns = []
        for name, taken in zip(VECTORS, places, strict=True):
            column = np.full(len(self), -1, np.int64)
            column[known] = taken
            column[~known] = self._vectors.add(read[name])
            columns.append(column)
        self._label_place, self._example_place = columns

    # -- rows

    def places(self, row_ids: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Where LanceDB's rows stand here, -1 where they do not."""
        if not len(self):
            return np.full(len(row_ids), -1, np.int64)
        at = np.minimum(np.searchsorted(self.row_ids, row_ids), len(self) - 1)
        return np.where(self.row_ids[at] == row_ids, at, -1)

    def places_of(self, sae: str, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where features of an SAE stand, -1 where they do not."""
        if sae not in self.saes:
            return np.full(len(indices), -1, np.int64)
        rows = np.flatnonzero(self.sae == self.saes.index(sae))
        order = np.argsort(self.index[rows])
        ordered = self.index[rows][order]
        at = np.minimum(np.searchsorted(ordered, indices), len(rows) - 1)
        return np.where(ordered[at] == indices, rows[order][at], -1)

    def mask(self, where: Where) -> NDArray[np.bool_]:
        """Which rows a filter lets through, (n,)."""
        mask = np.ones(len(self), bool)
        if where.sae is not None:
            mask &= self.sae == (self.saes.index(clean(where.sae)) if clean(where.sae) in self.saes else -1)
        if where.category is not None:
            key = category_key(where.category)
            is_it = pc.equal(self.rows["category_key"], key)  # type: ignore[attr-defined]
            begins = pc.starts_with(self.rows["category_key"], pattern=f"{key} > ")  # type: ignore[attr-defined]
            mask &= np.asarray(is_it) | np.asarray(begins)
        if where.label is not None:
            found = pc.match_substring(self.rows["label"], clean(where.label), ignore_case=True)  # type: ignore[attr-defined]
            mask &= np.asarray(found)
        if where.labelled is not None:
            mask &= (self.label_length > 0) == where.labelled
        if where.author is not None:
            mask &= self._author_kind == where.author
        if where.min_confidence is not None:
            mask &= self.confidence >= where.min_confidence
        if where.dense is not None:
            mask &= self.dense == where.dense
        if where.dead is not None:
            mask &= self.dead == where.dead
        if where.min_frequency is not None:
            mask &= self.frequency >= where.min_frequency
        if where.max_frequency is not None:
            mask &= self.frequency <= where.max_frequency
        if where.min_activation is not None:
            mask &= self.max_activation >= where.min_activation
        if where.max_activation is not None:
            mask &= self.max_activation <= where.max_activation
        return mask

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """(n,) rank of each row among equally good ones: labelled before unlabelled, shorter labels, SAE, index."""
        ranks = np.empty(len(self), np.int64)
        sae = np.argsort(np.argsort(self.saes)) if self.saes else np.zeros(0, np.int64)  # codes in order of appearance
        keys = (self.index, sae[self.sae], self.label_length, self.label_length == 0)
        ranks[np.lexsort(keys)] = np.arange(len(self))
        return ranks

    @cached_property
    def n_of_extraction(self) -> dict[tuple[str, str], int]:
        """How many rows there are of each SAE's extraction."""
        counted = self.rows.group_by(["sae", "extraction"]).aggregate([([], "count_all")])
        return {(row["sae"], row["extraction"]): row["count_all"] for row in counted.to_pylist()}

    @cached_property
    def _author_kind(self) -> NDArray:
        authors, codes = _coded(self.rows["author"])
        return np.array([author_kind(author) for author in authors] or [""])[codes]

    # -- vectors

    def cosines(self, unit: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of a unit vector (dimension,) with every label and example vector, (n,) each; nan where there is none."""
        assert self._vectors is not None
        found = self._vectors.matrix[: self._vectors.n_used] @ quantised(unit)
        found = np.append(found, np.float32(np.nan))  # which -1 points to
        return found[self._label_place], found[self._example_place]

    def vectors_of(self, place: int) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """The label vector and the example vector of a row, (dimension,) each; None where there is none."""
        label, example = int(self._label_place[place]), int(self._example_place[place])
        if self._vectors is None:
            return None, None
        matrix = self._vectors.matrix
        return matrix[label] if label >= 0 else None, matrix[example] if example >= 0 else None

    # -- words

    def carriers(self, words: Sequence[str], fields: Sequence[str]) -> dict[str, dict[str, NDArray[np.int64]]]:
        """Places of the rows that carry each word in each field: as a word, else as it stands.

        What full text does not know is punctuation, a part of a word, a script without spaces.
        """
        known, under = self._looked_up, tuple(fields)
        new = [word for word in words if (word, under) not in known]
        found = LOOP.run(self._carriers(new, fields)) if new else {}
        n_places = sum(len(places) for by_field in found.values() for places in by_field.values())
        if self._n_kept + n_places > KEPT_PLACES:
            self._looked_up, self._n_kept = {}, 0
        # Never changed in place: others may be reading it.
        self._looked_up = self._looked_up | {(word, under): by_field for word, by_field in found.items()}
        self._n_kept += n_places
        return {word: found[word] if word in found else known[word, under] for word in words}

    async def _carriers(self, words: Sequence[str], fields: Sequence[str]) -> dict[str, dict[str, NDArray[np.int64]]]:
        # All at once: a look-up takes LanceDB a millisecond of waiting and little work.
        whole = [word for word in words if any(character.isalnum() for character in word)]
        found = await self._look_up([(word, field, _as_word(word, field)) for word in whole for field in fields])
        rest = [word for word in words if not any(len(found.get((word, field), ())) for field in fields)]
        found |= await self._look_up([(word, field, _as_it_stands(word, field)) for word in rest for field in fields])
        return {word: {field: found[word, field] for field in fields} for word in words}

    async def _look_up(
        self, wanted: list[tuple[str, str, MatchQuery | str]]
    ) -> dict[tuple[str, str], NDArray[np.int64]]:
        table = await self._words_table()

        async def one(query: MatchQuery | str) -> NDArray[np.int64]:
            search: Any = table.query()
            search = search.where(query) if isinstance(query, str) else search.nearest_to_text(query)
            columns = ["index"] if isinstance(query, str) else ["_score"]
            rows = await search.select(columns).with_row_id().limit(max(1, len(self))).to_arrow()
            places = self.places(rows["_rowid"].to_numpy())
            return np.sort(places[places >= 0])

        answers = await asyncio.gather(*(one(query) for _, _, query in wanted))
        return {(word, field): places for (word, field, _), places in zip(wanted, answers, strict=True)}

    async def _words_table(self) -> AsyncTable:
        """A handle for several look-ups at once, opened at the first."""
        if "_async_table" not in self.__dict__:
            connection = await lancedb.connect_async(self.folder)
            table = await connection.open_table(self.table.name)
            await table.checkout(self.version)
            self._async_table = table
        return self._async_table


def _as_word(word: str, field: str) -> MatchQuery:
    return MatchQuery(
        word,
        field,
        boost=1.0,
        fuzziness=0,
        max_expansions=50,
        operator=FullTextOperator.AND,  # one part may be several words: "don't", "blue-green"
        prefix_length=0,
        document_granularity=None,
    )


def _as_it_stands(word: str, field: str) -> str:
    return f"contains(lower({field}), {quoted(word[:200].lower())})"


def _read(table: Table, columns: list[str]) -> pa.Table:
    n_rows = max(1, table.count_rows())
    return table.search().select(columns).with_row_id(True).limit(n_rows).to_arrow()


def _coded(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """The different values, and which of them each row has."""
    coded = pc.dictionary_encode(column).combine_chunks()  # type: ignore[attr-defined]
    if isinstance(coded, pa.ChunkedArray):
        return [], np.zeros(0, np.int64)
    return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)
