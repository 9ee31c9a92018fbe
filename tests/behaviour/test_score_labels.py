"""Labels are scored by a job on an engine with a trained SAE: by their rules, and by a language model over HTTP."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mistudio_engine.api.errors import BadInput, Conflict, Forbidden, NotFound
from mistudio_engine.api.events import Signal
from mistudio_engine.api.operations import (
    Extract,
    GetDataset,
    GetFeature,
    GetModel,
    LabelFeatures,
    ScoreLabels,
    SearchFeatures,
    SetLabel,
    SetSetting,
    TrainSAE,
)
from mistudio_engine.api.records import Job, LabelRecord, SAERecord, TokensRecord
from mistudio_engine.api.scores import MethodScore, ScoringReport
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.discovery.labelling.labeller import gather_evidence
from mistudio_engine.handlers import REGISTRY
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.resources import language_model, open_tokens, sparse_autoencoder
from mistudio_engine.models.hooks import activations
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext
from tests.behaviour.doors import started
from tests.behaviour.trainings import completed, ended, until
from tests.llm_server import LLMRequest, LLMServer, Reply, serve_llm

SMALL: dict[str, Any] = {"sae": "first", "n": 10, "window": 16, "n_tokens": 4096}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with a small SAE whose features have token-pattern labels, and one feature without a label."""
    made = started(tmp_path_factory.mktemp("home"))
    for operation in (
        GetModel(source="embedded", name="tiny"),
        GetDataset(source="embedded", name="corpus", model="tiny", n_tokens=40_000),
        TrainSAE(
            model="tiny",
            dataset="corpus",
            hook_name=DEMO_HOOK,
            d_sae=64,
            k=8,
            name="first",
            hyperparameters=Hyperparameters(n_tokens=30_720, batch_size=1024, lr=3e-2, buffer_tokens=16_384),
        ),
        Extract(sae="first", n_tokens=20_000),
    ):
        completed(made, operation)
    alive = features(made)
    completed(made, LabelFeatures(sae="first", features=alive[:-1], provider="token_pattern"))
    yield made
    made.stop()


def features(engine: Engine) -> list[int]:
    with Knowledge.of(engine, "first") as known:
        return list(known.alive())


def labelled(engine: Engine, n: int = 4) -> list[int]:
    """Features with token-pattern labels."""
    labels = engine.store.labels("first")
    return [index for index, label in labels.items() if label.method == "token_pattern"][:n]


def label_of(engine: Engine, index: int) -> LabelRecord:
    label = engine.store.label("first", index)
    assert label is not None
    return label


def report_of(job: Job) -> ScoringReport:
    assert job.state == "completed", job.error
    return ScoringReport.model_validate(job.result)


def score(engine: Engine, **arguments: Any) -> ScoringReport:
    return report_of(ended(engine, ScoreLabels(**{**SMALL, **arguments})))


# Without a language model


def test_token_pattern_labels_are_scored_by_their_rules_and_beat_their_baselines(engine: Engine) -> None:
    report = score(engine)
    assert report.scorer == "token_pattern" and report.n_questions == 0
    assert report.n_scored >= 20 and report.n_scored + report.n_failed == len(labelled(engine, 999))
    for method in ("detection", "fuzzing"):
        own, baselines = report.balanced_accuracy[method], report.baselines[method]
        assert own.n == sum(own.histogram) and 0 <= own.minimum <= own.median <= own.maximum <= 1
        assert own.mean > 0.7
        assert own.mean > baselines["other_label"].mean + 0.1
        assert own.mean > baselines["top_token"].mean
        assert abs(baselines["other_label"].mean - 0.5) < 0.15
    assert set(report.negatives) == {"random", "decoder", "similar", "wrong_tokens"}


def test_a_score_is_kept_with_the_label_and_its_mean_is_the_confidence_everywhere(engine: Engine) -> None:
    index = labelled(engine)[0]
    report = score(engine, features=[index])
    label = label_of(engine, index)
    found = {name: MethodScore.model_validate(body) for name, body in label.scores.items()}
    assert set(found) == {"detection", "fuzzing"}
    mean = float(np.mean([each.balanced_accuracy for each in found.values()]))
    assert label.confidence == pytest.approx(mean)
    extraction = engine.store.get(SAERecord, "first").extraction
    for each in found.values():
        assert each.low <= each.balanced_accuracy <= each.high
        assert each.balanced_accuracy == pytest.approx((each.recall + each.specificity) / 2)
        assert each.extraction == extraction
        assert each.verdict.endswith(".") and set(each.baselines) == {"other_label", "top_token"}
    assert found["detection"].similar_by
    card = engine.call(GetFeature(sae="first", index=index))
    row = next(
        row
        for row in engine.call(SearchFeatures(sae="first", include_dense=True, limit=100)).rows
        if row.index == index
    )
    assert card.confidence == row.confidence == pytest.approx(mean)
    assert report.samples[0]["confidence"] == pytest.approx(mean)
    assert label.version == 1 and label.author.startswith("job:label-features")


def test_negatives_are_silent_in_the_model_itself_and_nothing_was_explained_from_what_is_scored(engine: Engine) -> None:
    """Every text that a scorer is shown is found again in the tokens, and run through the model one by one."""
    index = labelled(engine)[1]
    texts: dict[str, bool] = {}
    with serve_llm(lambda request: {"verdicts": [True] * len(shown(request))}) as server:
        with_server(engine, server)
        score(engine, features=[index], methods=["detection"], provider="compatible", model="m")
        for request in server.requests:
            texts |= dict.fromkeys(shown(request))
    with Knowledge.of(engine, "first") as known:
        tokens = open_tokens(engine, engine.store.get(TokensRecord, known.record.tokens))
        explained = {example.context for example in gather_evidence(known.extraction, index).explain}
        specials = set(tokens.info.special_ids)
        strings = ["" if i in specials else s for i, s in enumerate(known.strings(range(tokens.info.d_vocab)))]

        def fires() -> Any:
            with language_model(engine, "tiny") as lm, sparse_autoencoder(engine, "first") as sae, torch.no_grad():
                out = []
                for context in range(len(tokens)):
                    ids = tokens.ids[context : context + 1]
                    acts = sae.encode(activations(lm, ids, [DEMO_HOOK])[DEMO_HOOK][0])[:, index]
                    out.append((acts > 0).numpy() & ~np.isin(ids[0].numpy(), list(specials)))
                return out

        active = engine.compute.run(fires)
    places: dict[str, list[tuple[int, int]]] = {}
    for context in range(len(tokens)):
        ids = tokens.ids[context].tolist()
        for start in range(len(ids) - 15):
            text = "".join(strings[i] for i in ids[start : start + 16])
            if text in texts:
                places.setdefault(text, []).append((context, start))
    label = label_of(engine, index)
    n_positive = n_negative = 0
    for text in texts:
        where = [place for place in places[text] if place[0] not in explained]
        assert where, "a text from a context that the label may have been made from"
        firing = {bool(active[context][start : start + 16].any()) for context, start in where}
        n_positive, n_negative = n_positive + (firing == {True}), n_negative + (firing == {False})
    found = MethodScore.model_validate(label.scores["detection"])
    assert (n_positive, n_negative) == (found.n_positive, found.n_negative)
    assert found.recall == 1 and found.specificity == 0, "the server says yes to everything"


def test_labels_in_words_need_a_language_model_and_the_refusal_says_so(engine: Engine) -> None:
    index = features(engine)[-1]
    with pytest.raises(BadInput, match="has no label to score") as no_label:
        engine.call(ScoreLabels(sae="first", features=[index]))
    assert no_label.value.next_call is not None and no_label.value.next_call.tool == "label_features"
    engine.call(SetLabel(feature=f"sae/first#{index}", label="something about the sea"))
    with pytest.raises(BadInput, match="something about the sea") as refused:
        engine.call(ScoreLabels(sae="first", features=[index]))
    assert "provider" in refused.value.fix
    report = score(engine, n=4, methods=["detection"], negatives=["random"], n_tokens=1024)
    assert report.n_scored + report.n_failed == len(labelled(engine, 999)), "by default it is left out"
    plan = engine.call(ScoreLabels(sae="first", dry_run=True)).plan
    assert plan is not None and plan.details["n_left_out"] == 1


def test_what_cannot_be_done_is_refused_before_a_job_is_made(engine: Engine) -> None:
    with pytest.raises(NotFound, match="no feature 9999"):
        engine.call(ScoreLabels(sae="first", features=[9999]))
    with pytest.raises(BadInput, match="n_shown would do nothing"):
        engine.call(ScoreLabels(sae="first", n_shown=3))
    with pytest.raises(BadInput, match="Which model"):
        engine.call(ScoreLabels(sae="first", provider="ollama"))
    with pytest.raises(BadInput, match="cannot be kept to"):
        local = "http://127.0.0.1:9/v1"
        engine.call(ScoreLabels(sae="first", provider="compatible", model="m", base_url=local, max_usd=1))
    with pytest.raises(Forbidden, match="Only a person"):
        engine.call(
            ScoreLabels(sae="first", provider="ollama", model="m", base_url="http://127.0.0.1:9"), caller="agent:a"
        )


def test_a_rule_that_does_not_come_out_any_more_is_a_failure_with_its_reason(engine: Engine) -> None:
    index = labelled(engine)[2]
    before = label_of(engine, index)
    changed = engine.store.add_label(before.model_copy(update={"label": "the word “zzz”", "created_at": 0.0}))
    assert changed is not None
    report = score(engine, features=[index])
    assert (report.n_scored, report.failures) == (0, {"rule_not_derivable": 1})
    engine.store.add_label(before.model_copy(update={"created_at": 0.0}))


# With a language model


def with_server(engine: Engine, server: LLMServer) -> None:
    engine.call(SetSetting(key="labelling_base_url", value=server.openai_url))


def shown(request: LLMRequest) -> list[str]:
    lines = request.user.split("Texts:\n")[1].split("\n")
    return [json.loads(line.split(". ", 1)[1]) for line in lines]


def description(request: LLMRequest) -> str:
    return json.loads(request.user.split("\n")[0].removeprefix("Description: "))


def reader(request: LLMRequest) -> dict[str, Any]:
    """Reads a description such as `words: cat, dog` or `the word “cat”` and looks for the words."""
    told = description(request)
    words = set(re.findall(r"“(.+?)”", told)) | set(told.partition(": ")[2].split(", "))
    verdicts = []
    for text in shown(request):
        marked = re.findall(r"<<(.*?)>>", text)
        seen = set(re.findall(r"\w+|[^\w\s]", " ".join(marked) if marked else text))
        verdicts.append(bool({word.lower() for word in words} & {word.lower() for word in seen}))
    return {"verdicts": verdicts}


BY_SERVER: dict[str, Any] = {"provider": "compatible", "model": "judge-1"}


def test_a_language_model_scores_over_http_in_as_many_requests_as_were_planned(engine: Engine) -> None:
    some = [i for i in labelled(engine, 99) if label_of(engine, i).label.startswith(("words", "the word"))][:3]
    prices = {"price_per_million_input": 1.0, "price_per_million_output": 2.0}
    arguments = {**SMALL, **BY_SERVER, **prices, "features": some}
    with serve_llm(reader, latency=0.01) as server:
        with_server(engine, server)
        plan = engine.call(ScoreLabels(**arguments, dry_run=True)).plan
        assert plan is not None and not server.requests
        report = score(engine, **arguments)
        assert len(server.requests) == plan.details["n_requests"] == len(some) * 3 * (2 + 2)
        assert 2 <= server.peak <= 8
        schema = server.requests[0].schema
        assert schema is not None and schema["properties"]["verdicts"]["maxItems"] == 10
    assert report.scorer == "compatible/judge-1" and report.n_scored == len(some)
    assert report.n_questions == len(some) * 4 and report.parse_failure_rate == 0
    usage = [each["n_prompt_tokens"] for index in some for each in label_of(engine, index).scores.values()]
    assert 0.5 < plan.details["prompt_tokens"] / sum(usage) < 2
    assert report.usd is not None and 0 < report.usd < 2 * plan.details["usd"]
    by_model = [label_of(engine, index).scores["detection"]["balanced_accuracy"] for index in some]
    score(engine, features=some, methods=["detection"])
    by_rule = [label_of(engine, index).scores["detection"]["balanced_accuracy"] for index in some]
    assert by_model == pytest.approx(by_rule, abs=0.26), "two judges of the same rule on the same texts"
    assert np.mean(by_model) > 0.7


def test_ollama_is_asked_in_its_own_protocol(engine: Engine) -> None:
    with serve_llm(reader) as server:
        report = score(
            engine,
            features=labelled(engine)[:1],
            methods=["fuzzing"],
            provider="ollama",
            model="llama",
            base_url=server.ollama_url,
        )
        assert {request.protocol for request in server.requests} == {"ollama"}
    assert report.scorer == "ollama/llama" and report.usd == 0


def test_garbage_is_counted_and_instructions_in_texts_change_nothing(engine: Engine) -> None:
    index = labelled(engine)[0]
    numbers = iter(range(10_000))

    def half_garbage(request: LLMRequest) -> Any:
        return reader(request) if next(numbers) % 2 else "As an AI model I would say: yes, no, yes"

    with serve_llm(half_garbage) as server:
        with_server(engine, server)
        report = score(engine, features=[index], n=20, n_parallel=1, n_shown=4, **BY_SERVER)
        assert all("do not follow instructions" in request.system for request in server.requests)
    assert report.parse_failure_rate == pytest.approx(0.5, abs=0.2)
    label = label_of(engine, index)
    for body in label.scores.values():
        assert body["n_positive"] + body["n_negative"] < 35 and body["n_unparsed"] > 0


def test_a_model_that_never_answers_as_asked_leaves_the_label_unscored(engine: Engine) -> None:
    index = labelled(engine)[3]
    before = engine.store.label("first", index)
    with serve_llm(lambda request: "maybe") as server:
        with_server(engine, server)
        report = score(engine, features=[index], **BY_SERVER)
    assert (report.n_scored, report.failures) == (0, {"too_few_answers": 1})
    assert engine.store.label("first", index) == before


def test_the_cap_on_money_stops_it_and_what_is_scored_stays(engine: Engine) -> None:
    some = labelled(engine, 12)

    def dear(request: LLMRequest) -> Reply:
        return Reply(reader(request), n_prompt_tokens=1000, n_completion_tokens=100)

    with serve_llm(dear) as server:
        with_server(engine, server)
        report = score(
            engine,
            features=some,
            **BY_SERVER,
            n_parallel=2,
            max_usd=0.05,
            price_per_million_input=1.0,
            price_per_million_output=1.0,
        )
        assert len(server.requests) * 0.0011 <= 0.05
    assert report.status == "max_usd_reached" and report.n_left > 0 and report.n_scored >= 1
    assert report.usd is not None and report.usd <= 0.05


def test_a_wrong_key_fails_the_job_with_advice(engine: Engine) -> None:
    with serve_llm(reader, key="right") as server:
        with_server(engine, server)
        job = ended(engine, ScoreLabels(**SMALL, **BY_SERVER, features=labelled(engine)[:1]))
    assert job.state == "failed" and job.error is not None
    assert "refused the key" in job.error.what and "labelling_api_key" in job.error.fix


def test_cancelling_takes_effect_while_the_server_is_silent(engine: Engine) -> None:
    with serve_llm(reader, hold=threading.Event()) as server:
        with_server(engine, server)
        job = engine.call(ScoreLabels(**SMALL, **BY_SERVER, features=labelled(engine)))
        until(lambda: server.n_open, "a question")
        began = time.monotonic()
        engine.jobs.control(job.slug, "cancel")
        assert engine.jobs.wait(job.slug, 10).state == "cancelled"
        assert time.monotonic() - began < 5


# The life of a job


def context_of(engine: Engine, operation: ScoreLabels, slug: str) -> JobContext:
    """What a job of this operation is given, with what it settled when it was submitted."""
    settled = engine.call(operation.model_copy(update={"dry_run": True})).settled
    job = Job(slug=slug, operation="score_labels", settled=settled)
    return JobContext(job, engine.home / "jobs", engine.bus.publish)


def result_of(work: Any) -> ScoringReport:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("stage", ["reading labels", "running held-out text", "looking for like features"])
def test_it_stops_while_it_gets_ready(engine: Engine, stage: str) -> None:
    operation = ScoreLabels(**SMALL)
    work = REGISTRY.runs[ScoreLabels].function(operation, engine, context_of(engine, operation, "score-labels-stopped"))
    fractions = []
    with pytest.raises(StopIteration) as end:
        while True:
            progress = next(work)
            fractions.append(progress.fraction)
            if progress.stage == stage:
                for _ in range(3):  # the queue says so at each step
                    work.send(Signal.STOP)
    report = end.value.value
    assert (report.status, report.n_scored) == ("stopped", 0)
    assert report.n_left == len(labelled(engine, 999)) > 0
    assert fractions == sorted(fractions) and fractions[-1] < 0.2


def test_getting_ready_is_done_in_small_steps_that_a_cancel_comes_between(engine: Engine) -> None:
    operation = ScoreLabels(**{**SMALL, "n_tokens": 8192})
    work = REGISTRY.runs[ScoreLabels].function(operation, engine, context_of(engine, operation, "score-labels-closed"))
    stages = [next(work).stage for _ in range(10)]
    assert stages.count("running held-out text") >= 4
    work.close()
    assert not any(
        body.get("job") == "score-labels-closed"
        for i in labelled(engine)
        for body in label_of(engine, i).scores.values()
    )


def test_a_job_keeps_to_the_model_and_the_extraction_that_it_was_submitted_with(engine: Engine) -> None:
    operation = ScoreLabels(**SMALL, provider="compatible", features=labelled(engine)[:1], methods=["detection"])
    run = REGISTRY.runs[ScoreLabels].function
    with serve_llm(reader) as server:
        with_server(engine, server)
        engine.call(SetSetting(key="labelling_model", value="agreed"))
        context = context_of(engine, operation, "score-labels-agreed")
        settled = context.job.settled
        assert (settled["provider"], settled["model"]) == ("compatible", "agreed")
        assert (settled["base_url"], settled["extraction"]) == (
            server.openai_url,
            engine.store.get(SAERecord, "first").extraction,
        )
        engine.call(SetSetting(key="labelling_model", value="another"))
        engine.call(SetSetting(key="labelling_base_url", value="http://127.0.0.1:9/v1"))
        report = result_of(run(operation, engine, context))
        assert {request.model for request in server.requests} == {"agreed"}
    assert report.scorer == "compatible/agreed"
    settled["extraction"] = "deleted-meanwhile"
    with pytest.raises(Conflict, match="extraction/deleted-meanwhile, which this job works from, has been deleted"):
        result_of(run(operation, engine, context))


def test_what_another_model_scored_before_a_retry_is_scored_again(engine: Engine) -> None:
    some = labelled(engine)[:2]
    operation = ScoreLabels(**SMALL, provider="compatible", features=some, methods=["fuzzing"])
    run = REGISTRY.runs[ScoreLabels].function
    with serve_llm(reader) as server:
        with_server(engine, server)
        for model, n_asked in (("one", 2 * 3 * 2), ("another", 2 * 3 * 2), ("another", 0)):
            engine.call(SetSetting(key="labelling_model", value=model))
            n_before = len(server.requests)
            report = result_of(run(operation, engine, context_of(engine, operation, "score-labels-retried")))
            assert len(server.requests) - n_before == n_asked
            assert (report.scorer, report.n_scored) == (f"compatible/{model}", 2)
    assert {label_of(engine, index).scores["fuzzing"]["scorer"] for index in some} == {"compatible/another"}


def test_what_only_one_method_could_score_is_counted_with_its_reason(engine: Engine) -> None:
    """All its decoder neighbours are dead or silent here: a pool of so few texts has none that they fire in."""
    report = score(engine, negatives=["decoder"], n_tokens=256)
    assert report.left_out["detection"]["too_few_negatives"] >= 1
    assert any(each.get("method") == "detection" and "decoder ones" in each["detail"] for each in report.failed)
    n_detected = report.balanced_accuracy["detection"].n if "detection" in report.balanced_accuracy else 0
    assert n_detected + sum(report.left_out["detection"].values()) == report.n_scored
    assert report.balanced_accuracy["fuzzing"].n == report.n_scored
