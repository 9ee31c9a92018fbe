"""A scoring job whose engine is killed: nothing that was stored is asked again, and the scores are those of another."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from mistudio_engine.api.client import connect
from mistudio_engine.api.operations import ScoreLabels, SetSetting
from mistudio_engine.demo.embedded import DEMO_HOOK
from tests.llm_server import serve_llm
from tests.server.processes import WAIT_SECONDS, kill, until

pytestmark = pytest.mark.slow

N_FEATURES, N_CLAIMS = 8, 3


def opinion(request: Any) -> dict[str, Any]:
    """A judge of odd taste, who answers the same question in the same way whenever it is asked."""
    lines = request.user.split("Texts:\n")[1].split("\n")
    return {"verdicts": [sum(line.split(". ", 1)[1].encode()) % 3 != 0 for line in lines]}


def scores(home: Path, job: str) -> dict[int, dict[str, Any]]:
    """What a job has stored, read from the file itself: the engine may be dead."""
    with sqlite3.connect(f"file:{home / 'mistudio.db'}?mode=ro", uri=True) as connection:
        bodies = [json.loads(body) for (body,) in connection.execute("SELECT body FROM labels")]
    connection.close()
    return {
        body["index"]: {method: {**score, "job": ""} for method, score in body["scores"].items()}
        for body in bodies
        if any(score["job"] == job for score in body["scores"].values())
    }


def test_a_killed_job_goes_on_and_ends_with_the_scores_of_an_undisturbed_one(home: Path) -> None:
    with serve_llm(opinion) as llm, connect(home) as studio:
        studio.get_model(source="embedded", name="tiny").wait(WAIT_SECONDS)
        studio.get_dataset(source="embedded", name="corpus", model="tiny", n_tokens=10_000).wait(WAIT_SECONDS)
        sae = studio.train_sae(
            model="tiny", dataset="corpus", hook_name=DEMO_HOOK, d_sae=64, k=16, n_tokens=4096, batch_size=512
        ).wait(WAIT_SECONDS)
        studio.extract(sae=sae.slug, n_tokens=8192).wait(WAIT_SECONDS)
        studio.label_features(sae=sae.slug, provider="token_pattern", features=list(range(16))).wait(WAIT_SECONDS)
        studio.call(SetSetting(key="labelling_base_url", value=llm.openai_url))
        studio.call(SetSetting(key="labelling_model", value="judge"))
        labelled = [
            row.index for row in studio.search_features(sae=sae.slug, include_dense=True, limit=64).rows if row.label
        ]
        call = ScoreLabels(
            sae=sae.slug,
            features=labelled[:N_FEATURES],
            provider="compatible",
            n=6,
            window=16,
            n_tokens=2048,
            negatives=["random", "decoder"],
            n_parallel=2,
        )
        undisturbed = studio.call(call)
        report = until(
            lambda: (now := studio.show_job(job=undisturbed.slug, wait_s=10)).finished and now, "its end"
        ).result
        expected = scores(home, undisturbed.slug)
        assert report["n_scored"] == len(expected) >= N_FEATURES - 2
        n_asked = {i: N_CLAIMS * sum(score["n_questions"] for score in each.values()) for i, each in expected.items()}
        llm.latency = 0.03
        job = studio.call(call)
        until(lambda: len(scores(home, job.slug)) >= 2, "two scores")
        kill(home)
        kept, n_before = scores(home, job.slug), len(llm.requests)
        assert 2 <= len(kept) < len(expected), "it was killed in the middle"
        llm.latency = 0.0
        studio.call(SetSetting(key="labelling_model", value="another"))
        done = until(lambda: (now := studio.show_job(job=job.slug, wait_s=10)).finished and now, "the job's end")
        assert done.state == "completed" and done.result is not None
        assert len(llm.requests) - n_before == sum(n for index, n in n_asked.items() if index not in kept)
        assert {request.model for request in llm.requests} == {"judge"}
        assert scores(home, job.slug) == expected
        same = ("n_scored", "balanced_accuracy", "baselines", "n_beat_baselines", "n_questions", "negatives", "samples")
        assert {name: done.result[name] for name in same} == {name: report[name] for name in same}
