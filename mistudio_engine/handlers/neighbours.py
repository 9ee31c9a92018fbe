"""Handlers of api/operations/neighbours.py: what is near a feature, by direction, label, logits or co-activation."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound
from mistudio_engine.api.features import Neighbour, NeighbourPage
from mistudio_engine.api.operations.neighbours import Neighbours
from mistudio_engine.api.records import SAERecord
from mistudio_engine.api.refs import FeatureKey
from mistudio_engine.discovery.extraction_store import DENSE_ABOVE
from mistudio_engine.discovery.neighbours import cosines, extremes, logit_cosines, read_effects
from mistudio_engine.handlers.directions import directions, same_space
from mistudio_engine.handlers.knowledge import LOGITS_FILE, Knowledge
from mistudio_engine.handlers.registry import handles
from mistudio_engine.runtime.engine import Engine

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
                **others.row_of_any(index).model_dump(), sign=sign, value=float(values[index]), **matched.get(index, {})
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
