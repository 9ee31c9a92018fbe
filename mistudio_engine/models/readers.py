"""Rows from the file formats that text comes in: a class a format, and a table of them by file suffix.

A row is a dict of raw values: str (bytes that are no UTF-8 kept as lone surrogates), bytes, None, or whatever else the
format holds. Which column is the text, and what to do about broken characters, is decided in datasets.py.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from mistudio_engine.api.errors import CorruptFile, Unsupported

__all__ = ["READERS", "ArrowReader", "Reader", "reader_for"]

Row = dict[str, Any]

END_OF_TEXT = "<|endoftext|>"
"""What separates documents in many published .txt corpora (GPT-2's end of text)."""

DOCUMENT_CHARACTERS = 2_000
"""A plain text is cut into documents at the first blank line after so many characters: a page or so."""

MOST_CHARACTERS = 20_000
"""A longer page without a blank line is cut at a line end or a space, so that no document holds up the others."""

N_ROWS = 256
"""Rows decoded at once from columnar files."""


class Reader(Protocol):
    """One file of a format."""

    def rows(self, column: str | None = None) -> Iterator[Row]:
        """The rows, with `column` alone or with all columns; a new pass each time.

        Raises:
            CorruptFile: the file is not what its name says; the message has the line where there are lines.
        """
        ...


class TextReader:
    """Plain text, cut into documents: at `<|endoftext|>` if its first megabyte has one, else into pages of whole
    paragraphs. What lies between two documents (the mark, blank lines) is dropped, nothing else is."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, column: str | None = None) -> Iterator[Row]:
        with _open_text(self.path) as stream:
            is_marked = END_OF_TEXT in stream.read(1 << 20)
        with _open_text(self.path) as stream:
            for document in _marked(stream) if is_marked else _pages(stream):
                yield {"text": document}


class JSONLinesReader:
    """One JSON value a line: an object, or a string, which becomes the column `text`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, column: str | None = None) -> Iterator[Row]:
        with _open_text(self.path) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    yield _json_row(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise CorruptFile(
                        f"Line {number} of {self.path.name!r} is not a JSON object: {error}.",
                        fix="Correct or remove the line; a file that was cut short must be copied again.",
                    ) from error


class JSONReader:
    """One JSON document, read whole: a list of rows, an object with one list of objects, or one row. JSON lines in a
    file that is called .json are read as such."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, column: str | None = None) -> Iterator[Row]:
        try:
            with _open_text(self.path) as stream:
                data = json.load(stream)
        except (ValueError, RecursionError):
            yield from JSONLinesReader(self.path).rows(column)
            return
        if isinstance(data, dict):
            tables = [
                value
                for value in data.values()
                if isinstance(value, list) and isinstance(next(iter(value), None), dict)
            ]
            data = tables[0] if len(tables) == 1 else [data]
        try:
            yield from (_json_row(value) for value in (data if isinstance(data, list) else [data]))
        except ValueError as error:
            raise CorruptFile(f"{self.path.name!r} is no list of rows: {error}.", fix="Use JSON lines.") from error


class CSVReader:
    """Comma-separated values with a header line; tabs in .tsv files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, column: str | None = None) -> Iterator[Row]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents are longer than the default of 128 KiB
        delimiter = "\t" if ".tsv" in self.path.suffixes else ","
        with _open_text(self.path, newline="") as stream:
            lines = csv.DictReader(stream, delimiter=delimiter)
            try:
                for row in lines:
                    row.pop(None, None)  # type: ignore[call-overload]  # values beyond the header's columns
                    yield dict(row)
            except csv.Error as error:
                raise CorruptFile(f"Line {lines.line_num} of {self.path.name!r} is not CSV: {error}.") from error


class ParquetReader:
    """Parquet, decoded in small batches."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self, column: str | None = None) -> Iterator[Row]:
        try:
            with pq.ParquetFile(self.path, memory_map=True) as file:
                columns = [column] if column is not None and column in file.schema_arrow.names else None
                for batch in file.iter_batches(N_ROWS, columns=columns):
                    yield from _arrow_rows(batch)
        except (pa.ArrowException, OSError) as error:
            raise CorruptFile(f"{self.path.name!r} is torn or is no Parquet: {error}.", fix="Copy it again.") from error


class ArrowReader:
    """A folder that `datasets` saved (`save_to_disk`), memory-mapped by that library."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def rows(self, column: str | None = None) -> Iterator[Row]:
        chosen = self.dataset.select_columns([column]) if column in self.dataset.column_names else self.dataset
        for table in chosen.with_format("arrow").iter(N_ROWS):
            for batch in table.to_batches():
                yield from _arrow_rows(batch)


READERS: dict[str, type[Any]] = {
    ".txt": TextReader,
    ".md": TextReader,
    ".jsonl": JSONLinesReader,
    ".ndjson": JSONLinesReader,
    ".json": JSONReader,
    ".csv": CSVReader,
    ".tsv": CSVReader,
    ".parquet": ParquetReader,
}
"""The reader of each suffix; text formats may have one of CODECS after it."""

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""How a file is compressed, by its last suffix."""


def reader_for(path: Path) -> Reader:
    """The reader of a file, by its suffix.

    Raises:
        Unsupported: there is none for it.
    """
    is_compressed = path.suffix.lower() in CODECS
    suffix = Path(path.stem).suffix if is_compressed else path.suffix
    cls = READERS.get(suffix.lower())
    if cls is None or (is_compressed and cls is ParquetReader):
        raise Unsupported(
            f"{path.name!r} is not in a format that is read here.",
            fix=f"Use one of {', '.join(READERS)} (all but the last also with {', '.join(CODECS)} after it), "
            "or a folder that `datasets` saved.",
        )
    return cls(path)


@contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A text stream: UTF-8, or UTF-16 where the file says so; bytes that are neither become lone surrogates."""
    codec = CODECS.get(path.suffix.lower())
    try:
        packed: Any = None if codec is None else pa.input_stream(str(path), compression=codec)
        with path.open("rb") if packed is None else io.BufferedReader(packed) as raw:
            start = raw.peek(2)[:2]
            encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
            with io.TextIOWrapper(raw, encoding=encoding, errors="surrogateescape", newline=newline) as stream:
                yield stream
    except OSError as error:
        if codec is None:
            raise
        raise CorruptFile(f"{path.name!r} is torn or is no {codec}: {error}.", fix="Copy it again.") from error


def _json_row(value: Any) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    raise ValueError(f"it is a {type(value).__name__}")


def _arrow_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    columns = {}
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            values = values.cast(pa.large_binary())  # writers do not always check that strings are UTF-8
        columns[name] = values.to_pylist()
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _marked(stream: io.TextIOWrapper) -> Iterator[str]:
    held = ""
    while chunk := stream.read(1 << 16):
        *documents, held = (held + chunk).split(END_OF_TEXT)
        yield from (document.strip("\n") for document in documents)
    yield held.strip("\n")


def _pages(stream: io.TextIOWrapper) -> Iterator[str]:
    held = ""
    while line := stream.readline(MOST_CHARACTERS):
        if len(held) >= DOCUMENT_CHARACTERS and not line.strip():
            yield held.strip("\n")
            held = ""
            continue
        held += line
        while len(held) > MOST_CHARACTERS:
            piece, held = _cut(held, MOST_CHARACTERS)
            yield piece
    yield held.strip("\n")


def _cut(text: str, n_characters: int) -> tuple[str, str]:
    """The text up to its last line end, else its last space, before a length, and the rest, which keeps the space."""
    for mark in ("\n", " "):
        at = text.rfind(mark, 1, n_characters)
        if at > 0:
            return text[:at], text[at + (mark == "\n") :]
    return text[:n_characters], text[n_characters:]
