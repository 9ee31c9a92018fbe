"""What the search index holds of each feature, made from what is known of it: words, numbers, and the texts to embed.

It knows neither the index nor an embedder.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mistudio_engine.api.refs import FeatureKey
from mistudio_engine.discovery.extraction_store import FEATURES_FILE
from mistudio_engine.handlers.knowledge import DATA_FOLDER, Knowledge

__all__ = ["SearchRows", "example_text", "label_text"]

TELLING_TOKENS, EMBEDDED_TOKENS = 12, 8
"""Tokens that words are looked for in, and those of them that are compared by meaning. Windows of text are no help
there: on the embedded corpus eight tokens find more concepts than three windows, and windows beside them fewer."""

EXAMPLES, WINDOW = 3, 6
"""Top examples that words are looked for in, and the tokens of them around the prime one."""


class SearchRows:
    """Rows for the features of one extraction."""

    def __init__(self, known: Knowledge) -> None:
        self._known = known
        self._strings: dict[int, str] = {}

    def of(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """A row for each feature, without its vectors."""
        return [self._row(index) for index in indices]

    def _row(self, index: int) -> dict[str, Any]:
        known = self._known
        stats, label = known.extraction.feature(index), known.labels.get(index)
        examples = known.extraction.examples(index, "top", window=WINDOW)[:EXAMPLES]
        texts = ["".join(self._read(each.token_ids)).strip() for each in examples]
        return {
            "id": FeatureKey(known.sae.slug, index).id,
            "sae": known.sae.slug,
            "index": index,
            "extraction": known.record.slug,
            "label": label.label if label else "",
            "category": label.category if label else "",
            "author": label.author if label else "",
            "confidence": label.confidence if label else None,
            "text": " ".join(self._telling(index)),
            "example_text": " … ".join(texts),
            "frequency": stats.frequency,
            "max_activation": stats.max,
            "dense": stats.dense,
        }

    def _telling(self, index: int) -> list[str]:
        """The tokens that tell most of a feature, best first.

        count · mean / √(count over all features): what it fires on most, but for what everything fires on. The root
        keeps a word that is common in itself, such as “the” for a feature of articles.
        """
        offsets, ids, weights = self._tokens
        row = int(np.searchsorted(self._known.extraction.indices, index))
        begin, end = offsets[row], offsets[row + 1]
        order = np.lexsort((ids[begin:end], -weights[begin:end]))
        # Twice as many: “the” and “ the” read alike, and some are nothing but a space.
        strings = (string.strip() for string in self._read(ids[begin:end][order][: 2 * TELLING_TOKENS]))
        return list(dict.fromkeys(string for string in strings if string))[:TELLING_TOKENS]

    @cached_property
    def _tokens(self) -> tuple[Any, Any, Any]:
        path = self._known.folder / DATA_FOLDER / FEATURES_FILE
        return _telling_tokens(path, path.stat().st_mtime_ns)

    def _read(self, ids: Any) -> list[str]:
        missing = [each for each in dict.fromkeys(int(each) for each in ids) if each not in self._strings]
        if missing:
            self._strings.update(zip(missing, self._known.strings(missing), strict=True))
        return [self._strings[int(each)] for each in ids]


@lru_cache(maxsize=2)
def _telling_tokens(path: Path, changed_at: int) -> tuple[Any, Any, Any]:
    """Of all features one after the other: where each begins, its tokens' ids and how much they tell.

    Kept, as every edit of a label asks for it.
    """
    table = pq.read_table(path, columns=["token_ids", "token_counts", "token_means"])
    ids, counts, means = (_flat(table[name]) for name in ("token_ids", "token_counts", "token_means"))
    lengths = pc.list_value_length(table["token_ids"]).to_numpy()  # type: ignore[attr-defined]
    unique, inverse = np.unique(ids, return_inverse=True)
    total = np.bincount(inverse, weights=counts, minlength=len(unique))
    return np.append(0, np.cumsum(lengths)), ids, counts * means / np.sqrt(total[inverse])


def _flat(column: pa.ChunkedArray) -> Any:
    return pc.list_flatten(column).to_numpy()  # type: ignore[attr-defined]


def label_text(row: dict[str, Any]) -> str:
    """What of a row its label vector stands for; empty without a label."""
    return f"{row['label']}. {row['category']}".strip(". ") if row["label"] else ""


def example_text(row: dict[str, Any]) -> str:
    """What of a row its example vector stands for; empty where it is dead."""
    return " ".join(row["text"].split(" ")[:EMBEDDED_TOKENS])
