"""What explodes ends with advice, and with weights that are still numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio_engine.api.errors import NotFound
from mistudio_engine.api.operations import (
    EvalSAE,
    ExtendTraining,
    GetDataset,
    GetModel,
    KeepCheckpoint,
    ListEvents,
    TrainingCheckpoints,
)
from mistudio_engine.api.records import Job, ModelRecord, SAERecord
from mistudio_engine.runtime.engine import Engine
from tests.behaviour.trainings import completed, ended, history, tensors, tensors_in, train, training_of

WILD = {"lr": 0.99, "lr_warm_up_fraction": 0.0, "n_tokens": 65_536}
"""Weights that move by one a step; a TopK SAE cannot save itself by letting its features die."""


def warnings(engine: Engine, job: Job) -> list[str]:
    events = engine.call(ListEvents(channels=f"jobs/{job.slug}")).events
    return [event.data["message"] for event in events if event.event == "warning"]


def assert_finite_on_disk(engine: Engine, training: str) -> None:
    folders = list((engine.home / "trainings" / training).rglob("state.safetensors"))
    assert folders
    for path in folders:
        assert all(t.isfinite().all() for t in tensors_in(path.parent).values() if t.is_floating_point()), path


@pytest.fixture(scope="module")
def wild(engine: Engine) -> Job:
    """The failed job of a training with far too large a learning rate, `wild`."""
    job = ended(engine, train(name="wild", checkpoint_interval=2048, **WILD))
    assert job.state == "failed"
    return job


def test_an_explosion_ends_the_training_with_advice(engine: Engine, wild: Job) -> None:
    assert wild.error is not None and wild.error.code == "job_failed"
    assert "training has diverged" in wild.error.what
    assert "lr is 0.99" in wild.error.why
    assert "lower lr" in wild.error.fix and "last checkpoint is finite" in wild.error.fix
    record = training_of(engine, "wild")
    assert (record.status, record.saes) == ("failed", [])
    assert record.members[0].failure.what == wild.error.what
    assert not engine.store.exists(SAERecord, "wild")
    assert history(engine, "wild"), "what was measured until then is there"


def test_its_last_finite_checkpoint_can_be_kept(engine: Engine, wild: Job) -> None:
    assert_finite_on_disk(engine, "wild")
    names = [row.name for row in engine.call(TrainingCheckpoints(training="wild")).rows]
    assert names
    kept = engine.call(KeepCheckpoint(training="wild", checkpoint="last", name="before-the-end"))
    assert all(tensor.isfinite().all() for tensor in tensors(engine, kept.slug).values())
    assert completed(engine, EvalSAE(sae="before-the-end", n_tokens=512)).result


def test_in_a_sweep_the_others_are_finished_and_the_record_says_which_failed(engine: Engine) -> None:
    variants = [
        {"name": "wild", "hyperparameters": {"lr": 0.99}},
        {"name": "tame"},
        {"name": "other", "architecture": "standard"},
    ]
    call = train(name="mixed", variants=variants, checkpoint_interval=8192, **{**WILD, "lr": 2e-3})
    job = completed(engine, call)
    record = training_of(engine, "mixed")
    assert record.saes == ["mixed-tame", "mixed-other"]
    assert not engine.store.exists(SAERecord, "mixed-wild")
    failures = {each.name: each.failure for each in record.members}
    assert "training has diverged" in failures["wild"].what and failures["wild"].fix
    assert (failures["tame"], failures["other"]) == (None, None)
    assert any(message.startswith("wild goes on no further.") for message in warnings(engine, job))
    assert job.result is not None and job.result["slug"] == "mixed-tame"
    assert record.tokens_per_second and record.tokens_per_second > 100
    assert_finite_on_disk(engine, "mixed")
    kept = engine.call(KeepCheckpoint(training="mixed", checkpoint="last", member="wild"))
    assert all(tensor.isfinite().all() for tensor in tensors(engine, kept.slug).values())

    alone = completed(engine, train(name="alone", **{**WILD, "lr": 2e-3, "checkpoint_interval": 8192})).result
    assert alone is not None
    one, other = tensors(engine, "mixed-tame"), tensors(engine, "alone")
    assert all(torch.equal(one[name], other[name]) for name in one), "who failed beside it has changed nothing"

    completed(engine, ExtendTraining(training="mixed", n_tokens=8192))
    record = training_of(engine, "mixed")
    assert record.saes[-2:] == ["mixed-tame-2", "mixed-other-2"]
    assert record.members[0].failure, "what failed once is not revived by more of the same"


@pytest.fixture(scope="module")
def hot(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a last layer whose output overflows."""
    folder = tmp_path_factory.mktemp("hot")
    shutil.copytree(engine.home / engine.store.get(ModelRecord, "tiny").folder, folder, dirs_exist_ok=True)
    (path,) = Path(folder).glob("*.safetensors")
    weights = load_file(path)
    for name in ("up_proj", "down_proj"):
        weight = weights[f"model.layers.3.mlp.{name}.weight"]
        weight *= 1e30 / weight.abs().max()
    save_file(weights, path, metadata={"format": "pt"})
    completed(engine, GetModel(source=str(folder), name="hot"))
    completed(engine, GetDataset(source="embedded", name="corpus", model="hot", n_tokens=20_000))
    return "hot"


def test_activations_that_overflow_end_the_training_with_advice(engine: Engine, hot: str) -> None:
    job = ended(engine, train(model=hot, hook_name="blocks.3.hook_resid_post", name="too-hot"))
    assert job.state == "failed" and job.error is not None
    assert "mean norm is" in job.error.what
    assert "overflows" in job.error.why and "fp32 or bf16" in job.error.fix
    assert training_of(engine, "too-hot").saes == []
    with pytest.raises(NotFound, match="no checkpoint"):
        engine.call(KeepCheckpoint(training="too-hot"))


def test_in_a_sweep_over_hooks_only_those_that_overflow_fail(engine: Engine, hot: str) -> None:
    variants = [
        {"name": "hot", "hook_name": "blocks.3.hook_resid_post"},
        {"name": "cool", "hook_name": "blocks.2.hook_resid_post"},
    ]
    job = completed(engine, train(model=hot, name="half-hot", variants=variants))
    record = training_of(engine, "half-hot")
    assert record.saes == ["half-hot-cool"]
    failures = {each.name: each.failure for each in record.members}
    assert "mean norm is" in failures["hot"].what and failures["cool"] is None
    assert any("hot goes on no further" in message for message in warnings(engine, job))
    assert_finite_on_disk(engine, "half-hot")
