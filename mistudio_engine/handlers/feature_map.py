"""Handlers of the maps in api/operations/analysis.py: laid out in a process, kept with an extraction, shown in columns.

Labels and frequencies are not kept with a map: they are joined to it when somebody looks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.api.analysis import FeatureMap, MapReport
from mistudio_engine.api.errors import BadInput, NotFound
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.analysis import MapFeatures, ShowMap
from mistudio_engine.api.records import LabelRecord, Plan
from mistudio_engine.discovery.feature_map import Layout, lay_out_file
from mistudio_engine.discovery.map_store import StoredMap, read_map, write_map
from mistudio_engine.handlers.knowledge import DERIVED_FOLDER, Knowledge
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.relay import relay
from mistudio_engine.handlers.resources import sparse_autoencoder
from mistudio_engine.handlers.search_rows import label_text
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.runtime.processes import ProcessPool

EMBEDDED_AT_ONCE = 64
"""Labels to a step."""

_DIGITS = 18
"""Of a place in a list, at most: a cursor comes back from anybody, and Python refuses thousands of digits."""


@plans(MapFeatures)
def plan_map_features(operation: MapFeatures, engine: Engine) -> Planned:
    with Knowledge.of(engine, operation.sae) as known:
        indices, left_out = _mapped(known, operation.what)
        if operation.what == "labels":
            _embedder(engine)
        plan = Plan(
            summary=f"Lay out {len(indices):,} features of {known.sae.ref} by their {operation.what} "
            f"with {operation.method}.",
            memory_bytes=len(indices) * known.sae.d_in * 16,
            details={"n_features": len(indices), "n_left_out": left_out},
        )
        return Planned(plan, subject=known.sae.ref)


def _embedder(engine: Engine) -> Any:
    """What makes vectors of labels.

    Raises:
        BadInput: there is none; a job may find that its setting was changed meanwhile.
    """
    if engine.embedder is None:
        raise BadInput(
            "There is no text embedder here, so labels cannot be laid out by their meaning.",
            fix='Use what="decoder", or install one: pip install "mistudio[embed]".',
        )
    return engine.embedder


def _mapped(known: Knowledge, what: str) -> tuple[list[int], int]:
    """The features that have a place on a map, and how many living ones have none.

    Raises:
        NotFound: none has.
    """
    indices = living = list(known.alive())
    if what == "labels":
        labelled = set(known.labels)  # all in one query
        indices = [index for index in living if index in labelled]
    if not indices:
        raise NotFound(
            f"{known.sae.ref} has no {'labels' if living else 'living features'} to lay out.",
            fix="Label its features first." if living else "Extract from more tokens.",
            next_call=("label_features", {"sae": known.sae.slug}) if living else None,
        )
    return indices, len(living) - len(indices)


@runs(MapFeatures, lane="io", resumes="start")
def run_map_features(
    operation: MapFeatures, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, MapReport]:
    with Knowledge.of(engine, operation.sae) as known, ProcessPool(1) as pool:
        indices, left_out = _mapped(known, operation.what)
        settings: dict[str, Any] = {"sae_sha256": known.sae.sha256, "n_features": len(indices)}
        if operation.what == "decoder":
            yield Progress(stage="reading decoder directions")
            vectors = _decoder_rows(engine, operation.sae, indices)
        else:
            embedder = _embedder(engine)
            vectors = yield from _label_vectors(engine, embedder, known, indices)
            settings["embedder"] = embedder.id
        path = context.folder / "vectors.npy"
        np.save(path, vectors, allow_pickle=False)
        shape = (operation.method, operation.n_neighbors, operation.min_dist, operation.seed)
        if operation.method == "umap":
            settings |= {"n_neighbors": operation.n_neighbors, "min_dist": operation.min_dist, "seed": operation.seed}
        work = pool.run(lay_out_file, str(path), *shape)
        found = yield from relay(work, lambda _: Progress(stage=f"laying out with {operation.method}", fraction=0.5))
        path = _path(known, operation.what, operation.method)
        path.parent.mkdir(exist_ok=True)
        write_map(path, indices, Layout(*found), settings)
        return MapReport(
            sae=operation.sae,
            extraction=known.record.slug,
            what=operation.what,
            method=operation.method,
            n_features=len(indices),
            n_left_out=left_out,
            settings=settings,
        )


def _path(known: Knowledge, what: str, method: str) -> Path:
    return known.folder / DERIVED_FOLDER / f"map-{what}-{method}.parquet"


def _decoder_rows(engine: Engine, sae: str, indices: list[int]) -> NDArray[np.float32]:
    def read() -> NDArray[np.float32]:
        with sparse_autoencoder(engine, sae) as module:
            return module.W_dec[indices].detach().float().cpu().numpy()

    return engine.compute.run(read)


def _label_vectors(
    engine: Engine, embedder: Any, known: Knowledge, indices: list[int]
) -> Generator[Progress, Signal, NDArray[np.float32]]:
    """Vectors of the features' labels, from the records or made now and recorded."""
    labels = (known.labels[index] for index in indices)
    texts = [label_text({"label": label.label, "category": label.category}) for label in labels]
    stored = dict(zip(texts, engine.store.embeddings(embedder.id, texts), strict=True))
    missing = iter([text for text, vector in stored.items() if vector is None])
    while some := list(islice(missing, EMBEDDED_AT_ONCE)):
        vectors = np.asarray(embedder.embed(some), np.float32)
        made = {text: vector.tobytes() for text, vector in zip(some, vectors, strict=True)}
        engine.store.put_embeddings(embedder.id, made)
        stored |= made
        yield Progress(stage="embedding labels")
    return np.stack([np.frombuffer(stored[text] or b"", np.float32) for text in texts])


@handles(ShowMap)
def show_map(operation: ShowMap, engine: Engine) -> FeatureMap:
    with Knowledge.of(engine, operation.sae) as known:
        method, found = _found(known, operation)
        all_labels = dict(known.labels)  # in one query
        labels = [all_labels.get(int(index)) for index in found.index]
        frequency = known.extraction.frequency[np.searchsorted(known.extraction.indices, found.index)]
        reasons = {
            "category": [_is_within(label, operation.category) for label in labels],
            "labelled": [operation.labelled in (None, label is not None) for label in labels],
            "frequency": (frequency >= operation.min_frequency) & (frequency <= operation.max_frequency),
        }
        fits = np.logical_and.reduce([np.asarray(each, dtype=bool) for each in reasons.values()])
        rows = np.flatnonzero(fits)
        # A page goes on only in the list that it began in: in another map, or of other features, the places differ.
        version = hashlib.sha256(found.xy.tobytes() + rows.tobytes()).hexdigest()[:12]
        begin = _begin(operation.cursor, version)
        shown = rows[begin : begin + operation.limit]
        end = begin + len(shown)
        return FeatureMap(
            sae=operation.sae,
            extraction=known.record.slug,
            what=operation.what,
            method=method,
            settings=found.settings,
            explained_variance=found.explained_variance,
            index=found.index[shown].tolist(),
            x=found.xy[shown, 0].tolist(),
            y=found.xy[shown, 1].tolist(),
            label=[label.label if (label := labels[row]) else None for row in shown],
            category=[label.category if (label := labels[row]) else None for row in shown],
            frequency=frequency[shown].tolist(),
            total=len(rows),
            shown=len(shown),
            next_cursor=f"{version}-{end}" if end < len(rows) else None,
            hidden={reason: n for reason, kept in reasons.items() if (n := len(labels) - int(np.sum(kept)))},
        )


def _found(known: Knowledge, operation: ShowMap) -> tuple[str, StoredMap]:
    """The map that was asked for.

    Raises:
        NotFound: it was not made.
    """
    for method in [operation.method] if operation.method else ["umap", "pca"]:
        if (path := _path(known, operation.what, method)).exists():
            return method, read_map(path)
    raise NotFound(
        f"There is no map of the {operation.what} of {known.sae.ref} yet.",
        fix="Make one with map_features.",
        next_call=("map_features", {"sae": known.sae.slug, "what": operation.what}),
    )


def _is_within(label: LabelRecord | None, path: str | None) -> bool:
    if not path:
        return True
    return label is not None and (label.category == path or label.category.startswith(f"{path} > "))


def _begin(cursor: str | None, version: str) -> int:
    """Where a page begins.

    Raises:
        BadInput: the cursor is none, or of another list.
    """
    if cursor is None:
        return 0
    of, _, at = cursor.rpartition("-")
    if of != version or not at.isascii() or not at.isdigit() or len(at) > _DIGITS:
        raise BadInput(
            f"The cursor {cursor!r} does not belong to this list.",
            why="The map, the labels or the filters have changed since.",
            fix="Begin again without it.",
        )
    return int(at)
