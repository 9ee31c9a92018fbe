"""The search index in step with the records: rows for it, their embeddings, and the index itself.

SQLite keeps every embedding that was ever made, so the index can be thrown away and built again with the same answers.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from mistudio_engine.api.errors import MistudioError
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.records import SAERecord
from mistudio_engine.discovery.embedding import find_local_embedder
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.index import FeatureIndex

__all__ = ["embed_query", "index_features", "open_index", "update_rows"]

log = logging.getLogger(__name__)

EMBEDDED_AT_ONCE = 32
"""Texts to a step: about a tenth of a second on two cores."""


def open_index(engine: Engine) -> None:
    """Find the embedder and open the index that belongs to it; called once, on the compute thread."""
    try:
        engine.embedder = find_local_embedder()
    except MistudioError as error:
        log.warning("search compares words only: %s", error)
    embedder = engine.embedder
    engine.index = FeatureIndex(
        engine.home / "index",
        partial(_all_rows, engine),
        embedder=embedder.id if embedder else None,
        dimension=embedder.dimension if embedder else None,
    )


def _all_rows(engine: Engine) -> Iterator[Any]:
    """Every row anew, from the records; embeddings come from there, too."""
    for sae in engine.store.all(SAERecord):
        if sae.extraction is None:
            continue
        with Knowledge(engine, sae) as known:
            indices = known.alive()
            while some := list(islice(indices, EMBEDDED_AT_ONCE)):
                yield from _with_vectors(engine, [known.search_row(index) for index in some])


def _with_vectors(engine: Engine, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with label and example vectors; None for an empty text, or without an embedder."""
    texts = [(_label_text(row), _example_text(row)) for row in rows]
    wanted = sorted({text for pair in texts for text in pair if text})
    vectors = _embeddings(engine, wanted) if engine.embedder else {}
    for row, (label, example) in zip(rows, texts, strict=True):
        row["label_vector"], row["example_vector"] = vectors.get(label), vectors.get(example)
    return rows


def _label_text(row: dict[str, Any]) -> str:
    return f"{row['label']}. {row['category']}".strip(". ") if row["label"] else ""


def _example_text(row: dict[str, Any]) -> str:
    return f"{row['text']}. {row['example_text']}".strip(". ")


def _embeddings(engine: Engine, texts: Sequence[str]) -> dict[str, bytes]:
    """Vectors by text, from the records or made now and recorded."""
    known = engine.store.embeddings(engine.embedder.id, texts)
    found = {text: vector for text, vector in zip(texts, known, strict=True) if vector is not None}
    missing = [text for text in texts if text not in found]
    for start in range(0, len(missing), EMBEDDED_AT_ONCE):
        some = missing[start : start + EMBEDDED_AT_ONCE]
        vectors = _on_compute_thread(engine, partial(engine.embedder.embed, some))
        made = {text: np.asarray(vector, np.float32).tobytes() for text, vector in zip(some, vectors, strict=True)}
        engine.store.put_embeddings(engine.embedder.id, made)
        found |= made
    return found


def _on_compute_thread(engine: Engine, work: Any) -> Any:
    return work() if engine.compute.is_here else engine.compute.run(work)


def index_features(engine: Engine, known: Knowledge, indices: Iterable[int]) -> Generator[Progress, Signal, int]:
    """Put features into the index, in small steps, in the place of what it had of their SAE; how many."""
    assert engine.index is not None
    everything = list(indices)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(everything), EMBEDDED_AT_ONCE):
        some = everything[start : start + EMBEDDED_AT_ONCE]
        rows += _with_vectors(engine, [known.search_row(index) for index in some])
        yield Progress(stage="indexing", fraction=0.9 + 0.1 * (start + len(some)) / len(everything))
    engine.index.delete_sae(known.sae.slug)  # only now: a search meanwhile finds the earlier ones
    engine.index.upsert(rows)  # type: ignore[arg-type]
    return len(rows)


def update_rows(engine: Engine, slug: str, indices: Iterable[int]) -> None:
    """Bring single features up to date in the index, after their label changed."""
    assert engine.index is not None
    with Knowledge.of(engine, slug) as known:
        if known.sae.extraction is None:
            return
        covered = set(known.extraction.indices.tolist())
        rows = [known.search_row(index) for index in indices if index in covered]
        engine.index.upsert(_with_vectors(engine, rows))  # type: ignore[arg-type]


def embed_query(engine: Engine, query: str) -> np.ndarray | None:
    """The query as a vector; None without an embedder."""
    if engine.embedder is None:
        return None
    return np.frombuffer(_embeddings(engine, [query])[query], np.float32)
