"""How records lie in rows, and how what a caller asks for is said in SQL.

Every value travels as a parameter; what stands in the text of a statement are names that were checked against a
record's fields. It opens no connection and starts no transaction.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic_core import from_json

from mistudio_engine.api.errors import BadInput
from mistudio_engine.api.records import Record

__all__ = [
    "as_row",
    "channel_condition",
    "check_slug",
    "condition_of",
    "expression_of",
    "fields_of",
    "likely_slugs",
    "marks",
    "place_of",
    "text_key",
]

R = TypeVar("R", bound=Record)

SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")

UNSEARCHED = frozenset({"folder", "sha256"})
"""Text fields that `query` leaves out: nobody remembers them, and hexadecimal digits match by accident."""


def check_slug(record: Record) -> None:
    """Raises BadInput for a slug that could break a path, a ref or a URL."""
    if not SLUG.fullmatch(record.slug) or record.slug.endswith(".part"):
        raise BadInput(
            f"{record.slug!r} cannot be the name of a {record.kind}.",
            fix="Begin with a letter or digit and use letters, digits, '.', '_' and '-', at most 120 characters.",
        )


def as_row(record: R) -> tuple[str, str, R]:
    """A record as JSON and as words to search, and as it will be read back.

    Reading it back here makes a value that JSON cannot carry (NaN becomes null) fail while it is written, not later.
    """
    body = record.model_dump_json(exclude={"ref"})
    fields = from_json(body).items()
    words = "\n".join(text for name, text in fields if isinstance(text, str) and name not in UNSEARCHED)
    return body, words.casefold(), type(record).model_validate_json(body)


def fields_of(record: Record) -> dict[str, Any]:
    """A record's fields, what is computed from them left out."""
    return {name: getattr(record, name) for name in type(record).model_fields}


def expression_of(cls: type[Record], field: str) -> str:
    """The SQL expression of a field, letter for letter as the indices have it."""
    if field not in cls.model_fields:
        raise TypeError(f"{cls.__name__} has no field {field!r}")
    return "slug" if field == "slug" else f"json_extract(body, '$.{field}')"


def condition_of(cls: type[Record], where: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """SQL and values for the records of a class whose fields are as `where` says."""
    parts, values = ["kind = ?"], [cls.kind]
    for field, wanted in where.items():
        column = expression_of(cls, field)
        if wanted is None:
            parts.append(f"{column} IS NULL")
        elif isinstance(wanted, (list, tuple, set, frozenset)):
            parts.append(f"{column} IN ({marks(wanted)})")
            values += wanted
        else:
            parts.append(f"{column} = ?")
            values.append(wanted)
    return " AND ".join(parts), values


def channel_condition(channels: Sequence[str]) -> tuple[str, list[str]]:
    """SQL and values for the events of some channels; `trainings/*` stands for all that begin with `trainings/`."""
    plain = [channel for channel in channels if not channel.endswith("*")]
    prefixes = [channel[:-1] for channel in channels if channel.endswith("*")]
    parts = [f"channel IN ({marks(plain)})"] + ["substr(channel, 1, length(?)) = ?"] * len(prefixes)
    return " OR ".join(parts), [*plain, *(prefix for prefix in prefixes for _ in range(2))]


def marks(values: Iterable[object]) -> str:
    """A placeholder for each value."""
    return ", ".join("?" for _ in values)


def place_of(cursor: str | None, order: str) -> int | None:
    """Id of the record that a cursor names."""
    if cursor is None:
        return None
    match = re.fullmatch(r"(asc|desc)-(\d{1,18})", cursor, re.ASCII)
    if match is None or match[1] != order.lower():
        raise BadInput(
            f"{cursor[:80]!r} is not a cursor of this list.",
            why="A cursor belongs to the list and the order that it came from.",
            fix="Pass next_cursor as it was given, or none to begin at the start.",
        )
    return int(match[2])


def likely_slugs(connection: sqlite3.Connection, kind: str, slug: str) -> list[str]:
    """Slugs that may have been meant: the most similar ones, then the newest."""
    rows = connection.execute("SELECT slug FROM records WHERE kind = ? ORDER BY id DESC LIMIT 200", (kind,)).fetchall()
    known = [name for (name,) in rows]
    similar = difflib.get_close_matches(slug, known, n=4)
    return list(dict.fromkeys([*similar, *known]))


def text_key(text: str) -> bytes:
    """What stands for a text in a table: its SHA-256, 32 bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
