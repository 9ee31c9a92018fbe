"""Handler of ShowHealth: what is known of all features of an SAE together."""

from __future__ import annotations

import numpy as np
import torch

from mistudio_engine.api.health import DictionaryHealth
from mistudio_engine.api.operations.extractions import ShowHealth
from mistudio_engine.discovery.extraction_store import DENSE_ABOVE
from mistudio_engine.discovery.health import DUPLICATE_ABOVE, findings, nearest_cosines, quantiles
from mistudio_engine.handlers.directions import directions
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.registry import handles
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.training.metrics import density_histogram

__all__: list[str] = []

RARE_BELOW = 10
"""Tokens: a feature that fired less often has too few examples to be sure of anything."""


@handles(ShowHealth)
def show_health(operation: ShowHealth, engine: Engine) -> DictionaryHealth:
    with Knowledge.of(engine, operation.sae) as known:
        record, store = known.record, known.extraction
        n_active, frequency = store.n_active, store.frequency
        alive = store.indices[n_active > 0]
        duplicates = nearest_cosines(directions(engine, known.sae), alive)
        n = max(len(store), 1)
        n_rare = int(((n_active > 0) & (n_active < RARE_BELOW)).sum())
        n_near = int((duplicates.cosine > DUPLICATE_ABOVE).sum())
        confidences = [label.confidence for label in known.labels.values()]
        interpretability = quantiles(known.interpretability)
        shares = {
            "dead": 1 - record.n_alive / n,
            "dense": record.n_dense / n,
            "rare": n_rare / max(record.n_alive, 1),
            # Of a selection it says nothing: other features may fire there.
            "silent": record.l0.get("silent") if record.n_features == known.sae.d_sae else None,
            "duplicates": n_near / len(duplicates.cosine) if len(duplicates.cosine) else None,
            "interpretability": interpretability["p50"] if interpretability else None,
        }
        return DictionaryHealth(
            sae=known.sae.ref,
            extraction=record.slug,
            n_tokens=record.n_tokens,
            n_features=record.n_features,
            n_alive=record.n_alive,
            n_dead=record.n_features - record.n_alive,
            n_dense=record.n_dense,
            dense_above=DENSE_ABOVE,
            n_rare=n_rare,
            l0=record.l0,
            density_histogram=density_histogram(torch.from_numpy(frequency.astype(np.float64))),
            interpretability=interpretability,
            n_labelled=len(known.labels),
            confidence=quantiles([np.nan if each is None else each for each in confidences]),
            nearest_cosine=quantiles(duplicates.cosine),
            n_compared=len(duplicates.cosine),
            n_near_duplicates=n_near,
            findings=findings(shares),
        )
