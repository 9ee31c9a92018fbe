"""Handlers of api/operations/features.py: features are searched, listed, read, compared, and looked for on a text.

Every way of searching is a ranking of what the index holds, so filters, pages and counts of what is hidden are the same
for all. What a ranking is by stands in runtime/ranking.py, and in science where it is about tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound
from mistudio_engine.api.feature_card import FeatureCard
from mistudio_engine.api.features import (
    FeaturePage,
    FeatureRow,
    Neighbour,
    NeighbourPage,
    TextFeature,
    TextFeatures,
)
from mistudio_engine.api.operations.ablation import ShowAblation
from mistudio_engine.api.operations.analysis import ShowAnalysis
from mistudio_engine.api.operations.features import FeaturesOnText, GetFeature, Neighbours, SearchFeatures
from mistudio_engine.api.records import ExtractionRecord, SAERecord
from mistudio_engine.api.refs import FeatureKey, feature_of
from mistudio_engine.discovery.extraction_store import DENSE_ABOVE, FEATURES_FILE
from mistudio_engine.discovery.neighbours import cosines, extremes, logit_cosines, logit_effect, read_effects
from mistudio_engine.discovery.on_text import FeaturesOnText as Found
from mistudio_engine.discovery.on_text import features_on_text
from mistudio_engine.handlers.directions import directions, same_space
from mistudio_engine.handlers.knowledge import DATA_FOLDER, LOGITS_FILE, Knowledge
from mistudio_engine.handlers.registry import handles
from mistudio_engine.handlers.resources import fitting_model, language_model, sparse_autoencoder
from mistudio_engine.handlers.search_index import embed_query
from mistudio_engine.models.vocabulary import ids_that_read
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.feature_rows import FeatureHits, Where
from mistudio_engine.runtime.ranking import Ranking, Scores, given, likeness, listed, mean_of
from mistudio_engine.runtime.snapshot import Snapshot

NEIGHBOURS_ON_CARD = 5
"""Of each sign."""

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
        hits, note = _like(operation, engine, feature_of(operation.like)), ""
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
    where = _where(operation, sae or operation.sae)
    return engine.index.rank(rank, mode=mode, asked=asked, where=where, limit=operation.limit, cursor=operation.cursor)


def _where(operation: SearchFeatures | FeaturesOnText, sae: str | None) -> Where:
    dead = None if isinstance(operation, SearchFeatures) and operation.include_dead else False
    return Where(
        sae=sae,
        category=operation.category,
        label=operation.label,
        labelled=operation.labelled,
        author=operation.author,
        min_confidence=operation.min_confidence,
        dense=None if operation.include_dense else False,
        dead=dead,
        min_frequency=operation.min_frequency,
        max_frequency=operation.max_frequency,
        min_activation=operation.min_activation,
        max_activation=operation.max_activation,
    )


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
    where = _where(operation, operation.sae)
    hits = engine.index.search(
        query, mode=mode, vector=vector, where=where, limit=operation.limit, cursor=operation.cursor
    )
    return hits, f"Only words were compared. {reason}" if reason else ""


def _by_tokens(operation: SearchFeatures, engine: Engine, query: str) -> tuple[FeatureHits, str]:
    """Features by what they do on tokens, or to their logits, and a note on what is no token."""
    find = _on_token if operation.mode == "token" else _on_logits
    saes, scores, read, notes = _saes(operation, engine), {}, {}, []
    for sae in saes:
        with Knowledge(engine, sae) as known:
            model = known.record.model
            if model not in read:  # which takes a while: the vocabulary is gone through
                read[model] = _read_tokens(known.tokenizer, query, several=operation.mode != "token")
                if missing := ", ".join(map(repr, read[model].missing)):
                    notes.append(f"Not looked for, as it is no single token of model/{model}: {missing}.")
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


def _read_tokens(tokenizer: Any, query: str, *, several: bool) -> _Tokens:
    whole = ids_that_read(tokenizer, query)
    if whole or not several:
        return _Tokens(repr(query), [whole] if whole else [], [] if whole else [query])
    read = {text: ids_that_read(tokenizer, text) for text in query.split()[:QUERY_TOKENS]}
    named = repr(" ".join(text for text, ids in read.items() if ids))
    return _Tokens(named, [ids for ids in read.values() if ids], [text for text, ids in read.items() if not ids])


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


def _like(operation: SearchFeatures, engine: Engine, key: FeatureKey) -> FeatureHits:
    if operation.mode not in ("auto", "meaning", "decoder"):
        raise BadInput(
            f"A feature cannot be compared by {operation.mode}.", fix="Use auto, meaning or decoder with like."
        )
    record = engine.store.get(SAERecord, key.sae)
    with Knowledge(engine, record) as known:
        known.check_index(key.index)
    if operation.mode == "meaning":
        return _ranked(operation, engine, partial(_alike, key=key), mode="similar", asked=f"meaning {key.ref}")
    if operation.mode == "decoder":
        saes = [engine.store.get(SAERecord, operation.sae or key.sae)]
        same_space(engine, record, saes[0])
    else:
        # What reads another hook, or another model, has only its meaning in common.
        saes = [sae for sae in _saes(operation, engine) if same_space(engine, record, sae, refuse=False)]
    scores = {sae.slug: _by_decoder(engine, record, key.index, sae) for sae in saes}
    if operation.mode == "decoder":
        rank, sae = partial(given, scores=scores), saes[0].slug
        return _ranked(operation, engine, rank, mode="decoder", asked=key.ref, sae=sae)

    def rank_both(snapshot: Snapshot) -> Ranking:
        by_decoder = given(snapshot, scores)
        return mean_of(_alike(snapshot, key, required=False), by_decoder)

    return _ranked(operation, engine, rank_both, mode="similar", asked=key.ref)


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


@handles(GetFeature)
def get_feature(operation: GetFeature, engine: Engine) -> FeatureCard:
    with Knowledge.of(engine, operation.sae) as known:
        card = known.card(
            operation.index, n=operation.n, sampling=operation.sampling, window=operation.window, bins=operation.bins
        )
    sae, index = operation.sae, operation.index
    if operation.analysis:
        card.analysis = engine.call(ShowAnalysis(sae=sae, index=index))
    if operation.neighbours:
        card.neighbours = engine.call(Neighbours(sae=sae, index=index, n=NEIGHBOURS_ON_CARD)).rows
    if operation.ablation:
        with suppress(NotFound):
            card.ablation = engine.call(ShowAblation(sae=sae, index=index))
    return card


# -- neighbours

VALUE_MEANS = {
    "decoder": "Cosine of the decoder directions, -1 to 1.",
    "label": "Cosine of the label vectors, -1 to 1; it tells how alike the labels are, not what the features do.",
    "logits": "Cosine of the logit effects that were kept, the tokens that each promotes and suppresses most, -1 to 1.",
    "coactivation": "Tokens on which both fire, as a share: count / √(n · n'), 0 to 1, on the tokens sampled.",
}


@handles(Neighbours)
def neighbours(operation: Neighbours, engine: Engine) -> NeighbourPage:
    record = engine.store.get(SAERecord, operation.sae)
    other = record if operation.other_sae is None else engine.store.get(SAERecord, operation.other_sae)
    with Knowledge(engine, record) as known, Knowledge(engine, other) as others:
        known.check_index(operation.index)
        matched: dict[int, dict[str, Any]] = {}
        if operation.by == "coactivation":
            values, matched = _together(known, others, operation.index)
        elif operation.by == "label":
            values = _by_label(engine, known, others, operation.index)
        elif operation.by == "logits":
            values = _by_logits(known, others, operation.index)
        else:
            same_space(engine, record, other)
            values = cosines(directions(engine, other), directions(engine, record)[operation.index]).astype(float)
        if other.slug == record.slug:
            values[operation.index] = np.nan
        values = np.round(values, 6)
        among, hidden = _shown(others, values, operation)
        found = extremes(values, operation.n, among)
        ends: tuple[tuple[Literal["similar", "opposite"], list[int]], ...] = (
            ("similar", found.highest.tolist()),
            ("opposite", found.lowest.tolist()),
        )
        rows = [
            Neighbour(
                **_row(others, index).model_dump(), sign=sign, value=float(values[index]), **matched.get(index, {})
            )
            for sign, indices in ends
            for index in indices
        ]
        return NeighbourPage(
            ref=FeatureKey(record.slug, operation.index).ref,
            by=operation.by,
            value_means=VALUE_MEANS[operation.by],
            rows=rows,
            total=int((~np.isnan(values)).sum()),
            shown=len(rows),
            hidden=hidden,
            embedder=engine.index.embedder if operation.by == "label" and engine.index else None,
            extraction=other.extraction,
        )


def _by_label(engine: Engine, known: Knowledge, others: Knowledge, index: int) -> np.ndarray:
    """(d_sae,) cosines of label vectors; nan without a label."""
    assert engine.index is not None
    if index not in known.labels:
        raise EmptyData(
            f"{FeatureKey(known.sae.slug, index).ref} has no label.",
            fix="Label it first, or ask for its neighbours by decoder.",
            next_call=("label_features", {"sae": known.sae.slug, "features": [index]}),
        )
    snapshot = engine.index.snapshot()
    place = int(snapshot.places_of(known.sae.slug, np.array([index]))[0])
    vector = snapshot.vectors_of(place)[0] if place >= 0 else None
    if vector is None:
        raise EmptyData(
            "Labels cannot be compared by meaning.",
            why="There is no text embedder, or the feature has not been extracted.",
            fix='Install one, pip install "mistudio[embed]", or ask for neighbours by decoder.',
        )
    values = np.full(others.sae.d_sae, np.nan)
    places = snapshot.places_of(others.sae.slug, np.arange(len(values)))
    here = places >= 0
    values[here] = snapshot.cosines(vector)[0][places[here]]
    return values


def _by_logits(known: Knowledge, others: Knowledge, index: int) -> np.ndarray:
    """(d_sae,) cosines of logit effects; nan where there are none."""
    if known.record.model != others.record.model:
        raise BadInput(
            f"{known.sae.ref} and {others.sae.ref} act on the logits of different models.",
            why=f"One is of model/{known.record.model}, the other of model/{others.record.model}.",
            fix="Compare SAEs of one model.",
        )
    paths = [each.folder / LOGITS_FILE for each in (known, others)]
    for each, path in zip((known, others), paths, strict=True):
        if not path.exists():
            raise NotFound(
                f"No logit effects of {each.sae.ref} are kept.",
                why="It does not write into the residual stream.",
                fix="Ask for its neighbours by decoder.",
            )
    known.extraction.feature(index)  # which says if the extraction was of other features
    row = int(np.searchsorted(known.extraction.indices, index))
    values = np.full(others.sae.d_sae, np.nan)
    values[others.extraction.indices] = logit_cosines(read_effects(paths[0]), row, read_effects(paths[1]))
    return values


def _together(known: Knowledge, others: Knowledge, index: int) -> tuple[np.ndarray, dict[int, dict[str, Any]]]:
    """(d_sae,) how often each fires together with one; nan where the extraction kept no such pair. And the counts."""
    if known.sae.slug != others.sae.slug:
        raise BadInput("Only features of one SAE were counted together.", fix="Leave other_sae out.")
    values, matched = np.full(known.sae.d_sae, np.nan), {}
    for partner in known.extraction.partners(index, known.sae.d_sae):
        values[partner.feature] = partner.cosine
        matched[partner.feature] = {"count": partner.count, "lift": partner.lift}
    return values, matched


def _shown(others: Knowledge, values: np.ndarray, operation: Neighbours) -> tuple[np.ndarray, dict[str, int]]:
    """(d_sae,) which features are shown, and how many are not."""
    among, hidden = ~np.isnan(values), {}
    if others.sae.extraction is None:
        return among, hidden
    frequency = np.full(len(values), np.nan)  # of a feature that was not extracted nobody knows
    frequency[others.extraction.indices] = others.extraction.frequency
    dense = np.zeros(len(values), bool)
    dense[others.extraction.indices] = others.extraction.frequency > DENSE_ABOVE
    for reason, out, wanted in (
        ("dead", frequency == 0, operation.include_dead),
        ("dense", dense, operation.include_dense),
    ):
        if not wanted and (n_out := int((among & out).sum())):
            hidden[reason] = n_out
            among &= ~out
    return among, hidden


def _row(known: Knowledge, index: int) -> FeatureRow:
    """A feature in a list, with what is known of it."""
    if known.sae.extraction is not None:
        try:
            return known.row(index)
        except NotFound:
            pass  # the extraction covers a selection only
    return known.named(index)


# -- on a text


@handles(FeaturesOnText)
def on_text(operation: FeaturesOnText, engine: Engine) -> TextFeatures:
    record = engine.store.get(SAERecord, operation.sae)
    model = fitting_model(engine, record)
    with Knowledge(engine, record) as known:
        leave_out = _left_out(operation, engine, record)

        def look() -> Found:
            with language_model(engine, model.slug) as lm, sparse_autoencoder(engine, record.slug) as sae:
                return features_on_text(
                    lm,
                    sae,
                    record.hook_name,
                    operation.text,
                    operation.contrast_text,
                    operation.k,
                    leave_out=leave_out,
                )

        found = engine.compute.run(look)
        rows = [_text_feature(each, found, known) for each in found.features]
    return TextFeatures(
        sae=record.slug,
        tokens=found.tokens,
        rows=rows,
        total=found.n_active,
        shown=len(rows),
        hidden=found.left_out,
    )


def _left_out(operation: FeaturesOnText, engine: Engine, record: SAERecord) -> dict[str, np.ndarray]:
    """(d_sae,) the features that are not shown, by reason. What was never extracted is only left out by a filter."""
    assert engine.index is not None
    where = _where(operation, record.slug).model_copy(update={"dead": None})
    rest = where.model_copy(update={"dense": None, "min_confidence": None})
    filters = {name: value for name, value in rest.model_dump().items() if value is not None and name != "sae"}
    if record.extraction is None:
        if filters or where.min_confidence is not None:
            with Knowledge(engine, record) as known:
                _ = known.record  # raises: there is nothing to filter by
        return {}
    snapshot = engine.index.snapshot()
    places = snapshot.places_of(record.slug, np.arange(record.d_sae))

    def without(condition: Where, unknown: bool) -> np.ndarray:
        out = np.full(record.d_sae, unknown)
        out[places >= 0] = ~snapshot.mask(condition)[places[places >= 0]]
        return out

    left_out = {}
    if where.dense is not None:
        left_out["dense"] = without(Where(dense=False), unknown=False)
    if where.min_confidence is not None:
        left_out["badly_scored"] = without(Where(min_confidence=where.min_confidence), unknown=True)
    if filters:
        left_out["filtered"] = without(rest, unknown=True)
    return left_out


def _text_feature(each: Any, found: Found, known: Knowledge) -> TextFeature:
    row = _row(known, each.feature)
    return TextFeature(
        ref=row.ref,
        index=each.feature,
        label=row.label,
        confidence=row.confidence,
        activation_frequency=row.activation_frequency,
        max=each.max,
        position=each.position,
        token=found.tokens[each.position],
        values=[float(value) for value in each.values],
        contrast_max=each.contrast_max,
        difference=each.difference,
    )
