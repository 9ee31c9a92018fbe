"""A training is paused, stopped and cancelled at any time, and leaves what it should."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mistudio_engine.api.errors import BadInput, Conflict
from mistudio_engine.api.operations import (
    DeleteTraining,
    DeleteTrainings,
    EvalSAE,
    ExtendTraining,
    GetDataset,
    GetModel,
    ListTrainings,
    StopTraining,
    TrainSAE,
)
from mistudio_engine.api.records import Job, ModelRecord, SAERecord, TokensRecord
from mistudio_engine.runtime.engine import Engine
from tests.behaviour.trainings import (
    SECONDS,
    assert_same_bits,
    completed,
    ended,
    endless,
    history,
    parts,
    running,
    steered,
    tensors,
    train,
    training_of,
    until,
)

LONG = {"n_tokens": 102_400, "checkpoint_interval": 8192}


def test_a_training_that_was_paused_has_the_same_bits(engine: Engine) -> None:
    completed(engine, train(name="calm", **LONG))
    with steered(engine, train(name="uneasy", **LONG)) as job:
        for fraction in (0.1, 0.4, 0.7):
            until(lambda least=fraction: (engine.jobs.get(job.slug).progress or 0) > least, "some progress")
            engine.jobs.control(job.slug, "pause")
            paused = engine.jobs.wait(job.slug, 10)
            assert (paused.state, training_of(engine, "uneasy").status) == ("paused", "paused")
            assert paused.checkpoint is not None
            assert all(not each.in_use for each in engine.memory.loaded()), "a paused training holds no memory"
            engine.jobs.control(job.slug, "resume")
        assert engine.jobs.wait(job.slug, SECONDS).state == "completed"
    assert_same_bits(tensors(engine, "calm"), tensors(engine, "uneasy"))
    assert history(engine, "uneasy") == history(engine, "calm"), "nothing is said twice and nothing is left out"


def test_a_stopped_training_leaves_a_usable_sae_and_can_be_extended(engine: Engine) -> None:
    with running(engine, endless(name="stopped"), n_tokens=5120) as job:
        engine.call(StopTraining(training="stopped"))
        done = engine.jobs.wait(job.slug, 10)
    assert done.state == "completed"
    n_tokens = int(done.metrics["n_tokens"])
    measured = completed(engine, EvalSAE(sae="stopped", n_tokens=1024)).result
    assert measured is not None and 0 < measured["fvu"] < 2
    again = completed(engine, ExtendTraining(training="stopped", n_tokens=4096))
    hp = training_of(engine, "stopped").hyperparameters
    assert 5120 < hp["n_tokens"] < 50_000_000, "it goes on from where it was stopped, not to where it would have ended"
    assert int(again.metrics["n_tokens"]) == hp["n_tokens"] >= n_tokens + 4096


def test_a_training_that_waits_cannot_be_stopped_but_cancelled(engine: Engine) -> None:
    with running(engine, endless(name="ahead")):
        waiting = engine.call(endless(name="too-early"))
        with pytest.raises(Conflict, match="Possible now: cancel, pause"):
            engine.call(StopTraining(training="too-early"))
        assert engine.jobs.control(waiting.slug, "cancel").state == "cancelled"
    assert training_of(engine, "too-early").status == "cancelled"


@pytest.fixture(scope="module")
def slow(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model that takes its time, with the tiny one's tokenizer and tokens of its own."""
    folder = tmp_path_factory.mktemp("slow")
    shutil.copytree(engine.home / engine.store.get(ModelRecord, "tiny").folder, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 32}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**config, **sizes})).save_pretrained(folder)
    completed(engine, GetModel(source=str(folder), name="slow"))
    completed(engine, GetDataset(source="embedded", name="corpus", model="slow", n_tokens=40_000))
    return "slow"


STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "training": ("training", {}),
    "evaluating": ("evaluating", {"eval_tokens": 40_000, "checkpoint_interval": 512}),
    "running the model": ("running the model", {"buffer_tokens": 40_000}),
    "caching": ("caching activations", {"activations": "cached"}),
}


@contextmanager
def at_stage(engine: Engine, word: str, operation: TrainSAE) -> Iterator[Job]:
    """The job of a training that is at this stage."""
    with steered(engine, operation) as job:
        until(lambda: (engine.jobs.get(job.slug).stage or "").startswith(word), word)
        yield job


@pytest.mark.parametrize("stage", STAGES)
def test_cancelling_takes_effect_at_once_and_frees_what_was_held(engine: Engine, slow: str, stage: str) -> None:
    word, settings = STAGES[stage]
    n_saes = len(engine.store.all(SAERecord))
    with at_stage(engine, word, endless(model=slow, d_sae=256, **settings)) as job:
        began = time.monotonic()
        engine.jobs.control(job.slug, "cancel")
        assert engine.jobs.wait(job.slug, 10).state == "cancelled"
        assert time.monotonic() - began < 5
    engine.compute.run(lambda: None)
    assert_nothing_is_held(engine)
    assert parts(engine) == []
    assert not (engine.home / "jobs" / job.slug).exists()
    assert len(engine.store.all(SAERecord)) == n_saes


@pytest.mark.parametrize("stage", STAGES)
def test_pausing_takes_effect_at_once_too(engine: Engine, slow: str, stage: str) -> None:
    word, settings = STAGES[stage]
    with at_stage(engine, word, endless(model=slow, d_sae=256, **settings)) as job:
        began = time.monotonic()
        engine.jobs.control(job.slug, "pause")
        assert engine.jobs.wait(job.slug, 10).state == "paused"
        assert time.monotonic() - began < 6
        assert_nothing_is_held(engine)


def assert_nothing_is_held(engine: Engine) -> None:
    loaded = engine.memory.loaded()
    assert all(not each.in_use for each in loaded)
    unused = engine.memory.capacity(engine.device) - sum(each.n_bytes for each in loaded)
    assert engine.memory.free_bytes(engine.device) == unused, "nothing is set aside any more"


@pytest.mark.slow
def test_a_hundred_trainings_begun_and_cancelled_leak_neither_memory_nor_threads(engine: Engine) -> None:
    completed(engine, train(name="warm"))
    n_threads, n_tensors, n_bytes = 0, 0, 0
    for number in range(100):
        with steered(engine, endless(seed=number)) as job:
            if number % 3:
                until(lambda slug=job.slug: engine.jobs.get(slug).metrics, "a first step")
            if number % 5 == 0:
                engine.jobs.control(job.slug, "pause")
                assert engine.jobs.wait(job.slug, 10).state == "paused"
        if number == 20:
            n_threads, n_tensors, n_bytes = measured(engine)
    now = measured(engine)
    assert now[0] <= n_threads
    assert now[1] <= n_tensors
    assert now[2] - n_bytes < 32 << 20, "eighty trainings hold 5 MiB each while they run"
    assert_nothing_is_held(engine)
    assert parts(engine) == []


def measured(engine: Engine) -> tuple[int, int, int]:
    """Threads, tensors and bytes of this process, once nothing runs."""
    engine.compute.run(lambda: None)
    gc.collect()
    n_tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    return threading.active_count(), n_tensors, psutil.Process().memory_info().rss


def test_what_runs_cannot_be_deleted_and_the_rest_is(engine: Engine) -> None:
    for name in ("one-to-go", "other-to-go"):
        completed(engine, train(name=name))
    with running(engine, endless(name="busy")):
        names = ["one-to-go", "busy", "training/other-to-go", "nobody", "one-to-go"]
        said = engine.call(DeleteTrainings(trainings=names))
        assert [each.ref for each in said.deleted] == ["training/one-to-go", "training/other-to-go"]
        assert said.refused.keys() == {"training/busy", "training/nobody"}
        assert "Stop or cancel it first" in said.refused["training/busy"]
        assert said.freed_bytes == sum(each.freed_bytes for each in said.deleted) > 0
        assert not (engine.home / "trainings" / "one-to-go").exists()
        assert engine.store.get(SAERecord, "one-to-go").training is None, "its SAE stays, on its own"
    rows = {row.slug: row.status for row in engine.call(ListTrainings(limit=200)).rows}
    assert rows["busy"] == "cancelled" and "one-to-go" not in rows
    said = engine.call(DeleteTrainings(trainings=["busy"]))
    assert [each.ref for each in said.deleted] == ["training/busy"] and not said.refused


def test_a_paused_training_that_is_deleted_does_not_come_back(engine: Engine) -> None:
    with running(engine, endless(name="resting")) as job:
        engine.jobs.control(job.slug, "pause")
        assert engine.jobs.wait(job.slug, 10).state == "paused"
        engine.call(DeleteTraining(training="resting"))
        assert engine.jobs.get(job.slug).state == "cancelled"
    assert ended(engine, train(name="after-it")).state == "completed"


def test_two_calls_with_one_key_are_one_training(engine: Engine) -> None:
    first = engine.call(train(name="only-once", idempotency_key="only-once"))
    again = engine.call(train(name="only-once", idempotency_key="only-once"))
    assert again.slug == first.slug
    assert engine.jobs.wait(first.slug, SECONDS).state == "completed"
    assert engine.call(train(name="only-once", idempotency_key="only-once")).state == "completed"
    with pytest.raises(Conflict, match="another call"):
        engine.call(train(name="another", idempotency_key="only-once"))
    key = {"training": "only-once", "n_tokens": 2048, "idempotency_key": "once-more"}
    jobs = {completed(engine, ExtendTraining(**key)).slug for _ in range(2)}
    assert len(jobs) == 1 and training_of(engine, "only-once").saes == ["only-once", "only-once-2"]


def test_tokens_of_another_model_are_refused(engine: Engine, slow: str) -> None:
    (tokens,) = engine.store.all(TokensRecord, model=slow)
    with pytest.raises(BadInput, match="made for model/slow"):
        engine.call(train(dataset=f"tokens/{tokens.slug}"))
