"""A training made again from what is recorded of it has the same bits, and what differs is named."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio_engine.api.errors import Cancelled, Conflict, MistudioError, NotFound, Unsupported
from mistudio_engine.api.home import EngineFile, write_engine_file
from mistudio_engine.api.operations import (
    ControlJob,
    DeleteSAE,
    GetDataset,
    Reproduce,
    ShowJob,
    ShowTraining,
    StopTraining,
    TrainSAE,
)
from mistudio_engine.api.presets import L1_PER_ROOT_WIDTH
from mistudio_engine.api.records import SAERecord, TrainingRecord
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.server.cli import main
from tests.behaviour.doors import Served

TRAIN: dict[str, Any] = {"model": "tiny", "dataset": "recorded", "hook_name": DEMO_HOOK, "d_sae": 64, "k": 8, "seed": 3}
SMALL = {"n_tokens": 4096, "batch_size": 512, "buffer_tokens": 4096}


def done(engine: Engine, operation: Any) -> Any:
    """The job of an operation at its end."""
    return engine.jobs.wait(engine.call(operation).slug, 100)


@pytest.fixture(scope="module")
def engine(studio: Served) -> Engine:
    """One that has trained `once`, on a dataset that no other test tokenises or counts on."""
    tokens = GetDataset(source="embedded", name="recorded", model="tiny", n_tokens=40_000)
    assert done(studio.engine, tokens).state == "completed"
    job = done(studio.engine, TrainSAE(**TRAIN, name="once", hyperparameters=SMALL))  # type: ignore[arg-type]
    assert job.state == "completed", job.error
    return studio.engine


def reproduced(engine: Engine, ref: str, **arguments: Any) -> Any:
    job = done(engine, Reproduce(ref=ref, **arguments))
    assert job.state == "completed", job.error
    return engine.store.get(TrainingRecord, job.result["made"].partition("/")[2]), job.result


@pytest.mark.parametrize("ref", ["training/once", "sae/once"])
def test_the_same_training_has_the_same_bits(engine: Engine, ref: str) -> None:
    # By now the dataset has another tokenisation, which is the newest: the old one is what counts.
    tokens = GetDataset(source="embedded", name="recorded", model="tiny", n_tokens=40_000, context_size=64)
    assert done(engine, tokens).state == "completed"
    made, result = reproduced(engine, ref)
    assert result["identical"] and not result["differing"] and not result["changes"]
    assert result["n_tensors"] >= 4
    assert made.slug.startswith("once-again") and made.saes == [made.slug]
    assert "are identical" in result["summary"]
    assert made.tokens == engine.store.get(TrainingRecord, "once").tokens


def test_what_differs_is_named_with_what_has_changed_since(engine: Engine) -> None:
    done(engine, TrainSAE(**TRAIN, name="touched", hyperparameters=SMALL))  # type: ignore[arg-type]
    path = engine.home / engine.store.get(SAERecord, "touched").folder / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["b_enc"] = torch.nextafter(tensors["b_enc"], torch.tensor(9.0))
    save_file(tensors, path)
    record = engine.store.get(TrainingRecord, "touched")
    older = {**record.provenance, "torch": "1.0", "model": {**record.provenance["model"], "sha256": "other"}}
    engine.store.update(TrainingRecord, "touched", provenance=older)
    _, result = reproduced(engine, "training/touched", name="made-anew")
    assert not result["identical"]
    assert result["differing"] == ["sae_weights/b_enc"]
    changes = {change["what"]: change["then"] for change in result["changes"]}
    assert changes == {"torch": "1.0", "model.sha256": "other"}
    assert result["made"] == "training/made-anew"
    assert "torch was '1.0'" in result["summary"]


def test_a_setting_that_was_left_open_and_is_another_today_is_named(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {name: value for name, value in TRAIN.items() if name != "k"}
    done(engine, TrainSAE(**call, architecture="standard", name="open", hyperparameters=SMALL))  # type: ignore[arg-type]
    then = engine.store.get(TrainingRecord, "open").members[0].hyperparameters["l1_coefficient"]
    monkeypatch.setitem(L1_PER_ROOT_WIDTH["relu"], "balanced", 2 * L1_PER_ROOT_WIDTH["relu"]["balanced"])
    _, result = reproduced(engine, "training/open")
    assert not result["identical"]
    (change,) = result["changes"]
    assert change["what"] == "members.sae.hyperparameters.l1_coefficient"
    assert (change["then"], change["now"]) == (then, pytest.approx(2 * then, rel=1e-2))


@pytest.mark.parametrize(("ref", "status", "says"), [("training/once", 0, "identical"), ("sae/touched", 1, "differ")])
def test_the_command_ends_with_1_when_it_differs(
    engine: Engine, studio: Served, capsys: pytest.CaptureFixture[str], ref: str, status: int, says: str
) -> None:
    here = EngineFile(url=studio.url, token=engine.token, pid=os.getpid(), version="", epoch=engine.epoch, started_at=0)
    path = write_engine_file(engine.home, here)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["reproduce", ref, "--home", str(engine.home)])
    finally:
        path.unlink()
    assert ended.value.code == status
    assert says in capsys.readouterr().out


def test_a_plan_says_what_it_would_cost(engine: Engine) -> None:
    plan = engine.call(Reproduce(ref="training/once", dry_run=True)).plan
    assert plan is not None and plan.details["n_steps"] == 8
    assert "training/once again" in plan.summary


def refusal(engine: Engine, ref: str) -> MistudioError:
    with pytest.raises(MistudioError) as refused:
        engine.call(Reproduce(ref=ref))
    assert refused.value.fix
    return refused.value


def test_what_cannot_be_made_again_is_refused(engine: Engine) -> None:
    assert isinstance(refusal(engine, "training/nobody"), NotFound)
    assert isinstance(refusal(engine, "sae/nobody"), NotFound)
    with pytest.raises(ValueError, match="cannot be made again"):
        Reproduce(ref="dataset/corpus")
    done(engine, TrainSAE(**TRAIN, name="gone", hyperparameters=SMALL))  # type: ignore[arg-type]
    engine.call(DeleteSAE(sae="gone"))
    assert "Deleted: gone" in str(refusal(engine, "training/gone"))
    long = {**SMALL, "n_tokens": 50_000_000}
    job = engine.call(TrainSAE(**TRAIN, name="left-half-way", hyperparameters=long))  # type: ignore[arg-type]
    assert isinstance(refusal(engine, f"job/{job.slug}"), Conflict)
    while engine.call(ShowJob(job=job.slug)).metrics.get("n_tokens", 0) < 1024:
        engine.jobs.wait(job.slug, 0.1)
    engine.call(StopTraining(training="left-half-way"))
    assert engine.jobs.wait(job.slug, 60).state == "completed"
    assert isinstance(refusal(engine, "training/left-half-way"), Unsupported)


def test_cancelling_it_cancels_the_training_and_pausing_pauses_it(engine: Engine) -> None:
    long = {**SMALL, "n_tokens": 5_000_000}
    done(engine, TrainSAE(**TRAIN, name="long", hyperparameters={**SMALL, "n_tokens": 8192}))  # type: ignore[arg-type]
    job = engine.jobs.get(engine.call(ShowTraining(training="long")).jobs[-1])
    arguments = {**job.arguments, "hyperparameters": {**job.arguments["hyperparameters"], **long}}
    engine.store.update(type(job), job.slug, arguments=arguments)  # as if it had been a long one
    ours = engine.call(Reproduce(ref="training/long"))
    training = _state_of(engine, "long-again", "running")
    engine.call(ControlJob(job=ours.slug, action="pause"))
    assert engine.jobs.wait(ours.slug, 30).state == "paused"
    assert engine.jobs.wait(training, 30).state == "paused"
    engine.call(ControlJob(job=ours.slug, action="resume"))
    assert _state_of(engine, "long-again", "running") == training, "the same training goes on"
    engine.call(ControlJob(job=ours.slug, action="cancel"))
    assert engine.jobs.wait(ours.slug, 30).state == "cancelled"
    assert engine.jobs.wait(training, 30).state == "cancelled"


def test_it_ends_with_its_training(engine: Engine) -> None:
    ours = engine.call(Reproduce(ref="training/long"))
    training = _state_of(engine, "long-again-2", "running")
    engine.call(ControlJob(job=training, action="cancel"))
    ended = engine.jobs.wait(ours.slug, 30)
    assert ended.state == "failed" and ended.error and ended.error.code == Cancelled.code


def _state_of(engine: Engine, training: str, state: str) -> str:
    """The job of a training, once it is in this state."""
    for _ in range(1500):
        if engine.store.exists(TrainingRecord, training):
            jobs = engine.store.get(TrainingRecord, training).jobs
            if jobs and engine.jobs.get(jobs[-1]).state == state:
                return jobs[-1]
        threading.Event().wait(0.02)
    raise AssertionError(f"training/{training} is not {state}")
