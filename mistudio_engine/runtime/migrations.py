"""The database's schema as a list of steps, in order; a database is as new as the number of steps it has seen.

Each step is a function of a connection and runs in a transaction of its own together with the new version number, so a
crash leaves a database between two steps, never inside one. A step that has been released is never changed: the next
schema is the next function. It does not know what the records mean.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from mistudio_engine.api.errors import Unsupported

__all__ = ["MIGRATIONS", "Migration", "migrate"]

Migration = Callable[[sqlite3.Connection], None]


def first_schema(connection: sqlite3.Connection) -> None:
    """Records, the event log, labels with their history, embeddings, settings, counters."""
    # Records are their JSON; fields that filters ask for are indexed as expressions, so nothing is stored twice.
    connection.execute(
        """CREATE TABLE records (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            kind TEXT NOT NULL,
            slug TEXT NOT NULL,
            body TEXT NOT NULL,
            words TEXT NOT NULL,
            UNIQUE (kind, slug)
        )"""
    )
    connection.execute("CREATE INDEX records_of_kind ON records (kind, id)")
    for field in ("state", "subject", "model", "dataset", "sae", "training"):
        connection.execute(f"CREATE INDEX records_by_{field} ON records (kind, json_extract(body, '$.{field}'))")
    connection.execute(
        """CREATE UNIQUE INDEX jobs_by_idempotency_key ON records (json_extract(body, '$.idempotency_key'))
        WHERE kind = 'job' AND json_extract(body, '$.idempotency_key') IS NOT NULL"""
    )
    connection.execute(
        """CREATE TABLE events (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            at REAL NOT NULL,
            channel TEXT NOT NULL,
            event TEXT NOT NULL,
            data TEXT NOT NULL
        )"""
    )
    connection.execute("CREATE INDEX events_of_channel ON events (channel, seq)")
    connection.execute(
        """CREATE TABLE labels (
            sae TEXT NOT NULL,
            feature INTEGER NOT NULL,
            version INTEGER NOT NULL,
            body TEXT NOT NULL,
            PRIMARY KEY (sae, feature, version)
        ) WITHOUT ROWID"""
    )
    connection.execute(
        """CREATE TABLE embeddings (
            embedder TEXT NOT NULL,
            sha256 BLOB NOT NULL,
            vector BLOB NOT NULL,
            PRIMARY KEY (embedder, sha256)
        ) WITHOUT ROWID"""
    )
    connection.execute("CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
    connection.execute("CREATE TABLE counters (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID")
    # Sequence numbers mean something only within one log: this names it.
    connection.execute("CREATE TABLE log (epoch TEXT NOT NULL)")
    connection.execute("INSERT INTO log VALUES (lower(hex(randomblob(8))))")


def findings(connection: sqlite3.Connection) -> None:
    """What was found out about features, one row each time: answers of labellers, ablations, tests."""
    connection.execute(
        """CREATE TABLE findings (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            sae TEXT NOT NULL,
            feature INTEGER NOT NULL,
            kind TEXT NOT NULL,
            body TEXT NOT NULL
        )"""
    )
    connection.execute("CREATE INDEX findings_of_feature ON findings (sae, kind, feature, id)")


MIGRATIONS: tuple[Migration, ...] = (first_schema, findings)
"""All steps so far; the version of the schema is how many there are."""


def migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[Migration] = MIGRATIONS) -> Path | None:
    """Brings the database at `path`, open as `connection` in autocommit mode, to the newest schema.

    A database that holds something already is first copied to `{name}.v{old version}.backup`; returns where, or None
    when there was nothing to do or to lose. Raises Unsupported when the database comes from a newer version.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise Unsupported(
            f"The data directory {path.parent.name!r} was written by a newer miStudio.",
            why=f"Its database has schema version {version}; this miStudio knows versions up to {len(migrations)}.",
            fix="Upgrade miStudio (pip install -U mistudio), or set MISTUDIO_HOME to another directory.",
        )
    backup = _backup(connection, path, version) if 0 < version < len(migrations) else None
    for number, step in enumerate(migrations[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            step(connection)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
    return backup


def _backup(connection: sqlite3.Connection, path: Path, version: int) -> Path:
    """A complete copy beside the database, synced before it gets its name."""
    backup = path.with_name(f"{path.name}.v{version}.backup")
    part = backup.with_name(backup.name + ".part")
    part.unlink(missing_ok=True)
    part.touch(0o600)
    with closing(sqlite3.connect(part)) as copy:
        connection.backup(copy)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.replace(backup)
    return backup
