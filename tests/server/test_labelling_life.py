"""A labelling job whose engine is killed: what was answered is not asked again, nothing is labelled twice, and no money
is forgotten.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mistudio_engine.api.client import connect
from mistudio_engine.api.operations import LabelFeatures, SetSetting
from mistudio_engine.demo.embedded import DEMO_HOOK
from tests.llm_server import Reply, serve_llm
from tests.server.processes import WAIT_SECONDS, kill, until

pytestmark = pytest.mark.slow

KEY = "sk-life-0123456789abcdefghij"
N_PARALLEL = 2
PRICES = {"price_per_million_input": 1.0, "price_per_million_output": 5.0}
BILLED = {"n_prompt_tokens": 2000, "n_completion_tokens": 100}
USD_EACH = 0.0025


def about(request: Any) -> int:
    return int(re.search(r"Feature (\d+)", request.user)[1])  # type: ignore[index]


def test_a_killed_job_asks_only_for_what_it_had_not_kept(home: Path) -> None:
    def answer(request: Any) -> Any:
        feature = about(request)
        if feature % 10 == 3:
            return Reply(refusal="I will not.", **BILLED)
        return Reply({"reasoning": "Seen.", "label": f"words {feature}", "category": "Words"}, **BILLED)

    with serve_llm(answer, latency=0.1, key=KEY) as llm, connect(home) as studio:
        studio.get_model(source="embedded", name="tiny").wait(WAIT_SECONDS)
        studio.get_dataset(source="embedded", name="corpus", model="tiny", n_tokens=10_000).wait(WAIT_SECONDS)
        sae = studio.train_sae(
            model="tiny", dataset="corpus", hook_name=DEMO_HOOK, d_sae=64, k=16, n_tokens=4096, batch_size=512
        ).wait(WAIT_SECONDS)
        studio.extract(sae=sae.slug, n_tokens=4096).wait(WAIT_SECONDS)
        for key, value in (("labelling_base_url", llm.openai_url), ("labelling_api_key", KEY)):
            studio.call(SetSetting(key=key, value=value))  # type: ignore[arg-type]
        features = list(range(40))
        asks = {"provider": "compatible", "model": "m", "n_parallel": N_PARALLEL, "max_usd": 1.0, **PRICES}
        call = LabelFeatures(sae=sae.slug, features=features, **asks)
        job = studio.call(call)
        until(lambda: len(llm.requests) >= 20, "half of the requests")
        kill(home)
        n_before = len(llm.requests)
        asked_before = {about(request) for request in llm.requests}
        assert studio.show_job(job=job.slug).state in ("queued", "running"), "the next engine goes on by itself"
        done = until(lambda: (now := studio.show_job(job=job.slug, wait_s=10)).finished and now, "the job's end")
        report = done.result
        asked_again = asked_before & {about(request) for request in llm.requests[n_before:]}
        # Under way, and what came within the half second before the kill.
        assert len(asked_again) <= N_PARALLEL + N_PARALLEL * 0.6 / 0.1
        assert report["n_labelled"] + report["n_failed"] == 40
        assert report["failures"].get("refused", 0) + report["failures"].get("dead", 0) == report["n_failed"]
        # Ahead of it at the kill: a twentieth of the cap at most, and what was under way.
        assert 0 <= report["usd"] - USD_EACH * len(llm.requests) < 0.05 + 4 * N_PARALLEL * USD_EACH
        for feature in features:
            versions = studio.label_history(sae=sae.slug, index=feature).rows
            assert len(versions) <= 1 and all(row.label == f"words {feature}" for row in versions)
        holding = [each.name for each in home.rglob("*") if each.is_file() and KEY.encode() in each.read_bytes()]
        assert holding == ["secrets.json"], "the engine's log is among them"
