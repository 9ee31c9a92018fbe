"""The embedded corpus knows its concepts: those that one feature carries are found by describing them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mistudio_engine.api.operations import Extract, GetDataset, GetModel, LabelFeatures, SearchFeatures, TrainSAE
from mistudio_engine.api.records import SAERecord
from mistudio_engine.demo.check import FOUND_AT, held_out_tokens
from mistudio_engine.demo.concepts import CONCEPTS, Concept
from mistudio_engine.demo.embedded import DEMO_HOOK, DEMO_SAE, model_folder
from mistudio_engine.demo.truth import areas_of, concept_scores, mean_ranks
from mistudio_engine.handlers import REGISTRY
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.saes import load_sae
from tests.behaviour.trainings import completed

ENOUGH = 0.8


def carriers(folder: Path) -> list[tuple[Concept, set[int]]]:
    """The concepts that single features carry, with those features, on text that nobody has trained on."""
    held_out = held_out_tokens(LanguageModel.load(model_folder(), name="embedded"), DEMO_HOOK)
    with torch.no_grad():
        acts = load_sae(folder).encode(held_out.sae_in)
    choosing = held_out.document % 2 == 0
    scores = concept_scores(acts, held_out.sae_in, held_out.masks, choosing)
    ranks = mean_ranks(acts[~choosing])
    found = []
    for concept, score, mask in zip(CONCEPTS, scores, held_out.masks.T, strict=True):
        if score.single > FOUND_AT:
            carrying = (areas_of(ranks, mask[~choosing]) > FOUND_AT).nonzero().squeeze(1)
            found.append((concept, {score.feature, *carrying.tolist()}))
    return found


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
        known = carriers(engine.home / engine.store.get(SAERecord, "demo").folder)
        assert len(known) >= 12
        for mode in ("meaning", "auto"):
            n_found = 0
            for concept, features in known:
                call = SearchFeatures(query=concept.description, sae="demo", mode=mode, limit=2, include_dense=True)
                n_found += any(row.index in features for row in engine.call(call).rows)
            assert n_found / len(known) >= ENOUGH, mode
    finally:
        engine.stop()
