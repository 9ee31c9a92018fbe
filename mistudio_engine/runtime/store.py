"""The engine's memory: one SQLite file with the records, the event log, the labels, the embeddings and the settings.

A record is kept as its JSON under (kind, slug). It does not know what the kinds mean, who follows the events, nor where
the files of a record lie.

Threads: one connection writes, under a lock; readers borrow a connection of their own from a pool. In WAL mode readers
see the last commit and wait for nobody, neither for a writer nor for the compute thread. `synchronous=FULL`: what a
method has returned from survives the loss of power, but for `transaction(synced=False)`.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic_core import from_json, to_json

from mistudio_engine.api.errors import Conflict, CorruptFile, NotFound
from mistudio_engine.api.events import Event
from mistudio_engine.api.records import Finding, LabelRecord, Page, Record
from mistudio_engine.runtime.files import disk_full
from mistudio_engine.runtime.migrations import migrate
from mistudio_engine.runtime.rows import (
    as_row,
    channel_condition,
    check_slug,
    condition_of,
    expression_of,
    fields_of,
    likely_slugs,
    marks,
    place_of,
    text_key,
)

__all__ = ["NewEvent", "Store"]

R = TypeVar("R", bound=Record)

SQL_VARIABLES = 500
"""Values per statement; SQLite takes 999 in its oldest versions."""


class NewEvent(NamedTuple):
    """An event that has no number yet."""

    channel: str
    event: str
    data: Mapping[str, Any]


class Store:
    """Opens the database at `path`, creates or migrates it (with a backup first).

    Raises Unsupported for a database of a newer version, CorruptFile for a file that is not a database.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))  # SQLite gives -wal and -shm the same mode
        self._lock = threading.RLock()
        self._owner: int | None = None  # the thread inside `transaction`
        self._idle: deque[sqlite3.Connection] = deque()
        self._after: list[Callable[[], object]] = []
        self._appended: list[Event] = []
        self._listener: Callable[[list[Event]], None] | None = None
        self._closed = False
        self._writer = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=30)
        try:
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")  # for the migrations; each transaction sets its own
            self.backup = migrate(self._writer, self.path)
        except sqlite3.DatabaseError as error:
            self._writer.close()
            raise CorruptFile(
                f"{self.path.name} is not a usable database: {error}.",
                fix=f"Restore a copy ({self.path.name}.v*.backup), or move the file away to begin anew.",
            ) from error
        except BaseException:
            self._writer.close()
            raise

    def close(self) -> None:
        """Closes every connection; later calls raise sqlite3.ProgrammingError."""
        with self._lock:
            self._closed = True
            self._writer.close()
            while self._idle:
                self._idle.pop().close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Transactions

    @contextmanager
    def transaction(self, *, synced: bool = True) -> Iterator[None]:
        """All writes of the block, or none; blocks nest, and the outermost commits.

        Reads inside see the block's own writes. Keep it short: other writers wait. Without `synced` the commit does
        not wait for the disk: it survives `kill -9`, and the loss of power only from the next synced commit on.
        Raises DiskFull.
        """
        with self._lock:
            if self._owner is not None:
                yield
                return
            try:
                self._writer.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
                self._writer.execute("BEGIN IMMEDIATE")
                self._owner = threading.get_ident()
                yield
                self._writer.execute("COMMIT")
            except BaseException as error:
                if not self._closed and self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                self._after, self._appended = [], []
                if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                    raise disk_full("The database", self.path) from error
                raise
            finally:
                self._owner = None
            # Still under the lock, so that listeners hear of commits in their order.
            after, appended = self._after, self._appended
            self._after, self._appended = [], []
            if appended and self._listener is not None:
                self._listener(appended)
            for callback in after:
                callback()

    def after_commit(self, callback: Callable[[], object]) -> None:
        """Calls `callback` once the writes so far are durable: at the end of the outermost transaction, or now."""
        if self._owner == threading.get_ident():
            self._after.append(callback)
        else:
            callback()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection on which several statements see the same state."""
        if self._owner == threading.get_ident():
            yield self._writer
            return
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            connection.execute("BEGIN")
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")  # there is nothing to commit
            self._idle.append(connection)
            if self._closed:
                self.close()

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise sqlite3.ProgrammingError("The store is closed.")
        connection = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=30)
        connection.execute("PRAGMA query_only = ON")
        return connection

    # Records

    def insert(self, record: R) -> R:
        """Keeps a new record and returns it as it will be read; `created_at` is set when it is 0.

        Raises Conflict when the slug is taken, BadInput when it cannot be a slug.
        """
        check_slug(record)
        if not record.created_at:
            record = record.model_copy(update={"created_at": time.time()})
        body, words, kept = as_row(record)
        with self.transaction():
            try:
                self._writer.execute(
                    "INSERT INTO records (kind, slug, body, words) VALUES (?, ?, ?, ?)",
                    (record.kind, record.slug, body, words),
                )
            except sqlite3.IntegrityError as error:
                if "records.slug" not in str(error):
                    raise
                raise Conflict(
                    f"There is a {record.kind} {record.slug!r} already.",
                    fix="Choose another name, or delete it first.",
                ) from error
        return kept

    def put(self, record: R) -> R:
        """Keeps a record, new or in place of the one with its slug (which hands on its place and `created_at`)."""
        with self.transaction():
            if not self.exists(type(record), record.slug):
                return self.insert(record)
            created_at = self.get(type(record), record.slug).created_at
            return self._replace(record.model_copy(update={"created_at": record.created_at or created_at}))

    def get(self, cls: type[R], slug: str) -> R:
        """The record called `slug`; raises NotFound, which names some that exist."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT body FROM records WHERE kind = ? AND slug = ?", (cls.kind, slug)
            ).fetchone()
            if row is None:
                raise NotFound.of(cls.kind, slug, likely_slugs(connection, cls.kind, slug))
        return cls.model_validate_json(row[0])

    def update(self, cls: type[R], slug: str, **changes: Any) -> R:
        """Changes fields of a record, reading and writing in one transaction; raises NotFound.

        A name that is not a field raises TypeError: silently ignoring it would lose a change.
        """
        if unknown := changes.keys() - cls.model_fields.keys():
            raise TypeError(f"{cls.__name__} has no field {sorted(unknown)}")
        with self.transaction():
            record = self.get(cls, slug)
            return self._replace(cls.model_validate({**fields_of(record), **changes}))

    def delete(self, cls: type[Record], slug: str) -> None:
        """Forgets a record; its events stay in the log. Raises NotFound."""
        with self.transaction():
            self.get(cls, slug)
            self._writer.execute("DELETE FROM records WHERE kind = ? AND slug = ?", (cls.kind, slug))

    def exists(self, cls: type[Record], slug: str) -> bool:
        """Is there such a record?"""
        with self._reading() as connection:
            found = connection.execute("SELECT 1 FROM records WHERE kind = ? AND slug = ?", (cls.kind, slug))
            return found.fetchone() is not None

    def _replace(self, record: R) -> R:
        body, words, kept = as_row(record)
        self._writer.execute(
            "UPDATE records SET body = ?, words = ? WHERE kind = ? AND slug = ?",
            (body, words, record.kind, record.slug),
        )
        return kept

    # Lists

    def page(
        self,
        cls: type[R],
        *,
        query: str | None = None,
        where: Mapping[str, Any] | None = None,
        limit: int = 20,
        cursor: str | None = None,
        newest_first: bool = True,
    ) -> Page[R]:
        """Some records in the order in which they came in.

        `query` is found anywhere in the slug and the other text fields, in any case. `where` compares fields: with a
        value, with None, or with any of a list. A cursor names the last record shown, not a position: records that
        come or go in between shift nothing, and none is shown twice or left out. Raises BadInput for a foreign cursor.
        """
        condition, values = condition_of(cls, where or {})
        if query:
            condition, values = f"{condition} AND instr(words, ?) > 0", [*values, query.casefold()]
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        place = place_of(cursor, order)
        with self._reading() as connection:
            (total,) = connection.execute(f"SELECT COUNT(*) FROM records WHERE {condition}", values).fetchone()
            if place is not None:
                condition, values = f"{condition} AND id {sign} ?", [*values, place]
            rows = connection.execute(
                f"SELECT id, body FROM records WHERE {condition} ORDER BY id {order} LIMIT ?", [*values, limit + 1]
            ).fetchall()
        shown = rows[:limit]
        return Page(
            rows=[cls.model_validate_json(body) for _, body in shown],
            total=total,
            shown=len(shown),
            next_cursor=f"{order.lower()}-{shown[-1][0]}" if shown and len(rows) > limit else None,
        )

    def all(self, cls: type[R], **where: Any) -> list[R]:
        """Every record that fits (see `page`), oldest first."""
        condition, values = condition_of(cls, where)
        with self._reading() as connection:
            rows = connection.execute(f"SELECT body FROM records WHERE {condition} ORDER BY id", values).fetchall()
        return [cls.model_validate_json(body) for (body,) in rows]

    def count(self, cls: type[Record], **where: Any) -> int:
        """How many records fit (see `page`)."""
        condition, values = condition_of(cls, where)
        with self._reading() as connection:
            return connection.execute(f"SELECT COUNT(*) FROM records WHERE {condition}", values).fetchone()[0]

    def count_by(self, cls: type[Record], field: str) -> dict[Any, int]:
        """How many records there are for each value of a field."""
        column = expression_of(cls, field)
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT {column}, COUNT(*) FROM records WHERE kind = ? GROUP BY {column}", (cls.kind,)
            ).fetchall()
        return dict(rows)

    # Names

    def new_slug(self, cls: type[Record], stem: str) -> str:
        """`stem`, or the first free one of `stem-2`, `stem-3`, …; insert it in the same `transaction`."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT slug FROM records WHERE kind = ? AND substr(slug, 1, ?) = ?", (cls.kind, len(stem), stem)
            ).fetchall()
        taken = {slug for (slug,) in rows}
        number, slug = 1, stem
        while slug in taken:
            number += 1
            slug = f"{stem}-{number}"
        return slug

    def numbered_slug(self, cls: type[Record], stem: str) -> str:
        """`stem-0001`, then `stem-0002`, …: a number is given out once, even when its record is deleted."""
        name = f"{cls.kind}/{stem}"
        with self.transaction():
            (number,) = self._writer.execute(
                "INSERT INTO counters VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET n = n + 1 RETURNING n", (name,)
            ).fetchone()
        return f"{stem}-{number:04d}"

    # Events

    def append_events(self, events: Sequence[NewEvent]) -> list[Event]:
        """Writes events to the log and returns them with their numbers; the listener hears of them after the commit."""
        at = time.time()
        with self.transaction():
            written = []
            for channel, event, data in events:
                text = to_json(data, inf_nan_mode="null").decode()
                (seq,) = self._writer.execute(
                    "INSERT INTO events (at, channel, event, data) VALUES (?, ?, ?, ?) RETURNING seq",
                    (at, channel, event, text),
                ).fetchone()
                written.append(Event(seq=seq, at=at, channel=channel, event=event, data=from_json(text)))
            self._appended += written
        return written

    def listen(self, listener: Callable[[list[Event]], None]) -> None:
        """Calls `listener` with the events of each commit, in the order of their numbers; it must be quick."""
        self._listener = listener

    def events_after(
        self,
        seq: int,
        channels: Sequence[str] | None = None,
        limit: int = 1000,
        *,
        names: Sequence[str] | None = None,
        newest_first: bool = False,
    ) -> list[Event]:
        """Events with a number above `seq`, at most `limit`.

        `channels` names channels, or all below one as `trainings/*`; None means every one. `names` are names of events.
        """
        condition, values = "seq > ?", [seq]
        if channels is not None:
            some, names_of_channels = channel_condition(channels)
            condition, values = f"{condition} AND ({some})", [*values, *names_of_channels]
        if names is not None:
            condition, values = f"{condition} AND event IN ({marks(names)})", [*values, *names]
        order = "DESC" if newest_first else "ASC"
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT seq, at, channel, event, data FROM events WHERE {condition} ORDER BY seq {order} LIMIT ?",
                [*values, limit],
            ).fetchall()
        return [Event(seq=s, at=a, channel=c, event=e, data=from_json(d)) for s, a, c, e, d in rows]

    def count_events(self, channel: str, name: str) -> int:
        """How many events of this name a channel has."""
        with self._reading() as connection:
            query = "SELECT COUNT(*) FROM events WHERE channel = ? AND event = ?"
            return connection.execute(query, [channel, name]).fetchone()[0]

    def last_seq(self) -> int:
        """Number of the newest event; 0 before the first."""
        with self._reading() as connection:
            return connection.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()[0]

    def epoch(self) -> str:
        """Name of this log; numbers of another log mean nothing here."""
        with self._reading() as connection:
            return connection.execute("SELECT epoch FROM log").fetchone()[0]

    # Labels

    def add_label(self, label: LabelRecord) -> LabelRecord | None:
        """Adds a version to a feature's label and returns it with its number.

        A job never supersedes what a person or an agent wrote: then nothing is written and the answer is None.
        """
        with self.transaction():
            current = self.label(label.sae, label.index)
            if current is not None and label.author.startswith("job:") and not current.author.startswith("job:"):
                return None
            changes: dict[str, Any] = {"version": 1 if current is None else current.version + 1}
            if not label.created_at:
                changes["created_at"] = time.time()
            label = label.model_copy(update=changes)
            self._writer.execute(
                "INSERT INTO labels VALUES (?, ?, ?, ?)",
                (label.sae, label.index, label.version, label.model_dump_json()),
            )
        return label

    def label(self, sae: str, index: int) -> LabelRecord | None:
        """The label that counts, or None."""
        history = self.label_history(sae, index, limit=1)
        return history[0] if history else None

    def label_history(self, sae: str, index: int, limit: int = -1) -> list[LabelRecord]:
        """Every version of a feature's label, newest first."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT body FROM labels WHERE sae = ? AND feature = ? ORDER BY version DESC LIMIT ?",
                (sae, index, limit),
            ).fetchall()
        return [LabelRecord.model_validate_json(body) for (body,) in rows]

    def labels(self, sae: str) -> dict[int, LabelRecord]:
        """The labels that count, by feature index."""
        with self._reading() as connection:
            # SQLite takes the bare column `body` from the row that has the maximum.
            rows = connection.execute(
                "SELECT feature, body, MAX(version) FROM labels WHERE sae = ? GROUP BY feature", (sae,)
            ).fetchall()
        return {feature: LabelRecord.model_validate_json(body) for feature, body, _ in rows}

    def count_labels(self, sae: str) -> int:
        """How many features have one."""
        with self._reading() as connection:
            return connection.execute("SELECT COUNT(DISTINCT feature) FROM labels WHERE sae = ?", (sae,)).fetchone()[0]

    def score_label(
        self, sae: str, index: int, version: int, scores: Mapping[str, Any], confidence: float | None
    ) -> LabelRecord | None:
        """Writes down how well a version of a label did, beside what is known of it; None where there is none such.

        The version stays the same: its words, its author and its time do not change.
        """
        with self.transaction():
            for label in self.label_history(sae, index):
                if label.version == version:
                    changes = {"scores": {**label.scores, **scores}, "confidence": confidence}
                    label = label.model_copy(update=changes)
                    self._writer.execute(
                        "UPDATE labels SET body = ? WHERE sae = ? AND feature = ? AND version = ?",
                        (label.model_dump_json(), sae, index, version),
                    )
                    return label
        return None

    def delete_labels(self, sae: str) -> None:
        """Forgets labels and findings of an SAE that is deleted; a later one of the same name begins without any."""
        with self.transaction():
            self._writer.execute("DELETE FROM labels WHERE sae = ?", (sae,))
            self._writer.execute("DELETE FROM findings WHERE sae = ?", (sae,))

    # Findings

    def add_findings(self, found: Sequence[Finding]) -> None:
        """Keeps what was found out about features."""
        at = time.time()
        rows = [each if each.created_at else each.model_copy(update={"created_at": at}) for each in found]
        with self.transaction():
            self._writer.executemany(
                "INSERT INTO findings (sae, feature, kind, body) VALUES (?, ?, ?, ?)",
                [(each.sae, each.index, each.kind, each.model_dump_json()) for each in rows],
            )

    def findings(self, sae: str, index: int, kind: str, limit: int = -1) -> list[Finding]:
        """What was found out about a feature, newest first."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT body FROM findings WHERE sae = ? AND kind = ? AND feature = ? ORDER BY id DESC LIMIT ?",
                (sae, kind, index, limit),
            ).fetchall()
        return [Finding.model_validate_json(body) for (body,) in rows]

    # Embeddings

    def embeddings(self, embedder: str, texts: Sequence[str]) -> list[bytes | None]:
        """The stored vector of each text, in their order; None where there is none."""
        keys = [text_key(text) for text in texts]
        found: dict[bytes, bytes] = {}
        with self._reading() as connection:
            for start in range(0, len(keys), SQL_VARIABLES):
                some = keys[start : start + SQL_VARIABLES]
                found |= connection.execute(
                    f"SELECT sha256, vector FROM embeddings WHERE embedder = ? AND sha256 IN ({marks(some)})",
                    [embedder, *some],
                ).fetchall()
        return [found.get(key) for key in keys]

    def put_embeddings(self, embedder: str, vectors: Mapping[str, bytes]) -> None:
        """Keeps the vector of each text."""
        with self.transaction():
            self._writer.executemany(
                "INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?)",
                [(embedder, text_key(text), vector) for text, vector in vectors.items()],
            )

    # Settings

    def get_setting(self, key: str, default: Any = None) -> Any:
        """A setting's value, or `default`."""
        return self.settings().get(key, default)

    def settings(self) -> dict[str, Any]:
        """All settings that were made."""
        with self._reading() as connection:
            return {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM settings")}

    def put_setting(self, key: str, value: Any) -> None:
        """Keeps a setting, any JSON value; None forgets it. Secrets do not belong here."""
        with self.transaction():
            if value is None:
                self._writer.execute("DELETE FROM settings WHERE key = ?", (key,))
            else:
                self._writer.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, json.dumps(value)))
