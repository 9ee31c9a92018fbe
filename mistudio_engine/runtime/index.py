"""The search index over features: a copy of the records, in LanceDB, that answers by words and by meaning.

The records in SQLite are the truth and `rows()` gives them all again, so a folder that was deleted, damaged, written
for another embedder or left open by a killed engine is rebuilt, with the same answers. One process writes, through this
class; a search sees one version of the table from its first page to its last, in memory (`snapshot.py`).

It knows neither how a vector is made nor what makes a hit a good one (`ranking.py`), nor which features ought to be
hidden.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS, BTree
from lancedb.table import Table

from mistudio_engine.api.errors import BadInput, Conflict, DiskFull, EmptyData, Internal
from mistudio_engine.runtime.feature_rows import (
    FeatureHit,
    FeatureHits,
    FeatureRow,
    SearchMode,
    Where,
    arrow_schema,
    arrow_table,
    clean,
    quoted,
    unit_vector,
)
from mistudio_engine.runtime.files import free_bytes, write_atomic
from mistudio_engine.runtime.pages import Position, gone, page_of, read_cursor
from mistudio_engine.runtime.ranking import FIELD_WEIGHTS, SCORE_MEANS, Ranking, by_meaning, by_words, fused
from mistudio_engine.runtime.snapshot import Snapshot

__all__ = [
    "SCORE_MEANS",
    "FeatureHit",
    "FeatureHits",
    "FeatureIndex",
    "FeatureRow",
    "IndexDamaged",
    "OtherEmbedder",
    "SearchMode",
    "Where",
]

T = TypeVar("T")

Write = Callable[[Table], int]
"""Changes the table; how many rows. Doing it twice is the same as once."""

log = logging.getLogger(__name__)

BATCH_ROWS = 4096

OPTIMIZE_ROWS, OPTIMIZE_WRITES = 1000, 50
"""Merging small writes into the indices costs half a second at 50,000 rows, so single label edits wait for it together;
until then LanceDB scans them, and answers are the same."""

KEEP_VERSIONS = timedelta(hours=1)
"""How long a cursor stays valid at the least."""

SNAPSHOTS = 3
"""Versions kept in memory: the newest, and those whose pages are being turned."""

OPEN_WAIT_SECONDS = 0.05

CLOSE_WAIT_SECONDS = 1.0

MARKER = "features.json"
"""Says which table counts, and what it holds."""

LAYOUT = 2
"""Raised when the columns change: an index of another layout is rebuilt."""

DAMAGE = (RuntimeError, OSError, ValueError)
"""What LanceDB and Arrow raise on files that are missing, cut off or not theirs."""


class IndexDamaged(Internal):
    """The index could not be read, and rebuilding it did not help."""


class OtherEmbedder(Conflict):
    """Rows whose vectors are of another embedder than the index is of, or is being made for: make them again."""


class FeatureIndex:
    """The index of one data directory, for one embedder.

    Args:
        folder: where the tables lie; made when missing.
        rows: gives all features anew, from the records; called for a rebuild, on the thread that noticed the need.
        embedder: what makes the vectors; None for words only. Another one than last time rebuilds the index.
        dimension: length of its vectors.

    Nothing is opened before the first use. Safe to use from any thread; `rows` may wait for a thread that writes into
    the index, since no write waits for a rebuild, but not for one that searches.
    """

    def __init__(
        self,
        folder: Path,
        rows: Callable[[], Iterable[FeatureRow]],
        *,
        embedder: str | None = None,
        dimension: int | None = None,
    ) -> None:
        if (embedder is None) != (dimension is None):
            raise BadInput("An embedder and the dimension of its vectors go together.")
        self.folder, self.embedder, self.dimension = Path(folder), embedder, dimension
        self._rows = rows
        self._building = threading.RLock()  # held by whoever opens or rebuilds; taken before the other
        self._lock = threading.RLock()  # held while the table is written to or exchanged
        self._table: Table | None = None
        self._marker: dict[str, Any] = {}
        self._unmerged = _Unmerged()
        self._journal: list[Write] | None = None
        self._target = (embedder, dimension)  # of the table that the next write goes into
        self._n_rebuilt = 0
        self._n_owed, self._counting = 0, threading.Lock()  # what `owing` began and did not end well
        self.lacks_vectors: bool = bool(_read_marker(self._marker_path).get("lacks_vectors"))
        """Whether there are rows without the vectors that our embedder would give them; whoever writes such rows says
        so, and a rebuild starts from no. It outlives us."""
        self._snapshots: OrderedDict[tuple[str, int], Snapshot] = OrderedDict()
        self._reading = threading.Lock()  # held while a snapshot is made; taken after the others

    @classmethod
    def stored(cls, folder: Path) -> tuple[str | None, int | None]:
        """The embedder, and its dimension, of the index in a folder; None twice where there is none."""
        marker = _read_marker(Path(folder) / MARKER)
        if marker.get("layout") != LAYOUT:
            return None, None
        return marker.get("embedder"), marker.get("dimension")

    # -- writing

    @property
    def target(self) -> tuple[str | None, int | None]:
        """The embedder, and its dimension, whose vectors rows need: of the table that is there or being made."""
        return self._target

    def upsert(self, rows: Iterable[FeatureRow], *, embedder: str | None = "") -> int:
        """Add features, or replace those with the same id; how many. Write the records first, they are the truth.

        Args:
            rows: with vectors of the `target`.
            embedder: what their vectors were made by, if the target may have changed since.

        Raises:
            OtherEmbedder: the target is another one by now.
        """
        target = self._target
        if embedder != "" and embedder != target[0]:
            raise OtherEmbedder(f"The index has vectors of {target[0]} and not of {embedder}.")
        # Made into Arrow first: a row that is wrong must not look like an index that is damaged.
        batches = [arrow_table(batch, target[1]) for batch in _batches(rows)]
        n_rows = sum(batch.num_rows for batch in batches)

        def merge(table: Table) -> int:
            for batch in batches:
                _merge(table, batch)
            return n_rows

        if batches:
            self._healed(lambda: self._write(merge, target), writing=True)
        return n_rows

    def delete_sae(self, sae: str, *, but: str | None = None) -> None:
        """Remove the features of an SAE, all or those that are not of the extraction `but`."""
        where = f"sae = {quoted(sae)}"
        if but is not None:
            where += f" AND extraction != {quoted(but)}"

        def delete(table: Table) -> int:
            n_rows = table.count_rows(where)
            if n_rows:
                table.delete(where)
            return n_rows

        self._healed(lambda: self._write(delete), writing=True)

    def rebuild(self) -> int:
        """Make the index anew from `rows()`; how many features it has. Searches meanwhile see the old one."""
        return self._rebuild(self.embedder, self.dimension)

    def switch(self, embedder: str | None, dimension: int | None) -> int:
        """Make the index anew for another embedder, whose vectors `rows()` and `upsert` give from now on; how many
        features it has. Searches by words meanwhile see the old one.
        """
        return self._rebuild(embedder, dimension)

    def _rebuild(self, embedder: str | None, dimension: int | None) -> int:
        with self._building:
            self.folder.mkdir(parents=True, exist_ok=True)
            generation = secrets.token_hex(4)
            lacked_vectors = self.lacks_vectors
            with self._lock:
                self.lacks_vectors = False
                self._journal = []  # what is written from here on may be missed by `rows()`
                self._target = (embedder, dimension)
            try:
                table = self._build(f"features-{generation}", dimension)
                with self._lock:
                    for write in self._journal:
                        write(table)
                    self._table, self._unmerged = table, _Unmerged()
                    self.embedder, self.dimension = embedder, dimension
                    self._mark(generation=generation)
                    self._n_rebuilt += 1
            except BaseException:
                with self._lock:  # the old table stays, and nobody writes into it what was meant for this one
                    self.lacks_vectors |= lacked_vectors
                    self._n_owed += len(self._journal)
                raise
            finally:
                with self._lock:
                    self._journal = None
                    self._target = (self.embedder, self.dimension)
                # What the marker does not name is of no use, be it the old table or one that could not be built.
                named = f"features-{self._marker.get('generation')}.lance"
                for folder in self.folder.glob("features-*.lance"):
                    if folder.name != named:
                        shutil.rmtree(folder, ignore_errors=True)
            log.info("search index rebuilt with %d features", self._marker["rows"])
            return self._marker["rows"]

    def _build(self, name: str, dimension: int | None) -> Table:
        table = lancedb.connect(self.folder).create_table(name, schema=arrow_schema(dimension))
        for batch in _batches(self._rows()):
            table.add(arrow_table(batch, dimension), on_bad_vectors="null")
        for field in FIELD_WEIGHTS:
            # Words such as "the" are features too, and tokens can be long: nothing is dropped.
            table.create_index(field, config=FTS(base_tokenizer="icu", remove_stop_words=False, max_token_length=None))
        table.create_index("id", config=BTree())
        return table

    def _write(self, write: Write, target: tuple[str | None, int | None] | None = None) -> None:
        """Write to the table, or leave it to the rebuild that is going on: whoever writes never waits for one."""
        while True:
            with self._lock:
                if target is not None and target != self._target:
                    raise OtherEmbedder(f"The index is being made for {self._target[0]} and not for {target[0]}.")
                if self._journal is not None:
                    self._journal.append(write)
                    return
                if self._table is not None:
                    if n_rows := write(self._table):
                        self._written(self._table, n_rows)
                    return
            if self._building.acquire(timeout=OPEN_WAIT_SECONDS):
                try:
                    self._open()
                finally:
                    self._building.release()

    @contextmanager
    def owing(self) -> Iterator[None]:
        """Around work that brings the index up to date with records that are written already.

        An index that is closed before such work has ended, or after some that failed, is rebuilt by the next engine.
        """
        with self._counting:
            self._n_owed += 1
        yield
        with self._counting:  # not after an error
            self._n_owed -= 1

    def optimize(self) -> None:
        """Merge what was written since into the indices, and drop versions that no cursor needs any more."""

        def optimize() -> None:
            table = self._open()
            with self._lock:
                self._optimize(table)

        self._healed(optimize)

    def close(self) -> None:
        """Say that everything written is in the index: an index that was not closed is rebuilt, as after `kill -9`.

        Whoever stops does not wait for a long write. While rows are owed or the index is being made anew, it is not so.
        """
        if not self._lock.acquire(timeout=CLOSE_WAIT_SECONDS):
            log.warning("the search index is being written to and is made anew at the next start")
            return
        try:
            if self._table is not None:
                if self._n_owed or self._journal is not None:
                    log.warning("the search index lacks what was written last and is made anew at the next start")
                else:
                    with contextlib.suppress(*DAMAGE):  # what was deleted meanwhile is made anew by the next engine
                        self._mark(open=False)
                self._table = None
        finally:
            self._lock.release()
        self._snapshots.clear()

    # -- reading

    def count(self, where: Where | None = None) -> int:
        """How many features there are."""
        return self._healed(lambda: int(self._snapshot(None)[0].mask(where or Where()).sum()))

    def search(
        self,
        query: str = "",
        *,
        mode: SearchMode = "text",
        vector: Sequence[float] | np.ndarray | None = None,
        where: Where | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> FeatureHits:
        """Features that match, best first; of equal ones the shorter label first.

        Args:
            query: words, for the modes "text" and "hybrid". What full text does not know (punctuation, a part of a
                word, a script without spaces) is looked for as it stands.
            vector: the query embedded by our embedder, (dimension,), for the modes "meaning" and "hybrid".
            cursor: `next_cursor` of the page before, with the same query.

        Raises:
            EmptyData: no words, or no vector, where the mode needs them.
            WrongShape: a vector that is not of our embedder.
            BadInput: a cursor of another search, or of a version that is gone.
        """
        query = clean(query)
        if mode != "meaning" and not query.strip():
            raise EmptyData("The query is empty.", fix="Give one word or more.")
        unit = self._query_vector(vector) if mode != "text" else None

        def rank(snapshot: Snapshot) -> Ranking:
            if unit is None:
                return by_words(snapshot, query)
            meaning = by_meaning(snapshot, unit)
            return meaning if mode == "meaning" else fused(snapshot, by_words(snapshot, query), meaning)

        asked = f"{'' if mode == 'meaning' else query}|{'' if unit is None else unit.tobytes().hex()}"
        return self.rank(rank, mode=mode, asked=asked, where=where, limit=limit, cursor=cursor)

    def rank(
        self,
        rank: Callable[[Snapshot], Ranking],
        *,
        mode: str,
        asked: str,
        where: Where | None = None,
        limit: int = 20,
        cursor: str | None = None,
    ) -> FeatureHits:
        """A page of what `rank` makes of the features, best first.

        Args:
            rank: scores every row of a snapshot; it must answer the same for the same version.
            mode: one that `SCORE_MEANS` explains.
            asked: all that `rank` depends on, so that a cursor is not used for something else.

        Raises:
            BadInput: a cursor of another search, or of a version that is gone.
        """
        where = where or Where()
        asked = hashlib.sha256(json.dumps([mode, asked, where.model_dump()]).encode()).hexdigest()[:16]
        position = read_cursor(cursor, asked) if cursor else None

        def answer() -> FeatureHits:
            snapshot, generation = self._snapshot(position)
            begin = Position(generation, snapshot.version, position.offset if position else 0, asked)
            embedder = self.embedder if mode in ("meaning", "hybrid", "similar") else None
            return page_of(snapshot, rank(snapshot), where, begin, limit, mode=mode, embedder=embedder)

        return self._healed(answer)

    def snapshot(self) -> Snapshot:
        """The newest version."""
        return self._healed(lambda: self._snapshot(None)[0])

    # -- the table

    def _healed(self, work: Callable[[], T], *, writing: bool = False) -> T:
        """Do it; on a damaged index rebuild once and do it again."""
        n_rebuilt = self._n_rebuilt
        try:
            return work()
        except DAMAGE as error:
            _raise_disk_full(error, self.folder)
            log.warning("search index damaged: %s", error)
        try:
            self._repair(n_rebuilt, writing)
            return work()
        except DAMAGE as error:
            _raise_disk_full(error, self.folder)
            raise IndexDamaged(
                "The search index cannot be read, and rebuilding it did not help.",
                why=str(error).partition("\n")[0][:300],
                fix=f"Stop the engine, delete {self.folder}, start it again.",
            ) from error

    def _repair(self, n_rebuilt: int, writing: bool) -> None:
        """Rebuild, unless somebody else has done so meanwhile; a writer does not even wait for it."""
        while self._n_rebuilt == n_rebuilt and not (writing and self._journal is not None):
            if self._building.acquire(timeout=OPEN_WAIT_SECONDS):
                try:
                    if self._n_rebuilt == n_rebuilt:
                        self.rebuild()
                finally:
                    self._building.release()

    def _open(self) -> Table:
        """The table to write to, checked when it is opened, rebuilt when the check fails."""
        with self._building:
            if self._table is not None:
                return self._table
            marker = _read_marker(self._marker_path)
            reason = self._distrust(marker)
            if reason is None:
                table = self._open_table(marker["generation"])
                if (table.version, table.count_rows()) == (marker["version"], marker["rows"]):
                    with self._lock:
                        self._table, self._marker = table, marker
                        self._mark(open=True)
                    return table
                reason = "files are missing"
            log.info("search index is rebuilt: %s", reason)
            self.rebuild()
            assert self._table is not None
            return self._table

    def _distrust(self, marker: dict[str, Any]) -> str | None:
        if not marker:
            return "there is none"
        if marker.get("layout") != LAYOUT:
            return "it has another layout"
        if (marker.get("embedder"), marker.get("dimension")) != (self.embedder, self.dimension):
            return "it has vectors of another embedder"
        if marker.get("open") is not False:
            return "the engine before did not close it"
        return None

    def _snapshot(self, position: Position | None) -> tuple[Snapshot, str]:
        """The version that a page is of, or the newest, and the name of the table it is of. Waits for no writer."""
        if self._table is None:
            self._open()
        marker = self._marker  # replaced and never changed
        generation = marker["generation"]
        if position is not None and position.generation != generation:
            raise gone()
        key = (generation, position.version if position else marker["version"])
        with self._reading:
            if key not in self._snapshots:
                self._snapshots[key] = self._load(key, marker["dimension"], is_cursor=position is not None)
            self._snapshots.move_to_end(key)
            for other in [each for each in self._snapshots if each[0] != generation]:
                del self._snapshots[other]
            while len(self._snapshots) > SNAPSHOTS:
                self._snapshots.popitem(last=False)
            return self._snapshots[key], generation

    def _load(self, key: tuple[str, int], dimension: int | None, *, is_cursor: bool) -> Snapshot:
        generation, version = key
        table = self._open_table(generation)
        try:
            table.checkout(version)
        except ValueError as error:
            if is_cursor:
                raise gone() from error
            raise
        of_same = [each for (name, _), each in self._snapshots.items() if name == generation]
        return Snapshot(table, self.folder, dimension, max(of_same, key=lambda each: each.version, default=None))

    def _open_table(self, generation: str) -> Table:
        return lancedb.connect(self.folder).open_table(f"features-{generation}")

    @property
    def _marker_path(self) -> Path:
        return self.folder / MARKER

    def _mark(self, **changes: Any) -> None:
        """Record what the folder holds, so that a missing or older file is noticed."""
        assert self._table is not None
        state = {"layout": LAYOUT, "embedder": self.embedder, "dimension": self.dimension, "open": True}
        state["lacks_vectors"] = self.lacks_vectors
        size = {"version": self._table.version, "rows": self._table.count_rows()}
        self._marker = self._marker | state | size | changes
        write_atomic(self._marker_path, json.dumps(self._marker))

    def _query_vector(self, vector: Sequence[float] | np.ndarray | None) -> np.ndarray:
        if self.dimension is None:
            raise EmptyData("This index has words only.", fix='Search with mode="text", or set up an embedder.')
        unit = unit_vector(vector, self.dimension, "query vector")
        if unit is None:
            raise EmptyData("A search by meaning needs the query's vector, and it has none.")
        return unit

    def _written(self, table: Table, n_rows: int) -> None:
        self._unmerged.rows += n_rows
        self._unmerged.writes += 1
        if self._unmerged.rows >= OPTIMIZE_ROWS or self._unmerged.writes >= OPTIMIZE_WRITES:
            self._optimize(table)
        else:
            self._mark()

    def _optimize(self, table: Table) -> None:
        table.optimize(cleanup_older_than=KEEP_VERSIONS)
        self._unmerged = _Unmerged()
        self._mark()


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        marker = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _merge(table: Table, data: pa.Table) -> None:
    merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
    merge.execute(data, on_bad_vectors="null")  # ours are checked; a missing one is null, and LanceDB calls that bad


class _Unmerged:
    """What was written since the indices were merged."""

    def __init__(self) -> None:
        self.rows = self.writes = 0


def _raise_disk_full(error: Exception, folder: Path) -> None:
    """LanceDB reports a full disk as a RuntimeError among others; the number is the system's."""
    if f"os error {errno.ENOSPC}" in str(error):
        free = free_bytes(folder)
        raise DiskFull.of("The search index", free + 1, free) from error


def _batches(rows: Iterable[FeatureRow]) -> Iterator[list[FeatureRow]]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch
