"""Handlers of api/operations/features.py: features are searched, listed, read, and looked for on a text."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mistudio_engine.api.errors import BadInput, NotFound
from mistudio_engine.api.features import FeatureCard, FeaturePage, FeatureRow, TextFeature, TextFeatures
from mistudio_engine.api.operations.features import FeaturesOnText, GetFeature, SearchFeatures
from mistudio_engine.api.records import SAERecord
from mistudio_engine.api.refs import FeatureKey
from mistudio_engine.discovery.extraction_store import FEATURES_FILE
from mistudio_engine.discovery.on_text import FeaturesOnText as Found
from mistudio_engine.discovery.on_text import features_on_text
from mistudio_engine.handlers.knowledge import DATA_FOLDER, Knowledge
from mistudio_engine.handlers.registry import handles
from mistudio_engine.handlers.resources import fitting_model, language_model, sparse_autoencoder
from mistudio_engine.handlers.search_index import embed_query
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.feature_rows import Where


@handles(SearchFeatures)
def search_features(operation: SearchFeatures, engine: Engine) -> FeaturePage:
    if operation.sae is not None:
        with Knowledge.of(engine, operation.sae) as known:
            _ = known.record  # nothing can be found before an extraction: say so
    query = (operation.query or "").strip()
    if not query:
        return _listed(operation, engine)
    if operation.mode == "token":
        return _firing_on_token(operation, engine, query)
    return _indexed(operation, engine, query)


def _indexed(operation: SearchFeatures, engine: Engine, query: str) -> FeaturePage:
    assert engine.index is not None
    vector = embed_query(engine, query) if operation.mode in ("auto", "meaning") else None
    if operation.mode == "meaning" and vector is None:
        raise BadInput(
            "There is no text embedder here, so meanings cannot be compared.",
            fix='Use mode="text", or install one: pip install "mistudio[embed]".',
        )
    mode = "meaning" if operation.mode == "meaning" else "hybrid" if vector is not None else "text"
    where = Where(sae=operation.sae, category=operation.category, dense=None if operation.include_dense else False)
    hits = engine.index.search(
        query, mode=mode, vector=vector, where=where, limit=operation.limit, cursor=operation.cursor
    )
    opened: dict[str, Knowledge] = {}
    rows = []
    for hit in hits.rows:
        try:
            known = opened.get(hit.sae) or opened.setdefault(hit.sae, Knowledge.of(engine, hit.sae))
            rows.append(known.row(hit.index, score=hit.score, why=hit.why))
        except NotFound:
            continue  # deleted, or extracted anew with fewer features, since it was put into the index
    dense = 0 if operation.include_dense else engine.index.count(Where(sae=operation.sae, dense=True))
    return FeaturePage(
        rows=rows,
        total=hits.total,
        shown=len(rows),
        next_cursor=hits.next_cursor,
        mode=hits.mode,
        embedder=hits.embedder,
        hidden={"dense": dense} if dense else {},
        extraction=_only(known.record.slug for known in opened.values()),
    )


def _only(names: Any) -> str | None:
    found = set(names)
    return found.pop() if len(found) == 1 else None


def _saes(operation: SearchFeatures, engine: Engine) -> list[SAERecord]:
    if operation.sae is not None:
        return [engine.store.get(SAERecord, operation.sae)]
    return [sae for sae in engine.store.all(SAERecord) if sae.extraction is not None]


def _listed(operation: SearchFeatures, engine: Engine) -> FeaturePage:
    """Every living feature, SAE by SAE, those that fire most often first."""
    keys: list[FeatureKey] = []
    hidden: dict[str, int] = {}
    opened: dict[str, Knowledge] = {}
    for sae in _saes(operation, engine):
        known = opened[sae.slug] = Knowledge(engine, sae)
        indices = known.listed(operation.include_dense)
        if operation.category:
            indices = [index for index in indices if _is_labelled_within(known, index, operation.category)]
        keys += [FeatureKey(sae.slug, index) for index in indices]
        for reason, count in known.hidden(operation.include_dense).items():
            hidden[reason] = hidden.get(reason, 0) + count
    versions = "+".join(known.record.slug for known in opened.values())
    offset = _offset(operation.cursor, versions)
    chosen = keys[offset : offset + operation.limit]
    end = offset + len(chosen)
    return FeaturePage(
        rows=[opened[key.sae].row(key.index) for key in chosen],
        total=len(keys),
        shown=len(chosen),
        next_cursor=_cursor(end, versions) if end < len(keys) else None,
        mode="list",
        hidden=hidden,
        extraction=_only(known.record.slug for known in opened.values()),
    )


def _is_labelled_within(known: Knowledge, index: int, path: str) -> bool:
    label = known.labels.get(index)
    return label is not None and (label.category == path or label.category.startswith(f"{path} > "))


def _cursor(offset: int, versions: str) -> str:
    return base64.urlsafe_b64encode(f"{offset}|{versions}".encode()).decode()


def _offset(cursor: str | None, asked: str) -> int:
    """Where the page begins that a cursor of the list `asked` names.

    Raises:
        BadInput: it is no cursor, or of another list.
    """
    if cursor is None:
        return 0
    try:
        offset, _, listed = base64.urlsafe_b64decode(cursor.encode()).decode().partition("|")
        begin = int(offset)
        if begin < 0:
            raise ValueError("a place before the first")
    except (ValueError, UnicodeError):
        raise BadInput(f"{cursor!r} is not a cursor.", fix="Pass next_cursor of the page before, or none.") from None
    if listed != asked:
        raise BadInput(
            "The cursor belongs to another list.",
            why="The query is another one, or there is a newer extraction.",
            fix="Begin again without it.",
        )
    return begin


def _firing_on_token(operation: SearchFeatures, engine: Engine, query: str) -> FeaturePage:
    """Features among whose top tokens the token is, by the share of their activations that is on it."""
    found: list[tuple[float, FeatureKey, str]] = []
    opened: dict[str, Knowledge] = {}
    n_dense = 0
    for sae in _saes(operation, engine):
        known = opened[sae.slug] = Knowledge(engine, sae)
        ids = _ids_of_token(known, query)
        if not ids:
            continue
        columns = ["feature", "n_active", "frequency", "token_ids", "token_counts"]
        table = pq.read_table(known.folder / DATA_FOLDER / FEATURES_FILE, columns=columns)
        parents = pc.list_parent_indices(table["token_ids"]).to_numpy()  # type: ignore[attr-defined]
        flat_ids = pc.list_flatten(table["token_ids"]).to_numpy()  # type: ignore[attr-defined]
        counts = pc.list_flatten(table["token_counts"]).to_numpy()  # type: ignore[attr-defined]
        on_token = np.bincount(parents, weights=np.where(np.isin(flat_ids, list(ids)), counts, 0), minlength=len(table))
        n_active = table["n_active"].to_numpy()
        for row in np.flatnonzero(on_token):
            index = int(table["feature"][int(row)].as_py())
            if operation.category and not _is_labelled_within(known, index, operation.category):
                continue
            if not operation.include_dense and known.extraction.feature(index).dense:
                n_dense += 1
                continue
            share = float(on_token[row] / n_active[row])
            why = f"{on_token[row]:.0f} of its {n_active[row]} activations are on {query!r}"
            found.append((min(share, 1.0), FeatureKey(sae.slug, index), why))
    found.sort(key=lambda each: (-each[0], each[1]))
    asked = "+".join([query, *(known.record.slug for known in opened.values())])
    offset = _offset(operation.cursor, asked)
    chosen = found[offset : offset + operation.limit]
    rows: list[FeatureRow] = [opened[key.sae].row(key.index, score=score, why=why) for score, key, why in chosen]
    end = offset + len(rows)
    return FeaturePage(
        rows=rows,
        total=len(found),
        shown=len(rows),
        next_cursor=_cursor(end, asked) if end < len(found) else None,
        mode="token",
        hidden={"dense": n_dense} if n_dense else {},
        extraction=_only(known.record.slug for known in opened.values()),
    )


def _ids_of_token(known: Knowledge, query: str) -> set[int]:
    """Ids of the tokens that read as the query, with or without a space in front."""
    vocabulary = known.tokenizer.get_vocab()
    ids = list(vocabulary.values())
    return {each for each, string in zip(ids, known.strings(ids), strict=True) if string.strip() == query}


@handles(GetFeature)
def get_feature(operation: GetFeature, engine: Engine) -> FeatureCard:
    with Knowledge.of(engine, operation.sae) as known:
        return known.card(
            operation.index, n=operation.n, sampling=operation.sampling, window=operation.window, bins=operation.bins
        )


@handles(FeaturesOnText)
def on_text(operation: FeaturesOnText, engine: Engine) -> TextFeatures:
    record = engine.store.get(SAERecord, operation.sae)
    model = fitting_model(engine, record)
    with Knowledge(engine, record) as known:
        frequency = None
        if record.extraction is not None and not operation.include_dense:
            frequency = np.zeros(record.d_sae)
            frequency[known.extraction.indices] = known.extraction.frequency

        def look() -> Found:
            with language_model(engine, model.slug) as lm, sparse_autoencoder(engine, record.slug) as sae:
                return features_on_text(
                    lm,
                    sae,
                    record.hook_name,
                    operation.text,
                    operation.contrast_text,
                    operation.k,
                    frequency=frequency,
                )

        found = engine.compute.run(look)
        rows = [_text_feature(each, found, known) for each in found.features]
    return TextFeatures(
        sae=record.slug,
        tokens=found.tokens,
        rows=rows,
        total=found.n_active,
        shown=len(rows),
        hidden={"dense": found.n_dense_hidden} if found.n_dense_hidden else {},
    )


def _text_feature(each: Any, found: Found, known: Knowledge) -> TextFeature:
    label = known.labels.get(each.feature)
    frequency = None
    if known.sae.extraction is not None:
        try:
            frequency = known.extraction.feature(each.feature).frequency
        except NotFound:
            frequency = None  # the extraction covers a selection only
    return TextFeature(
        ref=FeatureKey(known.sae.slug, each.feature).ref,
        index=each.feature,
        label=label.label if label else None,
        activation_frequency=frequency,
        max=each.max,
        position=each.position,
        token=found.tokens[each.position],
        values=[float(value) for value in each.values],
        contrast_max=each.contrast_max,
        difference=each.difference,
    )
