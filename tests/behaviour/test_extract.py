"""Extractions as users have them: several SAEs in a pass, filters, templates, earlier ones used again or deleted."""

from __future__ import annotations

import gc
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from mistudio_engine.api.errors import BadInput, Conflict, NotFound
from mistudio_engine.api.operations import (
    DeleteExtraction,
    DeleteSAE,
    Extract,
    GetFeature,
    GetSAE,
    LabelFeatures,
    ListExtractions,
    SaveTemplate,
    SearchFeatures,
    ShowExtraction,
    ShowHealth,
    ShowSAE,
    TrainSAE,
    UseExtraction,
)
from mistudio_engine.api.records import Job, TokensRecord
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.discovery.extraction import load_extraction
from mistudio_engine.handlers.extractions import run_use_extraction
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import load_sae, save_sae
from tests.behaviour.doors import Served
from tests.behaviour.trainings import SHORT, completed, steered, until

SAE: dict[str, Any] = {"model": "tiny", "dataset": "corpus", "d_sae": 64, "k": 8, "hyperparameters": SHORT}
N_TOKENS = 5120


@pytest.fixture(scope="module")
def engine(studio: Served) -> Engine:
    """With `low` and `high`, two small SAEs of one model."""
    completed(studio.engine, TrainSAE(**SAE, hook_name=DEMO_HOOK, name="high"))
    completed(studio.engine, TrainSAE(**SAE, hook_name="blocks.1.hook_resid_post", name="low"))
    return studio.engine


def extracted(engine: Engine, **arguments: Any) -> Job:
    return completed(engine, Extract(**{"sae": "high", "n_tokens": N_TOKENS, **arguments}))


def current(engine: Engine, sae: str) -> str | None:
    return engine.call(ShowSAE(sae=sae)).extraction


def files_of(engine: Engine, extraction: str) -> dict[str, str]:
    record = engine.call(ShowExtraction(extraction=extraction))
    return load_extraction(engine.home / record.folder / "data").info.files


def test_one_pass_feeds_several_saes_as_if_each_had_been_alone(engine: Engine) -> None:
    job = extracted(engine, also=["low"])
    assert job.result is not None
    first, (second,) = job.result, job.result["also"]
    assert (first["sae"], second["sae"]) == ("high", "low")
    assert current(engine, "high") == first["slug"] and current(engine, "low") == second["slug"]
    assert "2 SAEs in one pass" in (job.plan.summary if job.plan else "")
    alone = extracted(engine, sae="low")
    assert alone.result is not None
    assert files_of(engine, alone.result["slug"]) == files_of(engine, second["slug"])
    assert engine.call(SearchFeatures(sae="low", limit=1)).total > 0


def test_the_record_says_what_a_reader_should_know(engine: Engine) -> None:
    record = extracted(engine).result
    assert record is not None
    assert record["n_features"] == 64 and 0 < record["n_alive"] <= 64
    assert record["l0"]["mean"] == pytest.approx(8, abs=0.5) and record["l0"]["max"] <= 8
    assert record["tokens_per_second"] > 0 and record["job"].startswith("extract-")
    planned = engine.call(Extract(sae="high", n_tokens=N_TOKENS, dry_run=True)).plan
    assert planned is not None and planned.seconds is not None and planned.memory_bytes > 0


def test_a_card_has_partners_logits_and_an_interpretability_score(engine: Engine) -> None:
    extracted(engine)
    rows = engine.call(SearchFeatures(sae="high", limit=5)).rows
    for row in rows:
        card = engine.call(GetFeature(sae="high", index=row.index))
        assert card.interpretability is None or 0 <= card.interpretability <= 1
        assert card.partners and all(0 < partner.cosine <= 1 for partner in card.partners)
        assert [partner.cosine for partner in card.partners] == sorted(
            (partner.cosine for partner in card.partners), reverse=True
        )
        assert card.logit_histogram is not None and card.promoted
        assert card.logit_histogram.bin_edges[-1] == pytest.approx(card.promoted[0].value)
    assert any(row.interpretability is not None for row in rows)


def test_tokens_that_are_left_out_are_in_no_list_and_the_window_is_kept(engine: Engine) -> None:
    before = extracted(engine).result
    without = extracted(engine, exclude_tokens=["the", "."], exclude_first=2, window=3).result
    assert before is not None and without is not None
    assert without["n_tokens"] < before["n_tokens"]
    for row in engine.call(SearchFeatures(sae="high", limit=20)).rows:
        card = engine.call(GetFeature(sae="high", index=row.index))
        assert not {token.token.strip() for token in card.top_tokens or []} & {"the", "."}
        assert all(len(example.tokens) <= 7 for example in card.examples or [])
        assert all(example.position_in_context >= 2 for example in card.examples or [])
    with Knowledge.of(engine, "high") as known:
        left_out = {the for the in known.tokenizer.get_vocab().values() if known.strings([the])[0].strip() == "the"}
        assert left_out and left_out <= known.uncounted_ids, "labels and scores do not take them for silent either"
    wide = engine.call(GetFeature(sae="high", index=row.index, window=20))
    assert any(len(example.tokens) > 7 for example in wide.examples or [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"features": [64]}, "no feature 64"),
        ({"exclude_tokens": ["zzqqzz"]}, "no token 'zzqqzz'"),
        ({"exclude_first": 128}, "exclude_first = 128"),
        ({"dataset": "nowhere"}, "nowhere"),
        ({"sae": "nobody"}, "nobody"),
        ({"also": ["nobody"]}, "nobody"),
    ],
)
def test_what_cannot_be_extracted_is_refused_and_leaves_nothing(
    engine: Engine, arguments: dict[str, Any], words: str
) -> None:
    before = {path.name for path in (engine.home / "extractions").iterdir()}
    with pytest.raises((BadInput, NotFound), match=words) as refused:
        engine.call(Extract(**{"sae": "high", **arguments}))
    assert refused.value.fix
    assert {path.name for path in (engine.home / "extractions").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"also": ["high"]}, "named twice"),
        ({"features": []}, "at least 1 item"),
        ({"also": ["low"], "features": [1]}, "features are of one SAE"),
        ({"min_activation": float("nan")}, "finite"),
        ({"n_zero": 1}, "greater than or equal to 5"),
    ],
)
def test_arguments_that_contradict_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Extract(**{"sae": "high", **arguments})


def test_a_template_keeps_threshold_window_and_filters(engine: Engine) -> None:
    kept = {"min_activation": 0.05, "window": 4, "exclude_tokens": ["the"], "n_examples": 7}
    engine.call(SaveTemplate(name="careful", operation="extract", arguments=kept, favourite=True))
    record = extracted(engine, template="careful").result
    assert record is not None
    assert {name: record["settings"][name] for name in kept} == kept
    extracted(engine)


def test_an_earlier_extraction_is_used_again_and_a_deleted_one_is_gone(engine: Engine) -> None:
    first, second = extracted(engine).result, extracted(engine, exclude_tokens=["the"]).result
    assert first is not None and second is not None
    assert current(engine, "high") == second["slug"]
    completed(engine, UseExtraction(extraction=first["slug"]))
    assert current(engine, "high") == first["slug"]
    folder = engine.home / "extractions" / first["slug"]
    gone = engine.call(DeleteExtraction(extraction=f"extraction/{first['slug']}"))
    assert gone.freed_bytes > 0 and not folder.exists()
    assert current(engine, "high") is None
    assert first["slug"] not in [each.slug for each in engine.call(ListExtractions(sae="high")).rows]
    with pytest.raises(NotFound):
        engine.call(SearchFeatures(sae="high"))
    completed(engine, UseExtraction(extraction=second["slug"]))
    assert engine.call(SearchFeatures(sae="high", limit=1)).extraction == second["slug"]


def test_no_job_replaces_what_another_has_made(engine: Engine) -> None:
    """A job of several SAEs finds names for the others when it runs: not that of a job that may be told to retry, and
    one that was promised the same name meanwhile takes another."""
    with steered(engine, Extract(sae="low", n_tokens=N_TOKENS)) as cancelled:
        pass
    assert engine.jobs.get(cancelled.slug).state == "cancelled"
    several = extracted(engine, also=["low"])
    assert several.result is not None
    made = several.result["also"][0]
    assert f"extraction/{made['slug']}" != cancelled.subject
    with steered(engine, Extract(sae="high", also=["low"], n_tokens=N_TOKENS + 1000)) as several:
        named = f"low-{(N_TOKENS + 1000) // 1000}k"
        until(lambda: list((engine.home / "extractions").glob(f"{named}*")), "the name")
        one = engine.call(Extract(sae="low", n_tokens=N_TOKENS + 1000, exclude_tokens=["the"]))
        results = [engine.jobs.wait(job.slug, 60).result for job in (several, one)]
    assert results[0] is not None and results[1] is not None
    made = results[0]["also"][0]
    assert made["slug"] != results[1]["slug"] == current(engine, "low")
    assert engine.call(ShowExtraction(extraction=made["slug"])).job == several.slug
    assert load_extraction(engine.home / made["folder"] / "data").info.settings["exclude_token_ids"] == []


def test_two_that_are_used_again_at_once_leave_the_features_of_the_current_one_in_the_index(engine: Engine) -> None:
    first, second = extracted(engine).result, extracted(engine, exclude_tokens=["the"]).result
    assert first is not None and second is not None
    context = JobContext(Job(slug="use", operation="use_extraction"), engine.home, engine.bus.publish)
    uses = [UseExtraction(extraction=each["slug"]) for each in (first, second)]
    late, early = (run_use_extraction(use, engine, context) for use in uses)
    next(late)
    running = [(early, 4), (late, 1)]  # whoever began first takes longer
    while running:
        running = [(work, n_steps) for work, n_steps in running if len(list(islice(work, n_steps))) == n_steps]
    assert current(engine, "high") == second["slug"]
    found = engine.call(SearchFeatures(sae="high", include_dense=True, limit=100))
    assert found.extraction == second["slug"] and found.total == second["n_alive"]
    frequency = {row.index: row.activation_frequency for row in found.rows}
    with Knowledge.of(engine, "high") as known:
        assert frequency == {index: known.row(index).activation_frequency for index in known.alive()}


def test_logit_effects_are_those_of_an_activation_of_one(engine: Engine, tmp_path: Path) -> None:
    """A twin that counts its decoder rows as normed and has them of all lengths is the same SAE in the same units."""
    sae = load_sae(engine.home / "saes" / "high")
    lengths = torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.manual_seed(0))]
    values = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    values["W_dec"] *= lengths[:, None]
    values["W_enc"] /= lengths
    values["b_enc"] /= lengths
    cfg = sae.cfg.model_copy(update={"rescale_acts_by_decoder_norm": True})
    completed(engine, GetSAE(source=str(save_sae(type(sae)(cfg, values), tmp_path / "mirror")), name="mirror"))
    extracted(engine)
    extracted(engine, sae="mirror", dataset="corpus")
    with Knowledge.of(engine, "high") as high, Knowledge.of(engine, "mirror") as twin:
        np.testing.assert_allclose(twin.extraction.max, high.extraction.max, rtol=1e-4)
        for index in range(64):
            theirs, ours = (known.logit_tokens(index, 5) for known in (high, twin))
            assert theirs is not None and ours is not None
            for some, others in zip(theirs, ours, strict=True):
                np.testing.assert_allclose([each.value for each in others], [each.value for each in some], rtol=1e-3)


def test_of_a_selection_it_is_not_said_that_no_feature_fires(engine: Engine) -> None:
    index = engine.call(SearchFeatures(sae="high", limit=1)).rows[0].index
    job = extracted(engine, features=[index])
    assert job.result is not None and job.result["l0"]["silent"] > 0.05
    assert not any("No feature fires" in finding for finding in engine.call(ShowHealth(sae="high")).findings)
    extracted(engine)


def test_less_than_a_context_is_refused_before_anything_waits(engine: Engine) -> None:
    tokens = engine.store.all(TokensRecord)[0].model_copy(update={"slug": "long", "context_size": 512})
    engine.store.insert(tokens)
    try:
        with pytest.raises(BadInput, match="n_tokens = 300 is less than one context") as refused:
            engine.call(Extract(sae="high", dataset="tokens/long", n_tokens=300))
        assert "512" in (refused.value.fix or "")
    finally:
        engine.store.delete(TokensRecord, "long")


def test_the_health_of_a_dictionary_adds_up(engine: Engine) -> None:
    record = extracted(engine).result
    assert record is not None
    health = engine.call(ShowHealth(sae="high"))
    assert health.extraction == record["slug"]
    assert health.n_alive + health.n_dead == health.n_features == 64
    assert sum(health.density_histogram) == health.n_alive
    assert health.interpretability and 0.5 < health.interpretability["p50"] <= 1
    assert health.nearest_cosine and health.n_compared == health.n_alive
    assert health.n_near_duplicates <= health.n_compared
    assert all(finding.endswith(".") for finding in health.findings)


def test_a_hundred_extractions_and_labellings_begun_and_cancelled_leak_neither_memory_nor_threads(
    engine: Engine,
) -> None:
    def cycle() -> None:
        for operation in (Extract(sae="high"), LabelFeatures(sae="high")):
            with steered(engine, operation) as job:
                until(lambda slug=job.slug: engine.jobs.get(slug).state != "queued", "the start")

    for _ in range(10):
        cycle()
    gc.collect()
    before, n_threads = psutil.Process().memory_info().rss, threading.active_count()
    folders, jobs = ({path.name for path in (engine.home / each).iterdir()} for each in ("extractions", "jobs"))
    for _ in range(50):
        cycle()
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    assert threading.active_count() <= n_threads + 2
    left = {path.name for path in (engine.home / "extractions").iterdir()} - folders
    assert all(name in [each.slug for each in engine.call(ListExtractions(limit=200)).rows] for name in left)
    assert {path.name for path in (engine.home / "jobs").iterdir()} <= jobs


def test_an_sae_that_is_extracted_beside_another_cannot_be_deleted_meanwhile(engine: Engine) -> None:
    completed(engine, TrainSAE(**SAE, hook_name=DEMO_HOOK, name="busy"))
    with steered(engine, Extract(sae="high", also=["busy"])) as job:
        if engine.jobs.get(job.slug).finished:
            pytest.skip("it was too quick to be met")
        with pytest.raises(Conflict, match=job.slug):
            engine.call(DeleteSAE(sae="busy"))
    engine.call(DeleteSAE(sae="busy"))
