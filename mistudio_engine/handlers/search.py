"""Handlers of api/operations/search.py: features are searched and listed.

Every way of searching is a ranking of what the index holds, so filters, pages and counts of what is hidden are the same
for all. What a ranking is by stands in runtime/ranking.py, and in science where it is about tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound
from mistudio_engine.api.features import FeaturePage, FeatureRow
from mistudio_engine.api.operations.search import FilteredOperation, SearchFeatures
from mistudio_engine.api.records import ExtractionRecord, SAERecord
from mistudio_engine.api.refs import FeatureKey, feature_of
from mistudio_engine.discovery.extraction_store import FEATURES_FILE
from mistudio_engine.discovery.neighbours import cosines, logit_effect, read_effects
from mistudio_engine.handlers.directions import directions, same_space
from mistudio_engine.handlers.knowledge import DATA_FOLDER, LOGITS_FILE, Knowledge
from mistudio_engine.handlers.registry import handles
from mistudio_engine.handlers.search_index import embed_query
from mistudio_engine.models.vocabulary import ids_that_read
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.feature_rows import FeatureHits, Where
from mistudio_engine.runtime.ranking import MAX_WORDS, Ranking, Scores, given, likeness, listed, mean_of, words_in
from mistudio_engine.runtime.snapshot import Snapshot

__all__ = ["where_of"]

QUERY_TOKENS = 16
"""Tokens of a query that promotes and suppresses look for."""


@handles(SearchFeatures)
def search_features(operation: SearchFeatures, engine: Engine) -> FeaturePage:
    if operation.sae is not None:
        with Knowledge.of(engine, operation.sae) as known:
            _ = known.record  # nothing can be found before an extraction: say so
    query = (operation.query or "").strip()
    if operation.like is not None:
        if query:
            raise BadInput("There is a query, and a feature to be like.", fix="Give one of them.")
        hits, note = _like(operation, engine, feature_of(operation.like))
    elif query:
        hits, note = _asked(operation, engine, query)
    elif operation.mode == "auto":
        hits, note = _ranked(operation, engine, listed, mode="list", asked=""), ""
    else:
        what = "like, a feature to start from" if operation.mode == "decoder" else "a query"
        raise EmptyData(
            f"Mode {operation.mode} needs {what}.", fix="Give it, or leave the mode out to list all features."
        )
    notes = (note, _on_dense(hits), _on_unindexed(operation, engine))
    return _page(hits, engine, " ".join(note for note in notes if note))


def _on_dense(hits: FeatureHits) -> str:
    """A note on hidden features that would stand at the top."""
    refs = ", ".join(FeatureKey(hit.sae, hit.index).ref for hit in hits.dense_best)
    return f"Hidden as dense, but among the three best matches: {refs}. include_dense shows them." if refs else ""


def _on_unindexed(operation: SearchFeatures, engine: Engine) -> str:
    """A note on features that no search finds yet, or never did since their indexing was cancelled."""
    assert engine.index is not None
    snapshot, said = engine.index.snapshot(), []
    n_features = {each.slug: each.n_features for each in engine.store.all(ExtractionRecord)}
    for sae in _saes(operation, engine):
        wanted = n_features.get(sae.extraction or "", 0)
        n_indexed = snapshot.n_of_extraction.get((sae.slug, sae.extraction or ""), 0)
        if n_indexed < wanted:
            said.append(f"Only {n_indexed} of the {wanted} features of extraction/{sae.extraction} are in the index.")
    return f"{' '.join(said)} Wait for its job; if none runs, call use_extraction." if said else ""


def _ranked(
    operation: SearchFeatures,
    engine: Engine,
    rank: Callable[[Snapshot], Ranking],
    *,
    mode: str,
    asked: str,
    sae: str | None = None,
) -> FeatureHits:
    assert engine.index is not None
    where = _shown(operation, sae or operation.sae)
    return engine.index.rank(rank, mode=mode, asked=asked, where=where, limit=operation.limit, cursor=operation.cursor)


def where_of(operation: FilteredOperation[Any], sae: str | None) -> Where:
    """What the filters of an operation let through, in one SAE or all."""
    return Where(
        sae=sae,
        category=operation.category,
        label=operation.label,
        labelled=operation.labelled,
        author=operation.author,
        min_confidence=operation.min_confidence,
        dense=None if operation.include_dense else False,
        min_frequency=operation.min_frequency,
        max_frequency=operation.max_frequency,
        min_activation=operation.min_activation,
        max_activation=operation.max_activation,
    )


def _shown(operation: SearchFeatures, sae: str | None) -> Where:
    return where_of(operation, sae).model_copy(update={"dead": None if operation.include_dead else False})


# -- by a query


def _asked(operation: SearchFeatures, engine: Engine, query: str) -> tuple[FeatureHits, str]:
    """What a query finds, and a note on the mode."""
    if operation.mode == "decoder":
        raise BadInput("Directions are compared with a feature's and not with words.", fix="Give like, and no query.")
    if operation.mode in ("token", "promotes", "suppresses"):
        return _by_tokens(operation, engine, query)
    assert engine.index is not None
    embedded = embed_query(engine, query) if operation.mode != "text" else None
    vector = embedded.vector if embedded else None
    reason = embedded.reason if embedded else ""
    if operation.mode == "meaning" and vector is None:
        raise BadInput(
            "Meanings cannot be compared now.",
            why=reason,
            fix='Use mode="text"; or install an embedder, pip install "mistudio[embed]", or set one (set_setting).',
        )
    mode = "meaning" if operation.mode == "meaning" else "hybrid" if vector is not None else "text"
    where = _shown(operation, operation.sae)
    hits = engine.index.search(
        query, mode=mode, vector=vector, where=where, limit=operation.limit, cursor=operation.cursor
    )
    notes = [f"Only words were compared. {reason}"] if reason else []
    if mode != "meaning" and len(words_in(query)) > MAX_WORDS:
        notes.append(f"Only the first {MAX_WORDS} words of the query were looked up.")
    return hits, " ".join(notes)


def _by_tokens(operation: SearchFeatures, engine: Engine, query: str) -> tuple[FeatureHits, str]:
    """Features by what they do on tokens, or to their logits, and a note on what is no token."""
    find = _on_token if operation.mode == "token" else _on_logits
    saes, scores, read, notes = _saes(operation, engine), {}, {}, []
    for sae in saes:
        with Knowledge(engine, sae) as known:
            model = known.record.model
            if model not in read:  # which takes a while: the vocabulary is gone through
                read[model] = _read_tokens(known.tokenizer, query, several=operation.mode != "token")
                notes += _on_tokens(read[model], model)
            if not read[model].ids:
                continue
            found = find(known, read[model], operation.mode)
        if found is None:
            notes.append(f"{sae.ref} has no logit effects, as it does not write into the residual stream.")
        else:
            scores[sae.slug] = found
    # With another extraction the numbers are others: its name is part of what was asked.
    asked = "|".join([query, *(f"{sae.slug}={sae.extraction}" for sae in saes)])
    scores = _as_shares(scores) if operation.mode != "token" else scores
    return _ranked(operation, engine, partial(given, scores=scores), mode=operation.mode, asked=asked), " ".join(notes)


class _Tokens(NamedTuple):
    """What a query is to a tokenizer."""

    named: str
    """The tokens as they are said in an answer."""

    ids: list[set[int]]
    """Those that read as each token."""

    missing: list[str]
    """What of the query is no single token."""

    n_left: int = 0
    """How many words behind these were not looked at."""


def _on_tokens(tokens: _Tokens, model: str) -> list[str]:
    """Notes on what of a query was not looked for."""
    notes = []
    if missing := ", ".join(map(repr, tokens.missing)):
        notes.append(f"Not looked for, as it is no single token of model/{model}: {missing}.")
    if tokens.n_left:
        notes.append(f"Only the first {QUERY_TOKENS} tokens of the query were looked for.")
    return notes


def _read_tokens(tokenizer: Any, query: str, *, several: bool) -> _Tokens:
    whole = ids_that_read(tokenizer, query)
    if whole or not several:
        return _Tokens(repr(query), [whole] if whole else [], [] if whole else [query])
    words = words_in(query)
    read = {text: ids_that_read(tokenizer, text) for text in words[:QUERY_TOKENS]}
    named = repr(" ".join(text for text, ids in read.items() if ids))
    missing = [text for text, ids in read.items() if not ids]
    return _Tokens(named, [ids for ids in read.values() if ids], missing, max(0, len(words) - QUERY_TOKENS))


def _saes(operation: SearchFeatures, engine: Engine) -> list[SAERecord]:
    if operation.sae is not None:
        return [engine.store.get(SAERecord, operation.sae)]
    return [sae for sae in engine.store.all(SAERecord) if sae.extraction is not None]


def _on_token(known: Knowledge, tokens: _Tokens, _: str) -> Scores:
    """Features among whose top tokens the token is, by the share of their activations that is on it."""
    columns = ["feature", "n_active", "token_ids", "token_counts"]
    table = pq.read_table(known.folder / DATA_FOLDER / FEATURES_FILE, columns=columns)
    parents = pc.list_parent_indices(table["token_ids"]).to_numpy()  # type: ignore[attr-defined]
    flat_ids = pc.list_flatten(table["token_ids"]).to_numpy()  # type: ignore[attr-defined]
    counts = pc.list_flatten(table["token_counts"]).to_numpy()  # type: ignore[attr-defined]
    on_token = np.bincount(
        parents, weights=np.where(np.isin(flat_ids, list(tokens.ids[0])), counts, 0), minlength=len(table)
    )
    rows = np.flatnonzero(on_token)
    n_active, on_token = table["n_active"].to_numpy()[rows], on_token[rows]

    def why(at: int) -> str:
        return f"{on_token[at]:.0f} of its {n_active[at]} activations are on {tokens.named}"

    return Scores(table["feature"].to_numpy()[rows], np.minimum(on_token / n_active, 1.0), why)


def _on_logits(known: Knowledge, tokens: _Tokens, mode: str) -> Scores | None:
    """Features among whose strongest logit effects the tokens are, by the sum of those effects; None where none are
    kept.
    """
    path = known.folder / LOGITS_FILE
    if not path.exists():
        return None
    effects = read_effects(path)
    if mode == "promotes":
        effect = logit_effect(effects.promoted_ids, effects.promoted_values, tokens.ids)
    else:
        effect = logit_effect(effects.suppressed_ids, -effects.suppressed_values, tokens.ids)
    rows = np.flatnonzero(effect)
    values = effect[rows]
    verb = "raises" if mode == "promotes" else "lowers"
    return Scores(
        known.extraction.indices[rows], values, lambda at: f"{verb} the logits of {tokens.named} by {values[at]:.2f}"
    )


def _as_shares(scores: dict[str, Scores]) -> dict[str, Scores]:
    largest = max((some.values.max(initial=0.0) for some in scores.values()), default=0.0)
    return {sae: some._replace(values=some.values / largest) for sae, some in scores.items() if largest > 0}


# -- by a feature


def _like(operation: SearchFeatures, engine: Engine, key: FeatureKey) -> tuple[FeatureHits, str]:
    """What is like a feature, and a note on what was not compared."""
    if operation.mode not in ("auto", "meaning", "decoder"):
        raise BadInput(
            f"A feature cannot be compared by {operation.mode}.", fix="Use auto, meaning or decoder with like."
        )
    record, note = engine.store.get(SAERecord, key.sae), ""
    with Knowledge(engine, record) as known:
        known.check_index(key.index)
    if operation.mode == "meaning":
        return _ranked(operation, engine, partial(_alike, key=key), mode="similar", asked=f"meaning {key.ref}"), ""
    if operation.mode == "decoder":
        saes = [engine.store.get(SAERecord, operation.sae or key.sae)]
        same_space(engine, record, saes[0])
    else:
        # What reads another hook, or another model, has only its meaning in common.
        saes = [sae for sae in _saes(operation, engine) if same_space(engine, record, sae, refuse=False)]
        if not directions(engine, record)[key.index].any():
            saes, note = [], f"Only meanings were compared: the decoder row of {key.ref} is zero."
    scores = {sae.slug: _by_decoder(engine, record, key.index, sae) for sae in saes}
    if operation.mode == "decoder":
        rank, sae = partial(given, scores=scores), saes[0].slug
        return _ranked(operation, engine, rank, mode="decoder", asked=key.ref, sae=sae), ""

    def rank_both(snapshot: Snapshot) -> Ranking:
        by_decoder = given(snapshot, scores)
        return mean_of(_alike(snapshot, key, required=False), by_decoder)

    return _ranked(operation, engine, rank_both, mode="similar", asked=key.ref), note


def _alike(snapshot: Snapshot, key: FeatureKey, *, required: bool = True) -> Ranking:
    """Features by the likeness of their labels and top tokens to those of one."""
    place = int(snapshot.places_of(key.sae, np.array([key.index]))[0])
    if place >= 0 and any(vector is not None for vector in snapshot.vectors_of(place)):
        return likeness(snapshot, place)
    if not required:
        return Ranking(np.full(len(snapshot), np.nan), lambda _: [])
    raise EmptyData(
        f"{key.ref} has no meaning to compare.",
        why="It never fired and has no label, it has not been extracted, or there is no text embedder.",
        fix="Use mode=decoder.",
    )


def _by_decoder(engine: Engine, of: SAERecord, index: int, among: SAERecord) -> Scores:
    """Cosines of the decoder rows of an SAE with one row, itself left out; below zero counts as 0."""
    rows = directions(engine, among)
    values = cosines(rows, directions(engine, of)[index]).astype(float)
    indices = np.arange(len(rows))
    if of.slug == among.slug:
        values, indices = np.delete(values, index), np.delete(indices, index)
    return Scores(indices, np.maximum(values, 0.0), lambda at: f"decoder direction alike (cosine {values[at]:.2f})")


# -- pages


def _page(hits: FeatureHits, engine: Engine, note: str) -> FeaturePage:
    opened: dict[str, Knowledge | None] = {}
    rows = []
    for hit in hits.rows:
        if hit.sae not in opened:
            opened[hit.sae] = _still_there(engine, hit.sae, hit.extraction)
        key, known = FeatureKey(hit.sae, hit.index), opened[hit.sae]
        rows.append(
            FeatureRow(
                ref=key.ref,
                id=key.id,
                sae=hit.sae,
                index=hit.index,
                label=hit.label or None,
                category=hit.category if hit.label else None,
                confidence=hit.confidence,
                activation_frequency=hit.frequency,
                max_activation=hit.max_activation,
                mean_activation=known.extraction.feature(hit.index).mean if known else None,
                interpretability=known.interpretability_of(hit.index) if known else None,
                score=hit.score,
                why=hit.why,
            )
        )
    return FeaturePage(
        rows=rows,
        total=hits.total,
        shown=hits.shown,
        next_cursor=hits.next_cursor,
        mode=hits.mode,
        embedder=hits.embedder,
        note=note,
        score_means=hits.score_means,
        hidden=hits.hidden,
        extraction=_only(hit.extraction for hit in hits.rows),
    )


def _still_there(engine: Engine, sae: str, extraction: str) -> Knowledge | None:
    """The SAE, unless it was deleted or extracted anew since the page's version."""
    try:
        known = Knowledge.of(engine, sae)
    except NotFound:
        return None
    return known if known.sae.extraction == extraction else None


def _only(names: Iterable[str]) -> str | None:
    found = set(names)
    return found.pop() if len(found) == 1 else None
