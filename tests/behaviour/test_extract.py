"""Extractions as users have them: several SAEs in a pass, filters, templates, earlier ones used again or deleted."""

from __future__ import annotations

from typing import Any

import pytest

from mistudio_engine.api.errors import BadInput, NotFound
from mistudio_engine.api.operations import (
    DeleteExtraction,
    Extract,
    GetFeature,
    ListExtractions,
    SaveTemplate,
    SearchFeatures,
    ShowExtraction,
    ShowHealth,
    ShowSAE,
    TrainSAE,
    UseExtraction,
)
from mistudio_engine.api.records import Job
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.discovery.extraction import load_extraction
from mistudio_engine.runtime.engine import Engine
from tests.behaviour.doors import Served
from tests.behaviour.trainings import SHORT, completed

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
