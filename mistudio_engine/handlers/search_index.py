"""The search index in step with the records: rows for it, their embeddings, and the index itself.

SQLite keeps every embedding that was ever made, so the index can be thrown away and built again with the same answers.
Which embedder makes them is the setting `embedder`; when it changes, the index is made anew in the background, and
until then words are compared. Nothing here runs on the compute thread for longer than it takes to look.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa

from mistudio_engine.api.errors import MistudioError, Unreachable
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.records import SAERecord
from mistudio_engine.discovery.embedding import Embedder
from mistudio_engine.handlers.embedders import is_slow, open_embedder
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.search_rows import SearchRows, example_text, label_text
from mistudio_engine.handlers.settings import setting
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.index import FeatureIndex, OtherEmbedder
from mistudio_engine.runtime.io_lane import IOLane

__all__ = ["QueryVector", "drop_features", "embed_query", "index_features", "open_index", "settle", "update_rows"]

log = logging.getLogger(__name__)

T = TypeVar("T")

EMBEDDED_AT_ONCE = 32
"""Features to a call of the embedder: about a tenth of a second on two cores."""

WRITTEN_AT_ONCE = 2048
"""Rows to a write into the index: about half a second at 50,000 rows."""

STEP_SECONDS = 0.02
"""How long a step of a job looks after the thread that does its indexing."""

SERVER_SECONDS = 4.0
"""How long a search, or whoever edits a label, waits for a server's vectors; then words have to do."""

RETRY_SECONDS = 30.0
"""After an embedder could not be opened, how long until a search tries again."""


class QueryVector(NamedTuple):
    """A query as a vector, or why there is none."""

    vector: np.ndarray | None
    reason: str = ""
    """Why only words are compared, a sentence; empty where meanings are."""


class _Choice:
    """Which embedder an engine was told to use, and how far that is."""

    def __init__(self, name: str, address: str | None) -> None:
        self.name, self.address = name, address
        self.reason = ""
        """Why there is none."""

        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        """Opens another one and makes the index for it."""

        self.failed_at: float | None = None
        """When the embedder last failed."""

        self.asking = IOLane(4)
        """Asks servers for those who wait no longer than `SERVER_SECONDS`."""

        self.writing = threading.Lock()
        """Held while rows are compared with the records and written, so that what was made last is not what counts."""

    @property
    def failed_lately(self) -> bool:
        return self.failed_at is not None and time.monotonic() - self.failed_at < RETRY_SECONDS


_choices: WeakKeyDictionary[Engine, _Choice] = WeakKeyDictionary()


def open_index(engine: Engine) -> None:
    """Find the embedder and open the index that belongs to it; called once, on the compute thread."""
    choice = _choices[engine] = _Choice(*_wanted(engine))
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
    engine.on_stop.append(partial(_close, engine))
    if is_slow(choice.name):
        _change(engine, choice)


def _close(engine: Engine) -> None:
    """Ask servers nothing more: what they still owe is asked for by the next engine."""
    _choices[engine].asking.close(0)
    if engine.embedder is not None:
        engine.embedder.close()


def _wanted(engine: Engine) -> tuple[str, str | None]:
    """The embedder that is set, and where it is, if it is a server."""
    name = setting(engine, "embedder")
    kind = name.partition(":")[0]
    return name, setting(engine, f"{kind}_base_url") if kind in ("openai", "ollama") else None


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
    """Change the embedder, in the background, when the setting has changed, when it failed some time ago, or when rows
    lack vectors that it makes by now.
    """
    choice, wanted, index = _choices[engine], _wanted(engine), engine.index
    assert index is not None
    with choice.lock:
        changed = wanted != (choice.name, choice.address)
        again = choice.failed_at is not None or (index.lacks_vectors and engine.embedder is not None)
        if choice.thread is None and (changed or (again and not choice.failed_lately)):
            choice.name, choice.address = wanted
            _change(engine, choice)
    return choice


def _change(engine: Engine, choice: _Choice) -> None:
    choice.reason, choice.failed_at = f"The index is being made for the embedder {choice.name}.", None
    choice.thread = threading.Thread(target=_changing, args=(engine, choice), name="mistudio-embedder", daemon=True)
    choice.thread.start()


def _changing(engine: Engine, choice: _Choice) -> None:
    index, name = engine.index, choice.name
    assert index is not None
    reason = "The embedder could not be changed; the log says why."
    try:
        before, (embedder, reason) = engine.embedder, _opened(engine, name)
        if engine.state == "stopping":
            if embedder is not None:
                embedder.close()
            return
        engine.embedder = embedder
        target = (embedder.id, embedder.dimension) if embedder else (None, None)
        # Without a server that is only away for now, the index stays as it is: its vectors will be of use again.
        is_away = embedder is None and is_slow(name)
        if not is_away and (target != index.target or index.lacks_vectors):
            try:
                index.switch(*target)
            except MistudioError as error:
                log.warning("the search index could not be made for %s: %s", name, error)
                engine.embedder, reason = None, error.what
                index.switch(None, None)
        if before is not None:
            before.close()  # not sooner: searches asked it until now
    except Exception:  # the edge of a thread
        log.exception("the embedder could not be changed")
        engine.embedder = None
    finally:
        with choice.lock:
            choice.failed_at = time.monotonic() if reason and is_slow(name) else None
            choice.reason, choice.thread = reason, None


def _all_rows(engine: Engine) -> Iterator[Any]:
    """Every row anew, from the records; embeddings come from there, too."""
    choice, index = _choices[engine], engine.index
    assert index is not None
    for sae in engine.store.all(SAERecord):
        for some in _plain_rows(engine, sae):
            if threading.current_thread() is choice.thread:
                _set_vectors(some, _vectors(engine, engine.embedder, some))  # whose failure is seen to there
                yield from some
            else:
                yield from _embedded(engine, some, _fitting(engine))


def _plain_rows(engine: Engine, sae: SAERecord) -> Iterator[list[dict[str, Any]]]:
    """An SAE's rows without vectors, some at a time; none from where its files cannot be read.

    One SAE that is damaged must not keep the others from being found. Whoever reads its features is told.
    """
    if sae.extraction is None:
        return
    try:
        with Knowledge(engine, sae) as known:
            rows = SearchRows(known)
            for some in _batches(known.extraction.indices.tolist(), EMBEDDED_AT_ONCE):
                yield rows.of(some)
    except (MistudioError, OSError, pa.ArrowException) as error:
        log.warning("features of %s are missing in the search index: %s", sae.ref, error)


def _fitting(engine: Engine) -> Embedder | None:
    """The embedder, if the index has its vectors or is being made for them."""
    embedder, index = engine.embedder, engine.index
    assert index is not None
    return embedder if embedder is not None and embedder.id == index.target[0] else None


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def _vectors(engine: Engine, embedder: Embedder | None, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Of the texts of rows; none without an embedder."""
    texts = {text for row in rows for text in (label_text(row), example_text(row)) if text}
    return _embeddings(engine, embedder, sorted(texts)) if embedder else {}


def _set_vectors(rows: list[dict[str, Any]], vectors: dict[str, bytes]) -> None:
    """Give rows their label and example vectors; None for an empty text, or one that was not embedded."""
    for row in rows:
        row["label_vector"], row["example_vector"] = vectors.get(label_text(row)), vectors.get(example_text(row))


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
    lane = IOLane(1)
    with index.owing():
        try:
            for some in _batches(everything, WRITTEN_AT_ONCE):
                made: list[dict[str, Any]] = []
                for part in _batches(some, EMBEDDED_AT_ONCE):
                    made += yield from _waited(lane.call(partial(_made, engine, rows, part)), n_done / len(everything))
                    n_done += len(part)
                is_current = yield from _waited(lane.call(partial(_put, engine, known, made)), n_done / len(everything))
                if not is_current:
                    return n_done  # whoever chose the other extraction indexes that
            yield from _waited(lane.call(partial(_drop_others, engine, known)), 1.0)
        finally:
            lane.close(0)  # whoever cancels does not wait for a server's answer
    return len(everything)


def _waited(work: Future[T], fraction: float) -> Generator[Progress, Signal, T]:
    while not wait([work], timeout=STEP_SECONDS).done:
        yield Progress(stage="indexing", fraction=fraction)
    yield Progress(stage="indexing", fraction=fraction)
    return work.result()


def update_rows(engine: Engine, slug: str, indices: Iterable[int]) -> None:
    """Bring single features up to date in the index, after their label or its score changed."""
    assert engine.index is not None
    with engine.index.owing(), Knowledge.of(engine, slug) as known:
        if known.sae.extraction is None:
            return
        covered = set(known.extraction.indices.tolist())
        wanted = [index for index in indices if index in covered]
        if wanted:
            _put(engine, known, _made(engine, SearchRows(known), wanted, in_time=True))


def _made(engine: Engine, rows: SearchRows, indices: list[int], *, in_time: bool = False) -> list[dict[str, Any]]:
    """Rows with vectors, or without where the embedder fails."""
    return _embedded(engine, rows.of(indices), engine.embedder, in_time=in_time)


def _embedded(
    engine: Engine, rows: list[dict[str, Any]], embedder: Embedder | None, *, in_time: bool = False
) -> list[dict[str, Any]]:
    """The rows with vectors, or without where the embedder fails or has just failed: they get theirs when it works
    again.

    Args:
        in_time: somebody waits, or a lock is held: an embedder that is too slow has failed.
    """
    choice, index = _choices[engine], engine.index
    assert index is not None
    if choice.failed_lately:
        embedder = None  # each try may last a minute
    work = partial(_vectors, engine, embedder, rows)
    try:
        vectors = _in_time(choice, work) if in_time and embedder is not None else work()
    except MistudioError as error:
        if embedder is not engine.embedder:
            # It was changed meanwhile, and closed.
            return _embedded(engine, rows, _fitting(engine), in_time=in_time)
        log.warning("features are indexed without their meaning: %s", error)
        vectors, embedder = {}, None
        choice.failed_at = time.monotonic()
    if embedder is None and (is_slow(choice.name) or engine.embedder is not None):
        index.lacks_vectors = True
    _set_vectors(rows, vectors)
    for row in rows:
        row["embedder"] = embedder.id if embedder else None
    return rows


class _Late(Unreachable):
    """An embedder that has not answered yet."""


def _in_time(choice: _Choice, work: Callable[[], T]) -> T:
    """What a server is asked, if it answers while somebody waits; what comes later is recorded all the same."""
    if not is_slow(choice.name):
        return work()
    asked = choice.asking.call(work)
    if not wait([asked], timeout=SERVER_SECONDS).done:
        raise _Late(f"The embedder {choice.name} did not answer within {SERVER_SECONDS:g} s.")
    return asked.result()


def _put(engine: Engine, known: Knowledge, rows: list[dict[str, Any]]) -> bool:
    """Write rows into the index; False, and nothing is written, where another extraction was chosen since.

    Those of features that were labelled or scored since are made again: they were made from what `known` knows.
    """
    index, store, slug = engine.index, engine.store, known.sae.slug
    assert index is not None
    with _choices[engine].writing, Knowledge.of(engine, slug) as now:
        if now.sae.extraction != known.sae.extraction:
            return False
        late = [each["index"] for each in rows if store.label(slug, each["index"]) != known.labels.get(each["index"])]
        if late:
            again = {row["index"]: row for row in _made(engine, SearchRows(now), late, in_time=True)}
            rows = [again.get(row["index"], row) for row in rows]
        while True:
            target, _ = index.target
            # The embedder may have been changed while they were made.
            others = [row for row in rows if row["embedder"] not in (None, target)]
            if others:
                _embedded(engine, others, _fitting(engine), in_time=True)
            try:
                index.upsert(rows, embedder=target)  # type: ignore[arg-type]
            except OtherEmbedder:
                continue
            return True


def _drop_others(engine: Engine, known: Knowledge) -> None:
    """Remove what the index has of the SAE's other extractions."""
    index, slug = engine.index, known.sae.slug
    assert index is not None
    with _choices[engine].writing:
        if engine.store.get(SAERecord, slug).extraction == known.record.slug:
            index.delete_sae(slug, but=known.record.slug)


def drop_features(engine: Engine, slug: str) -> None:
    """Remove an SAE's features from the index, after its record or its extraction is gone."""
    assert engine.index is not None
    # Whoever writes them still looks at the records first, from now on in vain.
    with engine.index.owing(), _choices[engine].writing:
        engine.index.delete_sae(slug)


def embed_query(engine: Engine, query: str) -> QueryVector:
    """The query as a vector, if there is an embedder, it answers in time, and the index has vectors of it."""
    choice = _follow(engine)
    embedder, index = engine.embedder, engine.index
    assert index is not None
    if embedder is None or choice.thread is not None or index.embedder != embedder.id:
        return QueryVector(None, choice.reason or "There is no text embedder here.")
    try:
        vectors = _in_time(choice, partial(_embeddings, engine, embedder, [query], is_query=True))
    except MistudioError as error:
        if not isinstance(error, _Late):
            choice.failed_at = time.monotonic()  # it is opened again by and by, with the address and key of then
        return QueryVector(None, error.what)
    return QueryVector(np.frombuffer(vectors[query], np.float32))
