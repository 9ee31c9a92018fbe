"""Datasets as streams of documents: from files and folders, with the text column found or chosen, and their statistics.

It opens what is on disk already; the hub is elsewhere, and so is tokenising (tokens.py). A row that cannot be read as
UTF-8 is repaired and counted, never dropped and never fatal.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from mistudio_engine.api.errors import BadInput, CorruptFile, EmptyData, NotFound
from mistudio_engine.models.dataset_source import open_readers
from mistudio_engine.models.readers import Reader
from mistudio_engine.models.vocabulary import token_strings

if TYPE_CHECKING:
    from mistudio_engine.models.tokens import PackedTokens

__all__ = [
    "Documents",
    "Sample",
    "find_text_field",
    "hashing",
    "n_documents",
    "read_documents",
    "sample",
    "stamp",
    "statistics",
]

TEXT_FIELDS = ("text", "content", "document", "story", "body")
"""Columns that are taken for the text, in this order, before the one with the longest strings."""

N_SAMPLED = 100
"""Rows that are looked at to find the text column."""

ROWS_AT_ONCE = 4096
"""Contexts that `statistics` holds in memory at a time."""

BYTES_AT_ONCE = 16 << 20
"""Bytes that are hashed between two looks at whether somebody wants to stop."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class Documents(Iterator[str]):
    """A pass over a dataset's documents.

    Attributes:
        text_field: the column that they come from.
        n_documents: how many have been given so far.
        n_repaired: how many of them held bytes that are no UTF-8, each replaced by U+FFFD.
        n_empty: rows without text, which were passed over.
    """

    def __init__(self, readers: list[Reader], text_field: str) -> None:
        self.text_field = text_field
        self.n_documents = self.n_repaired = self.n_empty = 0
        self._values = (row.get(text_field) for reader in readers for row in reader.rows(text_field))

    def __next__(self) -> str:
        for value in self._values:
            text, is_repaired = _as_text(value)
            if not text.strip():
                self.n_empty += 1
                continue
            self.n_documents += 1
            self.n_repaired += is_repaired
            return text
        raise StopIteration


class Sample(NamedTuple):
    """A page of documents."""

    documents: list[str]
    offset: int

    next_offset: int | None
    """Where the next page begins; None after the last document."""

    text_field: str


def read_documents(
    source: Path, *, text_field: str | None = None, split: str | None = None, config: str | None = None
) -> Documents:
    """A dataset's documents, one by one; the iterator counts what it repairs and passes over.

    Args:
        source: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, a folder that `datasets` saved, or a folder of data
            files as the hub lays them out. Plain text is cut into documents as `readers.TextReader` says.
        text_field: the column; found by `find_text_field` unless given.
        split: "train" unless given; where there is none, the only or first split.
        config: of a hub folder with several configurations.

    Raises:
        NotFound: there is no such file or folder.
        BadInput: the column, split or configuration does not exist; the message has those that do.
        Unsupported: a format that is not read here.
        CorruptFile: a file is torn, now or at the document where it is.
        EmptyData: there is no text in it.
    """
    readers = open_readers(Path(source), split=split, config=config)
    field = _find_text_field(readers, text_field, Path(source).name)
    if next(Documents(readers, field), None) is None:
        raise EmptyData(f"Column {field!r} of {Path(source).name!r} is empty.", fix="Choose another column or file.")
    return Documents(readers, field)


def find_text_field(
    source: Path, *, text_field: str | None = None, split: str | None = None, config: str | None = None
) -> str:
    """The column that holds the text: the one asked for, else one called text, content, …, else the one with the
    longest strings in the first rows; raises as `read_documents`."""
    return _find_text_field(open_readers(Path(source), split=split, config=config), text_field, Path(source).name)


def n_documents(source: Path, **which: Any) -> int:
    """How many documents `read_documents` gives, by reading them all; takes and raises the same."""
    return sum(1 for _ in read_documents(source, **which))


def sample(source: Path, offset: int = 0, limit: int = 20, **which: Any) -> Sample:
    """A page of documents as text; takes and raises what `read_documents` does.

    Raises:
        BadInput: a negative offset, or a limit below 1.
    """
    if offset < 0 or limit < 1:
        raise BadInput(f"offset {offset} and limit {limit} make no page.", fix="Use offset ≥ 0 and limit ≥ 1.")
    documents = read_documents(source, **which)
    page = list(islice(documents, offset, offset + limit + 1))
    next_offset = offset + limit if len(page) > limit else None
    return Sample(page[:limit], offset, next_offset, documents.text_field)


def statistics(tokens: PackedTokens, tokenizer: Any, *, n_top: int = 50, n_bins: int = 20) -> dict[str, Any]:
    """Counts over packed tokens, in memory bounded by the vocabulary and the number of documents.

    Returns:
        n_tokens, n_contexts, n_documents, n_special_tokens; `vocabulary`: size, how many ids occur, the share of text
        covered by the most frequent 10, 100 and 1000, and the `n_top` most frequent text tokens with count and share
        (special tokens are not text); `document_lengths` in tokens: min, mean, median, max, histogram (n_bins equal
        bins over [min, max], edges and counts).
    """
    counts = torch.zeros(tokens.info.d_vocab, dtype=torch.int64)
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        found = torch.bincount(tokens.ids[rows][tokens.mask(rows)].long(), minlength=len(counts))
        if len(found) > len(counts):
            raise CorruptFile(
                f"The tokens hold id {len(found) - 1}, outside their tokenizer's vocabulary of {len(counts)}.",
                fix="Tokenise the dataset again.",
            )
        counts += found
    special = torch.tensor(tokens.info.special_ids, dtype=torch.int64)
    n_special = int(counts[special].sum())
    counts[special] = 0
    n_text = int(counts.sum())
    ordered = torch.sort(counts, descending=True, stable=True)
    n_shown = min(n_top, int((counts > 0).sum()))
    top, top_counts = ordered.indices[:n_shown].tolist(), ordered.values[:n_shown].tolist()
    return {
        "n_tokens": tokens.info.n_tokens,
        "n_contexts": tokens.info.n_contexts,
        "n_documents": tokens.info.n_documents,
        "n_special_tokens": n_special,
        "vocabulary": {
            "d_vocab": tokens.info.d_vocab,
            "n_distinct": int((counts > 0).sum()),
            "coverage": {str(n): int(ordered.values[:n].sum()) / max(n_text, 1) for n in (10, 100, 1000)},
            "top": [
                {"token_id": token_id, "token": token, "count": count, "share": count / n_text}
                for token_id, token, count in zip(top, token_strings(tokenizer, top), top_counts, strict=True)
            ],
        },
        "document_lengths": _lengths(tokens.document_lengths.numpy(), n_bins),
    }


def hashing(source: Path) -> Generator[float, Any, str]:
    """sha256 of a file, or of the names and contents of all files in a folder, in steps of some milliseconds.

    Yields:
        The share that is done: many gigabytes take minutes.
    """
    source = Path(source)
    if not source.exists():
        raise NotFound(f"There is no file or folder {str(source)!r}.", fix="Check the path.")
    files = stamp(source)
    n_bytes, n_done, lines, digest = sum(size for _, size, _ in files), 0, [], hashlib.sha256()
    for path, _, _ in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BYTES_AT_ONCE):
                digest.update(block)
                n_done += len(block)
                yield min(1.0, n_done / max(n_bytes, 1))
        lines.append(f"{path.relative_to(source).as_posix()} {digest.hexdigest()}")
    whole = digest if source.is_file() else hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def stamp(source: Path) -> list[tuple[Path, int, int]]:
    """Each file of a source with its size and its time in nanoseconds: what an edit changes, without reading."""
    files = [source] if source.is_file() else sorted(_files_in(source, frozenset()))
    return [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _files_in(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Those of linked folders, too: text is read from there. A link to a folder above leads nowhere new."""
    place = folder.resolve()
    if place in above:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files_in(path, above | {place})
        elif path.is_file():
            yield path


def _find_text_field(readers: list[Reader], text_field: str | None, name: str) -> str:
    rows = list(islice(chain.from_iterable(reader.rows() for reader in readers), N_SAMPLED))
    if not rows:
        raise EmptyData(f"There are no rows in {name!r}.", fix="Give a source with text.")
    lengths: dict[str, int] = {}
    others: dict[str, str] = {}
    for row in rows:
        for column, value in row.items():
            if isinstance(value, (str, bytes)):
                lengths[column] = lengths.get(column, 0) + len(value)
            elif value is not None:
                others[column] = type(value).__name__
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if text_field is not None:
        if text_field not in columns:
            raise BadInput(f"{name!r} has no column {text_field!r}.", fix=f"Use one of: {', '.join(columns)}.")
        if text_field in others:
            raise BadInput(
                f"Column {text_field!r} of {name!r} holds {others[text_field]} values, not text.",
                fix=f"Columns of text: {', '.join(lengths) or 'none'}.",
            )
        return text_field
    candidates = [column for column in lengths if column not in others]
    if not candidates:
        raise BadInput(f"{name!r} has no column of text.", fix=f"Its columns are {', '.join(columns)}.")
    for wanted in TEXT_FIELDS:
        for column in candidates:
            if column.casefold() == wanted:
                return column
    return max(candidates, key=lengths.__getitem__)


def _as_text(value: Any) -> tuple[str, bool]:
    """A value as text, and whether it held bytes that are no UTF-8; anything that is no text is empty."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="surrogateescape")
    if not isinstance(value, str):
        return "", False
    text = _SURROGATE.sub("�", value)
    return text, text != value


def _lengths(lengths: np.ndarray, n_bins: int) -> dict[str, Any]:
    counts, edges = np.histogram(lengths, bins=n_bins)
    return {
        "min": int(lengths.min()),
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "max": int(lengths.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
