"""Handlers of api/operations/features.py: a feature is read, with whatever is known of it."""

from __future__ import annotations

from contextlib import suppress

from mistudio_engine.api.errors import NotFound
from mistudio_engine.api.feature_card import FeatureCard
from mistudio_engine.api.operations.ablation import ShowAblation
from mistudio_engine.api.operations.analysis import ShowAnalysis
from mistudio_engine.api.operations.features import GetFeature
from mistudio_engine.api.operations.neighbours import Neighbours
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.registry import handles
from mistudio_engine.runtime.engine import Engine

NEIGHBOURS_ON_CARD = 5
"""Of each sign."""


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
