"""Features are taken away and tried on texts, through every door."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mistudio_engine.api.errors import BadInput, NotFound
from mistudio_engine.api.operations import (
    AblateFeatures,
    DeleteSAE,
    Extract,
    FeaturesOnText,
    GetFeature,
    GetSAE,
    SearchFeatures,
    ShowAblation,
)
from mistudio_engine.api.operations import TestFeature as TryFeature
from mistudio_engine.api.records import SAERecord
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.saes import load_sae, save_sae
from tests.behaviour.doors import Served
from tests.behaviour.trainings import completed, until

TEXTS = ["The cat sat on the mat.", "She put three red apples into the basket.", "It rained all day in the town."]


def alive(engine: Engine, n: int) -> list[int]:
    return [row.index for row in engine.call(SearchFeatures(sae="first", limit=n, include_dense=True)).rows]


def test_features_are_ablated_on_their_own_examples_beside_controls(studio: Served) -> None:
    engine = studio.engine
    features = alive(engine, 3)
    job = completed(engine, AblateFeatures(sae="first", features=features, n_contexts=6, n_after=8, n_controls=2))
    assert job.result is not None
    assert job.result["n_features"] == 3 and job.result["n_silent"] == 0
    assert {row["index"] for row in job.result["rows"]} == set(features)
    effects = [row["kl_after"] for row in job.result["rows"]]
    assert effects == sorted(effects, reverse=True) and effects[-1] > 0
    found = engine.call(ShowAblation(sae="first", index=features[0]))
    assert found.author == f"job:{job.slug}" and found.created_at > 0
    assert found.source == "extraction" and found.n_texts == 6 and found.n_silent == 0
    assert len(found.controls) == 2 and features[0] not in found.controls
    assert found.kl_after is not None and found.kl_after.low <= found.kl_after.mean <= found.kl_after.high
    assert found.lens is not None and -1 <= (found.lens.correlation or 0) <= 1
    for text in found.texts:
        assert text.context is not None
        assert len(text.tokens) == len(text.activations) == len(text.loss) == len(text.kl)
        first = int(np.argmax(np.array(text.activations) > 0))
        assert not any(text.kl[:first]) and max(text.kl) > 0
    card = engine.call(GetFeature(sae="first", index=features[0], n=100, window=500))
    of_context = {example.context: example for example in card.examples or []}
    shown = next(text for text in found.texts if text.context in of_context)
    assert shown.tokens == of_context[shown.context].tokens[: len(shown.tokens)]


def test_a_feature_that_writes_nothing_is_no_control(studio: Served, tmp_path: Path) -> None:
    """Of its twin's living features four have a direction: the other three are the controls."""
    engine = studio.engine
    sae = load_sae(engine.home / engine.store.get(SAERecord, "first").folder)
    writing = alive(engine, 4)
    sae.W_dec[[index for index in range(sae.cfg.d_sae) if index not in writing]] = 0
    completed(engine, GetSAE(source=str(save_sae(sae, tmp_path / "twin")), name="twin", model="tiny"))
    completed(engine, Extract(sae="twin", dataset="corpus", n_tokens=8192))
    completed(engine, AblateFeatures(sae="twin", features=writing[:1], n_contexts=2, n_controls=8))
    found = engine.call(ShowAblation(sae="twin", index=writing[0]))
    assert found.controls == sorted(writing[1:]) and found.excess_kl is not None
    engine.call(DeleteSAE(sae="twin"))


def test_features_are_ablated_on_given_texts(studio: Served) -> None:
    engine = studio.engine
    index = engine.call(FeaturesOnText(sae="first", text=TEXTS[0], k=1)).rows[0].index
    completed(engine, AblateFeatures(sae="first", features=[index], texts=TEXTS, n_controls=0))
    found = engine.call(ShowAblation(sae="first", index=index))
    assert found.source == "given" and found.n_texts == 3 and found.controls == []
    assert found.control_kl_after is None and found.excess_kl is None
    assert found.n_firing > 0


def test_a_killed_job_does_not_measure_again_what_it_has_kept(studio: Served) -> None:
    """The job of an engine that was killed is run again by the next with the same name: here that name runs twice."""
    from mistudio_engine.handlers.ablation import run_ablate_features
    from mistudio_engine.runtime.jobs import JobContext

    engine = studio.engine
    operation = AblateFeatures(sae="first", features=alive(engine, 2), n_contexts=2, n_controls=1)
    job = completed(engine, operation)
    before = [engine.store.findings("first", index, "ablation") for index in operation.features]
    context = JobContext(job, engine.home / "jobs" / job.slug, engine.bus.publish)
    steps: list[object] = []

    def again():
        work = run_ablate_features(operation, engine, context)
        while True:
            try:
                steps.append(next(work))
            except StopIteration as stop:
                return stop.value
            yield

    report = engine.compute.interactive(again()).result(60)
    assert report.model_dump() == job.result
    assert len(steps) == 2, "a step a feature: no forward pass"
    assert [engine.store.findings("first", index, "ablation") for index in operation.features] == before


def test_a_cancelled_ablation_keeps_what_it_has_and_leaves_the_model_alone(studio: Served) -> None:
    engine = studio.engine
    before = engine.call(FeaturesOnText(sae="first", text=TEXTS[1], k=5)).model_dump()
    features = alive(engine, 64)
    job = engine.call(AblateFeatures(sae="first", features=features, n_contexts=64, n_controls=16, seed=3))
    until(lambda: engine.jobs.get(job.slug).progress, "the first step")
    engine.jobs.control(job.slug, "cancel")
    assert engine.jobs.wait(job.slug, 10).state == "cancelled"
    assert engine.call(FeaturesOnText(sae="first", text=TEXTS[1], k=5)).model_dump() == before


def test_a_dry_run_measures_nothing(studio: Served) -> None:
    index = alive(studio.engine, 1)[0]
    before = studio.engine.store.findings("first", index, "ablation")
    job = studio.engine.call(AblateFeatures(sae="first", features=[index], dry_run=True, n_contexts=4, n_controls=3))
    assert job.plan is not None and job.plan.details == {"n_features": 1, "n_forward_rows": 20}
    assert studio.engine.store.findings("first", index, "ablation") == before


def test_what_cannot_be_ablated_is_refused_with_advice(studio: Served) -> None:
    with pytest.raises(NotFound, match="no feature 128"):
        studio.engine.call(AblateFeatures(sae="first", features=[128]))
    with pytest.raises(ValueError, match="leave them out when texts are given"):
        AblateFeatures(sae="first", features=[1], texts=["a"], n_contexts=3)
    dead = next(i for i in range(128) if not studio.engine.store.findings("first", i, "ablation"))
    with pytest.raises(NotFound, match="has not been ablated") as raised:
        studio.engine.call(ShowAblation(sae="first", index=dead))
    assert raised.value.next_call is not None and raised.value.next_call.tool == "ablate_features"


def test_a_feature_is_tested_on_texts(studio: Served) -> None:
    engine = studio.engine
    row = engine.call(FeaturesOnText(sae="first", text=TEXTS[1], k=1, include_dense=True)).rows[0]
    found = engine.call(TryFeature(feature=row.ref, texts=TEXTS))
    assert found.rows[1].max == pytest.approx(row.max, rel=1e-4)
    assert (found.rows[1].position, found.rows[1].token) == (row.position, row.token)
    assert found.rows[1].fired and found.n_fired == sum(each.fired for each in found.rows)
    assert found.known_max and found.rows[1].share_of_max == pytest.approx(row.max / found.known_max, rel=1e-4)
    assert found.auroc is None and found.precision is None and found.n_expected is None
    assert engine.store.findings("first", row.index, "test") == []


def test_expectations_are_judged(studio: Served) -> None:
    engine = studio.engine
    index = alive(engine, 1)[0]
    maxima = [each.max for each in engine.call(TryFeature(feature=f"first#{index}", texts=TEXTS)).rows]
    best = int(np.argmax(maxima))
    right = [n == best for n in range(3)]
    assert engine.call(TryFeature(feature=f"first#{index}", texts=TEXTS, expected=right)).auroc == 1.0
    wrong = engine.call(TryFeature(feature=f"first#{index}", texts=TEXTS, expected=[not each for each in right]))
    assert wrong.auroc is not None and wrong.auroc <= 0.5 and wrong.n_expected == 2
    share = (sorted(maxima)[-1] + sorted(maxima)[-2]) / 2 / (wrong.known_max or 1)
    strict = engine.call(TryFeature(feature=f"first#{index}", texts=TEXTS, expected=right, min_share=min(share, 1.0)))
    assert (strict.n_fired, strict.precision, strict.recall) == (1, 1.0, 1.0)


def test_expectations_are_as_many_as_texts() -> None:
    with pytest.raises(ValueError, match="2 entries for 1 texts"):
        TryFeature(feature="first#1", texts=["a"], expected=[True, False])


def test_a_text_without_tokens_is_refused_by_its_number(studio: Served) -> None:
    with pytest.raises(BadInput, match="Text 1 has"):
        studio.engine.call(TryFeature(feature="first#1", texts=["fine", "word " * 3000]))


def test_both_are_there_over_rest(studio: Served) -> None:
    index = alive(studio.engine, 1)[0]
    with studio.http(headers=studio.headers) as http:
        tested = http.post(f"/api/v1/features/first:{index}/test", json={"texts": TEXTS})
        assert tested.status_code == 200 and len(tested.json()["rows"]) == 3
        started = http.post("/api/v1/features/ablation", json={"sae": "first", "features": [index], "wait_s": 40})
        assert started.json()["state"] == "completed"
        shown = http.get(f"/api/v1/saes/first/features/{index}/ablation")
        assert shown.json()["index"] == index and shown.json()["kl_after"]["mean"] >= 0
    assert torch.is_grad_enabled()
