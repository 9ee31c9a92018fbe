"""Handlers of api/operations/on_text.py: which features fire on a text, filtered like a search."""

from __future__ import annotations

from typing import Any

import numpy as np

from mistudio_engine.api.features import TextFeature, TextFeatures
from mistudio_engine.api.operations.on_text import FeaturesOnText
from mistudio_engine.api.records import SAERecord
from mistudio_engine.discovery.on_text import FeaturesOnText as Found
from mistudio_engine.discovery.on_text import features_on_text
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.registry import handles
from mistudio_engine.handlers.resources import fitting_model, language_model, sparse_autoencoder
from mistudio_engine.handlers.search import where_of
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.feature_rows import Where


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
    where = where_of(operation, record.slug)
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
    row = known.row_of_any(each.feature)
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
