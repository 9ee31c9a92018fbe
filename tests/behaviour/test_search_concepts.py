"""The embedded corpus knows its concepts: those that one feature carries are found by describing them."""

from __future__ import annotations

import re
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

SAE = {**DEMO_SAE, "n_tokens": 350_000}
"""The demo's, trained for two thirds as long: it carries as many concepts."""


@pytest.mark.slow
def test_a_described_concept_is_the_first_or_second_hit_for_four_of_five(tmp_path: Path) -> None:
    """Concepts that hold on over a tenth of the tokens have dense carriers: an answer that hides those names them."""
    engine = Engine(tmp_path / "home", REGISTRY)
    engine.start()
    try:
        engine.wait_ready(120)
        if engine.embedder is None:
            pytest.skip("the extra [embed] is not installed")
        for operation in (
            GetModel(source="embedded", name="embedded"),
            GetDataset(source="embedded", name="corpus", model="embedded", context_size=128, n_tokens=200_000),
            TrainSAE(model="embedded", dataset="corpus", hook_name=DEMO_HOOK, name="demo", **SAE),
            Extract(sae="demo", n_tokens=40_000),
            LabelFeatures(sae="demo"),
        ):
            completed(engine, operation)
        known = carriers(engine.home / engine.store.get(SAERecord, "demo").folder, DEMO_HOOK)
        assert len(known) >= 12
        for mode in ("meaning", "auto"):
            n_found = n_named = 0
            for concept, features in known:
                call = SearchFeatures(query=concept.description, sae="demo", mode=mode, limit=2)
                everything = engine.call(call.model_copy(update={"include_dense": True}))
                n_found += any(row.index in features for row in everything.rows)
                by_default = engine.call(call)
                shown = {row.index for row in by_default.rows} | set(map(int, re.findall(r"#(\d+)", by_default.note)))
                n_named += bool(shown & features)
            assert n_found / len(known) >= ENOUGH, mode
            assert n_named / len(known) >= ENOUGH, mode
    finally:
        engine.stop()
