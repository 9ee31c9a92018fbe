"""A plan says what a training will cost, and what does not fit is refused with what does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mistudio_engine.api.errors import OutOfMemory
from mistudio_engine.api.operations import ExtendTraining, TrainSAE
from mistudio_engine.api.records import ModelRecord, Plan, TrainingRecord
from mistudio_engine.runtime.engine import Engine
from tests.behaviour.trainings import completed, train

MIB = 1 << 20


def plan_of(engine: Engine, operation: TrainSAE) -> Plan:
    plan = engine.call(operation.model_copy(update={"dry_run": True})).plan
    assert plan is not None
    return plan


def test_the_estimate_is_right_within_a_factor_of_four_and_then_measured(engine: Engine) -> None:
    call = train(n_tokens=204_800, d_sae=320, batch_size=1024, buffer_tokens=16_384, eval_tokens=None)
    before = plan_of(engine, call)
    assert before.seconds is not None
    assert before.details["rate_is"] == "estimated from this machine's speed"
    for name in ("timed", "timed-again", "timed-once-more"):  # the machine may be busy with something else
        began = time.monotonic()
        completed(engine, call.model_copy(update={"name": name}))
        took = time.monotonic() - began
        if took / 4 < before.seconds < took * 4:
            break
    assert took / 4 < before.seconds < took * 4
    after = plan_of(engine, call.model_copy(update={"name": None}))
    assert after.details["rate_is"] == "measured in an earlier training"
    assert after.seconds is not None and took / 2 < after.seconds < took * 2


def test_a_plan_has_the_numbers_of_every_sae(engine: Engine) -> None:
    variants = [{"name": "small", "d_sae": 32}, {"name": "large", "d_sae": 256}]
    alone = plan_of(engine, train(d_sae=256))
    plan = plan_of(engine, train(variants=variants))
    assert plan.details["n_steps"] == 16 and plan.details["checkpoints"] == 10
    saes = plan.details["saes"]
    assert saes["small"]["memory_bytes"] < saes["large"]["memory_bytes"] < plan.memory_bytes
    assert alone.memory_bytes < plan.memory_bytes
    assert alone.disk_bytes < plan.disk_bytes
    assert "2 SAEs at once" in plan.summary


@contextmanager
def memory(engine: Engine, n_bytes: int) -> Iterator[None]:
    """So many bytes beside the model, and no more."""
    before = engine.memory.capacity(engine.device)
    engine.memory.set_capacity(engine.store.get(ModelRecord, "tiny").n_bytes + n_bytes, engine.device)
    try:
        yield
    finally:
        engine.memory.set_capacity(before, engine.device)


TOO_LARGE: dict[str, tuple[int, dict[str, Any], str]] = {
    "the buffer": (6 * MIB, {"buffer_tokens": 65_536}, "buffer_tokens="),
    "the batch": (4 * MIB, {"architecture": "standard", "k": None, "batch_size": 4096, "n_tokens": 40_960}, "micro_"),
    "the features": (8 * MIB, {"d_sae": 65_536, "architecture": "jumprelu", "k": None}, "d_sae="),
    "the expansion": (8 * MIB, {"expansion": 1024, "d_sae": None}, "d_sae="),
    "nested dictionaries": (
        8 * MIB,
        {"architecture": "matryoshka_batchtopk", "d_sae": 65_536, "widths": [64, 65_536]},
        "d_sae=",
    ),
    "so many at once": (
        8 * MIB,
        {"variants": [{"name": str(d_sae), "d_sae": d_sae} for d_sae in (512, 1024, 16_384)]},
        "the first 2 variants",
    ),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_does_not_fit_is_refused_with_a_call_that_does(engine: Engine, what: str) -> None:
    n_bytes, arguments, word = TOO_LARGE[what]
    n_trainings = len(engine.store.all(TrainingRecord))
    with memory(engine, n_bytes):
        with pytest.raises(OutOfMemory) as refused:
            engine.call(train(**arguments))
        error = refused.value
        assert "needs about" in error.what and "is free" in error.what
        assert error.fix.startswith("It fits with ") and word in error.fix
        assert len(engine.store.all(TrainingRecord)) == n_trainings
        assert error.next_call is not None and error.next_call.tool == "train_sae"
        fitting = TrainSAE(**error.next_call.arguments)
        plan = plan_of(engine, fitting)
        assert plan.memory_bytes <= n_bytes
        job = completed(engine, fitting)
        assert job.plan is not None and job.plan.memory_bytes <= n_bytes


def test_where_nothing_fits_that_is_said(engine: Engine) -> None:
    with memory(engine, 1 << 10), pytest.raises(OutOfMemory, match=r"needs about .* is free") as refused:
        engine.call(train())
    assert refused.value.fix and refused.value.next_call is None


def test_an_extension_that_does_not_fit_any_more_is_refused(engine: Engine) -> None:
    completed(engine, train(name="outgrown"))
    with memory(engine, 1 << 10), pytest.raises(OutOfMemory, match="needs about") as refused:
        engine.call(ExtendTraining(training="outgrown", n_tokens=4096))
    assert refused.value.fix and "batch_size" not in refused.value.fix, "its settings cannot be changed"
    assert len(engine.store.get(TrainingRecord, "outgrown").jobs) == 1
