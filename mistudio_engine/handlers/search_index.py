"""The search index in step with the records: rows for it, their embeddings, and the index itself.

SQLite keeps every embedding that was ever made, so the index can be thrown away and built again with the same answers.
Which embedder makes them is the setting `embedder`; when it changes, the index is made anew in the background, and
until then words are compared. Nothing here runs on the compute thread for longer than it takes to look.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from mistudio_engine.api.errors import MistudioError
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.records import SAERecord
from mistudio_engine.discovery.embedding import Embedder
from mistudio_engine.discovery.embedding_servers import OllamaEmbedder, OpenAIEmbedder
from mistudio_engine.handlers.embedders import is_slow, open_embedder
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.search_rows import SearchRows, example_text, label_text
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.index import FeatureIndex, OtherEmbedder

__all__ = ["QueryVector", "embed_query", "index_features", "open_index", "settle", "update_rows"]

log = logging.getLogger(__name__)

T = TypeVar("T")

EMBEDDED_AT_ONCE = 32
"""Features to a call of the embedder: about a tenth of a second on two cores."""

WRITTEN_AT_ONCE = 2048
"""Rows to a write into the index: about half a second at 50,000 rows."""

STEP_SECONDS = 0.02
"""How long a step of a job looks after the thread that does its indexing."""

QUERY_SECONDS = 4.0
"""How long a search waits for a server to embed its query; then it compares words."""

RETRY_SECONDS = 30.0
"""After an embedder could not be opened, how long until a search tries again."""


class QueryVector(NamedTuple):
    """A query as a vector, or why there is none."""

    vector: np.ndarray | None
    reason: str = ""
    """Why only words are compared, a sentence; empty where meanings are."""


class _Choice:
    """Which embedder an engine was told to use, and how far that is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reason = ""
        """Why there is none."""

        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        """Opens another one and makes the index for it."""

        self.failed_at: float | None = None
        """When the embedder last failed."""

        self.missed = False
        """Whether rows lack vectors that it would have made."""

        self.asking = ThreadPoolExecutor(max_workers=4, thread_name_prefix="mistudio-embed")


_choices: WeakKeyDictionary[Engine, _Choice] = WeakKeyDictionary()


def open_index(engine: Engine) -> None:
    """Find the embedder and open the index that belongs to it; called once, on the compute thread."""
    choice = _choices[engine] = _Choice(_wanted(engine))
    folder = engine.home / "index"
    embedder, dimension = None, None
    if is_slow(choice.name):
        # What the index was made with is opened meanwhile: its words can be compared.
        embedder, dimension = FeatureIndex.stored(folder)
    else:
        engine.embedder, choice.reason = _opened(engine, choice.name)
        if engine.embedder is not None:
            embedder, dimension = engine.embedder.id, engine.embedder.dimension
    engine.index = FeatureIndex(folder, partial(_all_rows, engine), embedder=embedder, dimension=dimension)
    if is_slow(choice.name):
        _change(engine, choice)


def _wanted(engine: Engine) -> str:
    return engine.store.get_setting("embedder") or "auto"


def _opened(engine: Engine, name: str) -> tuple[Embedder | None, str]:
    """The embedder, or why there is none."""
    try:
        embedder = open_embedder(engine, name)
    except MistudioError as error:
        log.warning("search compares words only: %s", error)
        return None, error.what
    return embedder, "" if embedder else "There is no text embedder here." if name == "auto" else ""


def settle(engine: Engine, seconds: float = 60.0) -> None:
    """Use the embedder that is set now, and wait until it is, at most so long."""
    thread = _follow(engine).thread
    if thread is not None:
        thread.join(seconds)


def _follow(engine: Engine) -> _Choice:
    """Change the embedder, in the background, when the setting has changed or the last try was some time ago."""
    choice, wanted = _choices[engine], _wanted(engine)
    with choice.lock:
        again = choice.failed_at is not None and time.monotonic() - choice.failed_at > RETRY_SECONDS
        if choice.thread is None and (wanted != choice.name or again):
            choice.name = wanted
            _change(engine, choice)
    return choice


def _change(engine: Engine, choice: _Choice) -> None:
    choice.reason = f"The index is being made for the embedder {choice.name}."
    choice.thread = threading.Thread(target=_changing, args=(engine, choice), name="mistudio-embedder", daemon=True)
    choice.thread.start()


def _changing(engine: Engine, choice: _Choice) -> None:
    index, name = engine.index, choice.name
    assert index is not None
    reason = "The embedder could not be changed; the log says why."
    try:
        before, (embedder, reason) = engine.embedder, _opened(engine, name)
        engine.embedder = embedder
        target = (embedder.id, embedder.dimension) if embedder else (None, None)
        # Without a server that is only away for now, the index stays as it is: its vectors will be of use again.
        is_away = embedder is None and is_slow(name)
        if not is_away and (target != index.target or choice.missed):
            choice.missed = False
            try:
                index.switch(*target)
            except MistudioError as error:
                log.warning("the search index could not be made for %s: %s", name, error)
                engine.embedder, reason = None, error.what
                index.switch(None, None)
        if isinstance(before, OpenAIEmbedder | OllamaEmbedder):
            before.close()  # not before: searches asked it until now
    except Exception:  # the edge of a thread
        log.exception("the embedder could not be changed")
        engine.embedder = None
    finally:
        with choice.lock:
            choice.failed_at = time.monotonic() if reason and is_slow(name) else None
            choice.reason, choice.thread = reason, None


def _all_rows(engine: Engine) -> Iterator[Any]:
    """Every row anew, from the records; embeddings come from there, too."""
    for sae in engine.store.all(SAERecord):
        if sae.extraction is None:
            continue
        with Knowledge(engine, sae) as known:
            rows = SearchRows(known)
            for some in _batches(known.extraction.indices.tolist(), EMBEDDED_AT_ONCE):
                yield from _with_vectors(engine, engine.embedder, rows.of(some))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def _with_vectors(engine: Engine, embedder: Embedder | None, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with label and example vectors; None for an empty text, or without an embedder."""
    texts = [(label_text(row), example_text(row)) for row in rows]
    wanted = sorted({text for pair in texts for text in pair if text})
    vectors = _embeddings(engine, embedder, wanted) if embedder else {}
    for row, (label, example) in zip(rows, texts, strict=True):
        row["label_vector"], row["example_vector"] = vectors.get(label), vectors.get(example)
    return rows


def _embeddings(
    engine: Engine, embedder: Embedder, texts: Sequence[str], *, is_query: bool = False
) -> dict[str, bytes]:
    """Vectors by text, from the records or made now and recorded."""
    key = f"{embedder.id} query" if is_query and embedder.asks_differently else embedder.id
    known = engine.store.embeddings(key, texts)
    found = {text: vector for text, vector in zip(texts, known, strict=True) if vector is not None}
    for some in _batches((text for text in texts if text not in found), 2 * EMBEDDED_AT_ONCE):
        vectors = embedder.embed(some, is_query=is_query)
        made = {text: np.asarray(vector, np.float32).tobytes() for text, vector in zip(some, vectors, strict=True)}
        engine.store.put_embeddings(key, made)
        found |= made
    return found


def index_features(
    engine: Engine, known: Knowledge, indices: Iterable[int] | None = None
) -> Generator[Progress, Signal, int]:
    """Put features into the index, in the place of what it had of their SAE; how many.

    The work is done on a thread of its own, so a step of the job takes no longer than `STEP_SECONDS`. A search
    meanwhile finds some features as they were and some as they are.

    Args:
        indices: by default all of the extraction, the dead ones too.
    """
    index = engine.index
    assert index is not None
    everything = known.extraction.indices.tolist() if indices is None else list(indices)
    rows, n_done = SearchRows(known), 0
    pool = ThreadPoolExecutor(1, thread_name_prefix="mistudio-index")
    try:
        for some in _batches(everything, WRITTEN_AT_ONCE):
            made: list[dict[str, Any]] = []
            for part in _batches(some, EMBEDDED_AT_ONCE):
                made += yield from _waited(pool.submit(_made, engine, rows, part), n_done / len(everything))
                n_done += len(part)
            yield from _waited(pool.submit(_put, engine, made), n_done / len(everything))
        yield from _waited(pool.submit(index.delete_sae, known.sae.slug, but=known.record.slug), 1.0)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # whoever cancels does not wait for a server's answer
    return len(everything)


def _waited(work: Future[T], fraction: float) -> Generator[Progress, Signal, T]:
    while not wait([work], timeout=STEP_SECONDS).done:
        yield Progress(stage="indexing", fraction=fraction)
    yield Progress(stage="indexing", fraction=fraction)
    return work.result()


def update_rows(engine: Engine, slug: str, indices: Iterable[int]) -> None:
    """Bring single features up to date in the index, after their label or its score changed."""
    with Knowledge.of(engine, slug) as known:
        if known.sae.extraction is None:
            return
        covered = set(known.extraction.indices.tolist())
        wanted = [index for index in indices if index in covered]
        if wanted:
            _put(engine, _made(engine, SearchRows(known), wanted))


def _made(engine: Engine, rows: SearchRows, indices: list[int]) -> list[dict[str, Any]]:
    """Rows with vectors, or without where the embedder fails: they get theirs when it works again."""
    choice, embedder, plain = _choices[engine], engine.embedder, rows.of(indices)
    try:
        made = _with_vectors(engine, embedder, plain)
    except MistudioError as error:
        log.warning("features are indexed without their meaning: %s", error)
        made, embedder = _with_vectors(engine, None, plain), None
        choice.failed_at = time.monotonic()
    choice.missed |= embedder is None and is_slow(choice.name)
    for row in made:
        row["embedder"] = embedder.id if embedder else None
    return made


def _put(engine: Engine, rows: list[dict[str, Any]]) -> None:
    """Write rows into the index."""
    index = engine.index
    assert index is not None
    while True:
        target, _ = index.target
        for row in rows:
            if row["embedder"] not in (None, target):  # the embedder was changed while they were made
                current = engine.embedder
                fitting = current if current is not None and current.id == target else None
                _with_vectors(engine, fitting, [row])
                row["embedder"] = fitting.id if fitting else None
        try:
            index.upsert(rows, embedder=target)  # type: ignore[arg-type]
        except OtherEmbedder:
            continue
        return


def embed_query(engine: Engine, query: str) -> QueryVector:
    """The query as a vector, if there is an embedder, it answers in time, and the index has vectors of it."""
    choice = _follow(engine)
    embedder, index = engine.embedder, engine.index
    assert index is not None
    if embedder is None or choice.thread is not None or index.embedder != embedder.id:
        return QueryVector(None, choice.reason or "There is no text embedder here.")
    work = partial(_embeddings, engine, embedder, [query], is_query=True)
    if not is_slow(choice.name):
        return QueryVector(np.frombuffer(work()[query], np.float32))
    asked = choice.asking.submit(work)
    if not wait([asked], timeout=QUERY_SECONDS).done:
        return QueryVector(None, f"The embedder {choice.name} did not answer within {QUERY_SECONDS:g} s.")
    try:
        return QueryVector(np.frombuffer(asked.result()[query], np.float32))
    except MistudioError as error:
        return QueryVector(None, error.what)
