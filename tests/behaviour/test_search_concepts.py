"""The embedded corpus knows its concepts: those that one feature carries are found by describing them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistudio_engine.api.operations import Extract, GetDataset, GetModel, LabelFeatures, SearchFeatures, TrainSAE
from mistudio_engine.api.records import SAERecord
from mistudio_engine.demo.check import carriers
from mistudio_engine.demo.embedded import DEMO_HOOK, DEMO_SAE
from mistudio_engine.handlers import REGISTRY
from mistudio_engine.runtime.engine import Engine
from tests.behaviour.trainings import completed

ENOUGH = 0.8


@pytest.mark.slow
def test_a_described_concept_is_the_first_or_second_hit_for_four_of_five(tmp_path: Path) -> None:
    """Several concepts are carried by dense features, which have to be asked for."""
    engine = Engine(tmp_path / "home", REGISTRY)
    engine.start()
    try:
        engine.wait_ready(120)
        if engine.embedder is None:
            pytest.skip("the extra [embed] is not installed")
        for operation in (
            GetModel(source="embedded", name="embedded"),
            GetDataset(source="embedded", name="corpus", model="embedded", context_size=128),
            TrainSAE(model="embedded", dataset="corpus", hook_name=DEMO_HOOK, name="demo", **DEMO_SAE),
            Extract(sae="demo", n_tokens=60_000),
            LabelFeatures(sae="demo"),
        ):
            completed(engine, operation)
        known = carriers(engine.home / engine.store.get(SAERecord, "demo").folder, DEMO_HOOK)
        assert len(known) >= 12
        for mode in ("meaning", "auto"):
            n_found = 0
            for concept, features in known:
                call = SearchFeatures(query=concept.description, sae="demo", mode=mode, limit=2, include_dense=True)
                n_found += any(row.index in features for row in engine.call(call).rows)
            assert n_found / len(known) >= ENOUGH, mode
    finally:
        engine.stop()
