"""Labels by a language model as a job: kept as they come, within the cap, stopped at once, never over a person's."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mistudio_engine.api.errors import BadInput, Forbidden, NotFound, Unsupported
from mistudio_engine.api.operations import (
    DeleteExtraction,
    Extract,
    LabelFeatures,
    LabelHistory,
    LabellingAttempts,
    SearchFeatures,
    SetLabel,
    SetSetting,
    UseExtraction,
)
from mistudio_engine.api.records import ExtractionRecord, Job, SAERecord
from mistudio_engine.runtime.engine import Engine
from tests.behaviour.doors import Door, Served
from tests.behaviour.trainings import SECONDS, completed, ended, steered, until
from tests.llm_server import LLMServer, Reply, failing_now_and_then, serve_llm

KEY = "sk-behaviour-0123456789abcdefghijklm"
GOOD = {"reasoning": "It is always such words.", "label": "some words", "category": "Words > Some"}
SOME = list(range(12))


def about(request: Any) -> int:
    """Which feature a request is about."""
    return int(re.search(r"Feature (\d+)", request.user)[1])  # type: ignore[index]


@pytest.fixture(scope="module")
def engine(studio: Served) -> Iterator[Engine]:
    """The engine; before and behind us its SAE has the labels of token patterns, and nobody else's."""
    labelled_by_patterns(studio.engine)
    yield studio.engine
    labelled_by_patterns(studio.engine)


def labelled_by_patterns(engine: Engine) -> None:
    engine.store.delete_labels("first")
    completed(engine, LabelFeatures(sae="first", provider="token_pattern"))


@pytest.fixture
def llm(engine: Engine) -> Iterator[LLMServer]:
    """A language model server that the engine is set to, which labels every feature."""
    with (
        serve_llm(lambda request: {**GOOD, "label": f"words {about(request)}"}, key=KEY) as server,
        settings(
            engine,
            labelling_base_url=server.openai_url,
            ollama_base_url=server.ollama_url,
            labelling_model="m",
            labelling_api_key=KEY,
        ),
    ):
        yield server


@pytest.fixture
def other_extraction(engine: Engine) -> Iterator[str]:
    """Slug of another extraction, while the one before it is current."""
    before = engine.store.get(SAERecord, "first").extraction
    assert before is not None
    completed(engine, Extract(sae="first", n_tokens=4096))
    made = engine.store.get(SAERecord, "first").extraction
    assert made is not None and made != before
    completed(engine, UseExtraction(extraction=before))
    yield made
    completed(engine, UseExtraction(extraction=before))
    if engine.store.exists(ExtractionRecord, made):
        engine.call(DeleteExtraction(extraction=made))


class settings:
    """Settings while a block runs."""

    def __init__(self, engine: Engine, **values: Any) -> None:
        self.engine, self.values = engine, values

    def __enter__(self) -> None:
        for key, value in self.values.items():
            self.engine.call(SetSetting(key=key, value=value))  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        for key in self.values:
            self.engine.call(SetSetting(key=key, value=None))  # type: ignore[arg-type]


def label(**arguments: Any) -> LabelFeatures:
    return LabelFeatures(**{"sae": "first", "features": SOME, "provider": "compatible", **arguments})


@pytest.mark.parametrize("provider", ["compatible", "ollama"])
def test_features_are_labelled_and_found_by_it(engine: Engine, llm: LLMServer, provider: str) -> None:
    job = completed(engine, label(provider=provider))
    assert job.result is not None
    assert (job.result["n_labelled"], job.result["n_failed"], job.result["n_requests"]) == (12, 0, 12)
    assert (job.result["status"], job.result["method"]) == ("completed", f"{provider}/m")
    made = engine.call(LabelHistory(sae="first", index=7)).rows[0]
    assert (made.label, made.category, made.author) == ("words 7", "Words > Some", f"job:{job.slug}")
    assert made.method == f"{provider}/m" and made.confidence is None
    assert made.extraction == engine.store.get(SAERecord, "first").extraction
    assert made.evidence.startswith("It is always such words. (From ")
    found = engine.call(SearchFeatures(sae="first", query="words 7", mode="text", include_dense=True))
    assert 7 in [row.index for row in found.rows]
    assert llm.peak <= 8


def test_a_job_over_every_door(call: Door, llm: LLMServer) -> None:
    job = call(label(features=[3, 4], wait_s=20))
    assert job.result.n_labelled == 2


def test_attempts_are_kept_with_what_was_asked_and_answered(engine: Engine, llm: LLMServer) -> None:
    llm.answer = lambda request: "No." if about(request) == 2 else GOOD
    job = completed(engine, label(features=[1, 2]))
    assert job.result is not None and job.result["failures"] == {"unparsable": 1}
    (good, *_), (bad, *_) = (engine.call(LabellingAttempts(sae="first", index=i)).rows for i in (1, 2))
    assert good.author == bad.author == f"job:{job.slug}"
    assert good.body["messages"][1]["content"] in [request.user for request in llm.requests]
    assert good.body["label"] == "some words" and good.body["tries"][0]["n_prompt_tokens"] > 100
    assert bad.body["reason"] == "unparsable" and [each["answer"] for each in bad.body["tries"]] == ["No."] * 3
    assert "label" not in bad.body
    assert engine.call(LabellingAttempts(sae="first", index=2, limit=1)).shown == 1
    with pytest.raises(NotFound):
        engine.call(LabellingAttempts(sae="first", index=999))


def test_a_failure_leaves_the_earlier_label(engine: Engine, llm: LLMServer) -> None:
    before = engine.call(LabelHistory(sae="first", index=5)).rows[0]
    llm.answer = lambda request: Reply(refusal="I will not.")
    job = completed(engine, label(features=[5]))
    assert job.result is not None and job.result["failures"] == {"refused": 1}
    assert engine.call(LabelHistory(sae="first", index=5)).rows[0] == before


def test_a_persons_label_stays_and_costs_nothing(engine: Engine, llm: LLMServer) -> None:
    engine.call(SetLabel(feature="sae/first#6", label="mine"))
    job = completed(engine, label(features=[6, 7]))
    assert job.result is not None and (job.result["n_kept"], job.result["n_labelled"]) == (1, 1)
    assert engine.call(LabelHistory(sae="first", index=6)).rows[0].label == "mine"
    assert [about(request) for request in llm.requests] == [7]


def test_a_label_that_a_person_gives_meanwhile_stays(engine: Engine, llm: LLMServer) -> None:
    llm.hold = threading.Event()
    with steered(engine, label(features=[8])) as job:
        until(lambda: llm.n_open, "a request")
        engine.call(SetLabel(feature="sae/first#8", label="mine"))
        llm.hold.set()
        done = engine.jobs.wait(job.slug, SECONDS)
    assert done.result is not None and (done.result["n_kept"], done.result["n_labelled"]) == (1, 0)
    assert engine.call(LabelHistory(sae="first", index=8)).rows[0].label == "mine"


def test_only_features_without_a_label_when_that_is_asked_for(engine: Engine, llm: LLMServer) -> None:
    engine.store.delete_labels("first")
    completed(engine, label(features=[0, 1, 2]))
    job = completed(engine, label(features=[0, 1, 2, 3], relabel=False))
    assert job.result is not None and (job.result["n_kept"], job.result["n_labelled"]) == (3, 1)
    assert len(llm.requests) == 4


def test_faults_now_and_then_leave_no_feature_out(engine: Engine, llm: LLMServer) -> None:
    llm.answer = failing_now_and_then(llm.answer, 0.3, seed=1)
    job = completed(engine, label(features=list(range(40)), n_parallel=16))
    assert job.result is not None
    assert job.result["n_labelled"] + job.result["n_failed"] == 40 - job.result["n_kept"]
    assert sum(job.result["failures"].values()) == job.result["n_failed"]
    assert job.result["n_labelled"] >= 30


def test_progress_is_told_with_its_rate(engine: Engine, llm: LLMServer) -> None:
    llm.latency = 0.2
    with steered(engine, label(features=list(range(60)), n_parallel=2)) as job:
        until(lambda: engine.jobs.get(job.slug).rate, "a rate")
        seen = engine.jobs.get(job.slug)
    assert 0 < (seen.progress or 0) < 1 and seen.unit == "features" and seen.stage == "labelling"


def test_cancelling_takes_effect_at_once_and_keeps_what_came(engine: Engine, llm: LLMServer) -> None:
    hold = threading.Event()

    def answer(request: Any) -> Any:
        if request.number >= 4:
            hold.wait(30)
        return GOOD

    llm.answer = answer
    job = engine.call(label(features=list(range(40, 80)), n_parallel=4))
    until(lambda: len(llm.requests) >= 8 and engine.store.label("first", 40), "the first labels")
    began_at = time.monotonic()
    engine.jobs.control(job.slug, "cancel")
    assert engine.jobs.wait(job.slug, SECONDS).state == "cancelled"
    assert time.monotonic() - began_at < 5
    hold.set()
    mine = [each for each in engine.store.labels("first").values() if each.author == f"job:{job.slug}"]
    assert len(mine) == 4


def test_stopping_ends_early_with_a_report(engine: Engine, llm: LLMServer) -> None:
    llm.latency = 0.1
    job = engine.call(label(features=list(range(100)), n_parallel=1))
    until(lambda: len(llm.requests) > 3, "some requests")
    engine.jobs.control(job.slug, "stop")
    done = engine.jobs.wait(job.slug, SECONDS)
    assert done.state == "completed" and done.result is not None
    assert done.result["status"] == "stopped" and done.result["n_labelled"] > 0 and done.result["n_left"] > 80


def test_the_money_cap_ends_the_job_and_keeps_what_came(engine: Engine, llm: LLMServer) -> None:
    llm.answer = lambda request: Reply(GOOD, n_prompt_tokens=2000, n_completion_tokens=100)
    prices = {"price_per_million_input": 1.0, "price_per_million_output": 5.0}
    job = completed(engine, label(features=list(range(100)), max_usd=0.05, **prices))
    assert job.result is not None and job.result["status"] == "max_usd_reached"
    assert job.result["usd"] == pytest.approx(len(llm.requests) * 0.0025)
    assert 0.03 < job.result["usd"] <= 0.05
    assert job.result["n_labelled"] == len(llm.requests)
    assert job.result["n_left"] == 100 - job.result["n_labelled"] - job.result["n_kept"]


def test_a_cap_without_prices_is_refused(engine: Engine, llm: LLMServer) -> None:
    with pytest.raises(BadInput, match=r"max_usd = 0\.5 cannot be kept to"):
        engine.call(label(max_usd=0.5))
    with pytest.raises(BadInput, match="price_per_million_output is missing"):
        engine.call(label(price_per_million_input=1.0))
    assert engine.call(label(max_usd=0.5, provider="ollama", dry_run=True)).plan, "Ollama costs nothing"
    with settings(engine, price_per_million_input=1, price_per_million_output=2):
        assert engine.call(label(max_usd=0.5, dry_run=True)).plan


def test_a_job_keeps_to_what_was_settled_when_it_was_submitted(
    engine: Engine, llm: LLMServer, other_extraction: str
) -> None:
    engine.store.delete_labels("first")
    agreed = engine.store.get(SAERecord, "first").extraction
    llm.hold = threading.Event()
    prices = {"price_per_million_input": 1.0, "price_per_million_output": 5.0}
    call = label(provider=None, features=SOME, max_usd=1.0, n_parallel=2, idempotency_key="settled once")
    with settings(engine, labelling_provider="compatible", **prices):
        planned = engine.call(call.model_copy(update={"dry_run": True}))
        job = engine.call(call)
        until(lambda: llm.n_open, "a request")
        engine.jobs.control(job.slug, "pause")
        assert engine.jobs.wait(job.slug, SECONDS).state == "paused"
    llm.hold.set()
    assert planned.settled == job.settled
    assert job.settled["base_url"] == llm.openai_url and job.settled["extraction"] == agreed
    assert KEY not in job.model_dump_json()
    completed(engine, UseExtraction(extraction=other_extraction))
    with settings(engine, labelling_model="dearer", price_per_million_input=100, price_per_million_output=500):
        again = engine.call(call)
        assert (again.slug, again.settled) == (job.slug, job.settled), "the same call, whatever is set by now"
        engine.jobs.control(job.slug, "resume")
        done = engine.jobs.wait(job.slug, SECONDS)
    engine.call(SetSetting(key="labelling_model", value="m"))
    assert done.result is not None and (done.result["n_labelled"], done.result["method"]) == (12, "compatible/m")
    assert 0 < done.result["usd"] < 0.05, "at the prices of then"
    assert {each.extraction for each in engine.store.labels("first").values()} == {agreed}


def test_a_key_that_was_set_with_another_server_is_not_sent_to_the_first(engine: Engine, llm: LLMServer) -> None:
    engine.store.delete_labels("first")
    llm.hold = threading.Event()
    job = engine.call(label(n_parallel=1))
    until(lambda: llm.n_open, "a request")
    engine.jobs.control(job.slug, "pause")
    assert engine.jobs.wait(job.slug, SECONDS).state == "paused"
    llm.hold.set()
    n_asked = len(llm.requests)
    engine.call(SetSetting(key="labelling_base_url", value="http://127.0.0.1:9/v1"))
    engine.jobs.control(job.slug, "resume")
    failed = engine.jobs.wait(job.slug, SECONDS)
    engine.call(SetSetting(key="labelling_base_url", value=llm.openai_url))
    assert failed.error is not None and failed.error.code == "conflict"
    assert "labelling_base_url is http://127.0.0.1:9/v1 by now" in failed.error.what
    assert len(llm.requests) == n_asked
    engine.jobs.control(job.slug, "retry")
    assert engine.jobs.wait(job.slug, SECONDS).state == "completed"


def test_a_retry_is_settled_anew_and_keeps_to_that(engine: Engine, llm: LLMServer, other_extraction: str) -> None:
    engine.store.delete_labels("first")
    llm.answer = lambda request: GOOD if request.number < 5 else Reply("no such model", status=404)
    job = ended(engine, label(n_parallel=1))
    assert job.state == "failed" and 0 < len(engine.store.labels("first")) < 12
    completed(engine, UseExtraction(extraction=other_extraction))
    llm.answer = lambda request: GOOD
    with settings(engine, labelling_model="better"):
        engine.jobs.control(job.slug, "retry")
        done = engine.jobs.wait(job.slug, SECONDS)
    engine.call(SetSetting(key="labelling_model", value="m"))
    assert done.result is not None and (done.result["n_labelled"], done.result["method"]) == (12, "compatible/better")
    assert (done.settled["model"], done.settled["extraction"]) == ("better", other_extraction)
    made = engine.store.labels("first")
    assert {each.extraction for each in made.values()} == {other_extraction}, "what was of the other is made again"


def test_a_job_whose_extraction_was_deleted_says_what_to_do(
    engine: Engine, llm: LLMServer, other_extraction: str
) -> None:
    before = engine.store.get(SAERecord, "first").extraction
    completed(engine, UseExtraction(extraction=other_extraction))
    llm.hold = threading.Event()
    job = engine.call(label())
    until(lambda: llm.n_open, "a request")
    engine.jobs.control(job.slug, "pause")
    assert engine.jobs.wait(job.slug, SECONDS).state == "paused"
    llm.hold.set()
    engine.call(DeleteExtraction(extraction=other_extraction))
    completed(engine, UseExtraction(extraction=str(before)))
    engine.jobs.control(job.slug, "resume")
    failed = engine.jobs.wait(job.slug, SECONDS)
    assert failed.error is not None and failed.error.code == "conflict"
    assert f"extraction/{other_extraction}" in failed.error.what and "Retry the job" in failed.error.fix
    engine.jobs.control(job.slug, "retry")
    assert engine.jobs.wait(job.slug, SECONDS).state == "completed"


def test_what_may_have_been_billed_counts_when_a_job_goes_on(engine: Engine, llm: LLMServer) -> None:
    """Connections that break are in no answer's usage."""
    engine.store.delete_labels("first")
    features = list(range(30))
    broken = Reply(GOOD, n_prompt_tokens=2000, n_completion_tokens=100, cut=True)
    llm.answer = lambda request: Reply("wrong key", status=401) if request.number >= 3 else broken
    prices = {"price_per_million_input": 1.0, "price_per_million_output": 5.0}
    job = ended(engine, label(features=features, n_parallel=1, **prices))
    assert job.state == "failed" and not engine.store.labels("first")
    llm.answer = lambda request: Reply(GOOD, n_prompt_tokens=2000, n_completion_tokens=100)
    engine.jobs.control(job.slug, "retry")
    done = engine.jobs.wait(job.slug, SECONDS)
    assert done.result is not None and done.result["n_labelled"] == 30
    assert done.result["usd"] >= 33 * 0.0025


def test_a_retry_that_asks_no_language_model_forgets_no_money(engine: Engine, llm: LLMServer) -> None:
    engine.store.delete_labels("first")
    billed = Reply(GOOD, n_prompt_tokens=2000, n_completion_tokens=100)
    llm.answer = lambda request: billed if request.number < 3 else Reply("no such model", status=404)

    def spent(job: Job) -> float:
        return engine.store.events_after(0, [f"jobs/{job.slug}"], 1, names=["spent"], newest_first=True)[0].data["usd"]

    prices = {"price_per_million_input": 1.0, "price_per_million_output": 5.0}
    with settings(engine, labelling_provider="compatible", **prices):
        job = ended(engine, label(provider=None, n_parallel=1))
    before = spent(job)
    assert job.state == "failed" and before >= 3 * 0.0025 * (1 - 1e-9)
    engine.jobs.control(job.slug, "retry")
    done = engine.jobs.wait(job.slug, SECONDS)
    assert done.result is not None and done.result["method"] == "token_pattern"
    assert spent(job) == before


def test_the_record_counts_the_features_that_have_a_label(engine: Engine, llm: LLMServer) -> None:
    engine.store.delete_labels("first")
    completed(engine, label(features=[1, 2]))
    for n in (3, 3):  # the second time it has one
        engine.call(SetLabel(feature="sae/first#3", label="mine"))
        assert engine.store.get(SAERecord, "first").n_labelled == len(engine.store.labels("first")) == n
    completed(engine, label(features=[2, 3, 4]))
    assert engine.store.get(SAERecord, "first").n_labelled == 4


def test_a_dry_run_says_what_it_would_cost_and_asks_nobody(engine: Engine, llm: LLMServer) -> None:
    plan = engine.call(
        label(features=[10, 11], price_per_million_input=10, price_per_million_output=100, dry_run=True)
    ).plan
    assert plan is not None and not llm.requests
    details = plan.details
    assert details["n_requests"] == 2 and "estimate" in details["how"]
    completed(engine, label(features=[10, 11]))
    real = sum(len(request.system) + len(request.user) for request in llm.requests) / 4
    assert details["prompt_tokens"] == pytest.approx(real, abs=4)
    least, most = details["usd"]
    assert least == pytest.approx(details["prompt_tokens"] * 1e-5 + 2 * 60 * 1e-4)
    assert most == pytest.approx(details["prompt_tokens"] * 1e-5 + 2 * 400 * 1e-4)
    again = engine.call(label(features=SOME, n_parallel=4, dry_run=True)).plan
    assert again is not None and again.seconds is not None and again.seconds > 0, "the model was asked here before"


def test_what_was_done_is_not_asked_again(engine: Engine, llm: LLMServer) -> None:
    """A job that ends in the middle and is taken up again: by a person after a wrong key."""
    features = list(range(20, 50))
    engine.store.delete_labels("first")
    bad = features[3]

    def answer(request: Any) -> Any:
        if about(request) == bad:
            return Reply(refusal="no")
        return Reply("wrong key", status=401) if request.number >= 12 else GOOD

    llm.answer = answer
    job = ended(engine, label(features=features, n_parallel=1))
    assert job.state == "failed" and job.error is not None and "refused the key" in job.error.what
    first = {about(request) for request in llm.requests[:12]}
    assert bad in first and set(engine.store.labels("first")) == first - {bad}, "what came is kept"
    llm.answer = lambda request: GOOD
    n_before = len(llm.requests)
    engine.jobs.control(job.slug, "retry")
    done = engine.jobs.wait(job.slug, SECONDS)
    assert done.state == "completed" and done.result is not None
    asked = [about(request) for request in llm.requests[n_before:]]
    assert sorted(asked) == sorted(set(features) - first)
    assert (done.result["n_labelled"], done.result["failures"]) == (29, {"refused": 1})


def test_money_spent_before_counts_when_a_job_goes_on(engine: Engine, llm: LLMServer) -> None:
    engine.store.delete_labels("first")
    cheap = Reply(GOOD, n_prompt_tokens=2000, n_completion_tokens=100)
    llm.answer = lambda request: Reply("wrong key", status=401) if request.number >= 10 else cheap
    prices = {"price_per_million_input": 1.0, "price_per_million_output": 5.0}
    job = ended(engine, label(features=list(range(100)), max_usd=0.04, n_parallel=1, **prices))
    assert job.state == "failed"
    llm.answer = lambda request: cheap
    engine.jobs.control(job.slug, "retry")
    done = engine.jobs.wait(job.slug, SECONDS)
    assert done.result is not None and done.result["status"] == "max_usd_reached"
    n_billed = len(llm.requests) - 1  # the one with the wrong key
    assert n_billed * 0.0025 <= done.result["usd"] <= 0.04, "one was cut off, and may have been billed"


def test_a_wrong_key_ends_the_job_at_once_with_advice(engine: Engine, llm: LLMServer) -> None:
    with settings(engine, labelling_api_key="sk-wrong-0123456789abcdefghij"):
        job = ended(engine, label(features=list(range(100))))
    assert job.state == "failed" and job.error is not None
    assert len(llm.requests) <= 8
    assert "labelling_api_key" in job.error.fix
    assert "sk-wrong" not in job.model_dump_json(), "the server repeats it, we do not"


def test_no_key_is_anywhere_but_in_its_file(engine: Engine, llm: LLMServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    def echo(request: Any) -> Any:
        said = f"your key is {request.authorization}"
        faults = [
            Reply(said, status=400),
            Reply(said, status=500) if request.number < 8 else Reply(GOOD),
            Reply(refusal=said),
            Reply({**GOOD, "label": said[:80], "reasoning": said}),
            Reply(said),
        ]
        return faults[about(request) % len(faults)]

    llm.answer = echo
    for features in ([1, 2, 3, 4], [5]):
        ended(engine, label(features=features))
    until(lambda: not engine.jobs.active(), "rest")
    answers = [engine.call(LabellingAttempts(sae="first", index=i)).model_dump_json() for i in range(1, 6)]
    assert any("[secret]" in each for each in answers)
    jobs = "".join(job.model_dump_json() for job in engine.store.all(Job))
    assert KEY not in "".join(answers) + jobs + caplog.text
    holding = [path.name for path in engine.home.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holding == ["secrets.json"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"provider": "token_pattern", "max_usd": 1.0}, "max_usd would do nothing"),
        ({"provider": "token_pattern", "n_examples": 5, "model": "m"}, "model, n_examples would do nothing"),
        ({"base_url": "ftp://x"}, "not the address"),
        ({"base_url": "https://me:pw@h/v1"}, "a name or a password"),
    ],
    ids=["cap", "model", "scheme", "password"],
)
def test_arguments_that_cannot_count_are_refused(
    engine: Engine, llm: LLMServer, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says) as refused:
        engine.call(label(**arguments))
    assert refused.value.fix


def test_what_is_missing_is_named(engine: Engine) -> None:
    with pytest.raises(BadInput, match="Which model"):
        engine.call(label())
    with pytest.raises(BadInput, match="Where does the OpenAI-compatible server listen"):
        engine.call(label(model="m"))


def test_openai_without_a_key_is_refused_before_anything_is_asked(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(BadInput, match="no key for OpenAI"):
        engine.call(label(provider="openai", model="gpt-4o-mini"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert engine.call(label(provider="openai", model="gpt-4o-mini", dry_run=True)).plan


def test_openais_key_goes_to_openai_only(engine: Engine, llm: LLMServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai-0123456789abcdefghij")
    llm.key = None
    with settings(engine, labelling_api_key=None):
        completed(engine, label(features=[1]))
    assert llm.requests[-1].authorization == "Bearer none"
    with settings(engine, openai_base_url=llm.openai_url):
        completed(engine, label(features=[1], provider="openai"))
    assert llm.requests[-1].authorization == "Bearer sk-openai-0123456789abcdefghij"


def test_an_agent_chooses_no_address(engine: Engine, llm: LLMServer) -> None:
    asked = label(features=[1], base_url=llm.openai_url)
    with pytest.raises(Forbidden, match="Only a person") as refused:
        engine.call(asked, caller="agent:claude")
    assert "labelling_base_url" in str(refused.value)
    assert not llm.requests
    done = engine.jobs.wait(engine.call(label(features=[1]), caller="agent:claude").slug, SECONDS)
    assert done.state == "completed", "with the address that a person set it may"
    assert completed(engine, asked).state == "completed"


def test_offline_only_this_machine_is_asked(engine: Engine, llm: LLMServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "offline", True)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(Unsupported, match="MISTUDIO_OFFLINE"):
        engine.call(label(provider="openai", model="gpt-4o-mini"))
    with pytest.raises(Unsupported, match="offline"):
        engine.call(label(base_url="http://192.0.2.1:8000/v1"))
    assert completed(engine, label(features=[1])).state == "completed"


def test_proxies_of_the_environment_are_not_asked_for_this_machine(
    engine: Engine, llm: LLMServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for provider in ("compatible", "ollama"):
        assert completed(engine, label(features=[1], provider=provider)).state == "completed"


def test_the_prompt_of_a_call_is_used(engine: Engine, llm: LLMServer) -> None:
    llm.answer = lambda request: GOOD
    own = {"system_message": "Be brief about {sae}.", "user_prompt": "Look: {examples}\n{layer} {{x}}"}
    completed(engine, label(features=[2], n_examples=3, temperature=0.7, **own))
    (request,) = llm.requests
    assert request.system.startswith("Be brief about first.")
    assert request.user.startswith("Look: <data ") and request.user.endswith("2 {x}")
    assert request.user.count("activations:") == 3 and request.body["temperature"] == 0.7


def test_categories_that_people_and_models_chose_are_shown(engine: Engine, llm: LLMServer) -> None:
    engine.call(SetLabel(feature="sae/first#90", label="cats", category="Animal > Cat"))
    completed(engine, label(features=[91]))
    block = llm.requests[0].user.split("Categories that other features have:")[1]
    assert "Animal > Cat" in block and "After" not in block
