"""What the tests of trainings share: a small call, its end, and the tensors that came out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from mistudio_engine.api.operations import ShowTraining, TrainingMetrics, TrainSAE
from mistudio_engine.api.records import Job, TrainingRecord
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.runtime.engine import Engine

SECONDS = 60.0
"""Bound of every wait; none is expected to take long."""

CALL: dict[str, Any] = {"model": "tiny", "dataset": "corpus", "hook_name": DEMO_HOOK, "d_sae": 64, "k": 8}
SHORT: dict[str, Any] = {"n_tokens": 8192, "batch_size": 512, "buffer_tokens": 4096, "lr": 2e-3, "eval_tokens": 256}
"""Sixteen steps, with a checkpoint at each second of them."""

ENDLESS: dict[str, Any] = {**SHORT, "n_tokens": 50_000_000, "checkpoint_interval": 4096}

T = TypeVar("T")


def train(**arguments: Any) -> TrainSAE:
    """A short training, with other arguments where some are given."""
    return TrainSAE(**{**CALL, **SHORT, **arguments})


def endless(**arguments: Any) -> TrainSAE:
    """One that will not end by itself."""
    return train(**{**ENDLESS, **arguments})


def ended(engine: Engine, operation: Any) -> Job:
    """The job of an operation at its end, whatever that is."""
    job = engine.jobs.wait(engine.call(operation).slug, SECONDS)
    assert job.state not in ("queued", "running", "pausing"), job
    return job


def completed(engine: Engine, operation: Any) -> Job:
    """The job of an operation that went well."""
    job = ended(engine, operation)
    assert job.state == "completed", job.error
    return job


def training_of(engine: Engine, name: str) -> TrainingRecord:
    return engine.call(ShowTraining(training=name))


def history(engine: Engine, name: str) -> list[int]:
    """The steps, in tokens, whose metrics were recorded."""
    rows = engine.call(TrainingMetrics(training=name, limit=10_000)).rows
    return [int(row.values["n_tokens"]) for row in rows if "n_tokens" in row.values]


def tensors(engine: Engine, sae: str) -> dict[str, Tensor]:
    """The tensors of an SAE's file."""
    return tensors_in(engine.home / "saes" / sae)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by file and name."""
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one and one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


def until(condition: Callable[[], T | None], what: str, seconds: float = SECONDS) -> T:
    """Wait, bounded, until `condition()` is something."""
    for _ in range(int(seconds / 0.01)):
        if found := condition():
            return found
        threading.Event().wait(0.01)
    raise AssertionError(f"{what} did not happen within {seconds:g} s")


@contextmanager
def running(engine: Engine, operation: TrainSAE, n_tokens: int = 1) -> Iterator[Job]:
    """The job of a training once it has recorded metrics of so many tokens; it is cancelled afterwards."""
    with steered(engine, operation) as job:
        until(lambda: _n_tokens(engine, job) >= n_tokens, f"{n_tokens} tokens of {job.ref}")
        yield engine.jobs.get(job.slug)


@contextmanager
def steered(engine: Engine, operation: Any) -> Iterator[Job]:
    """The job of an operation, which is cancelled afterwards unless it has ended."""
    job = engine.call(operation)
    try:
        yield job
    finally:
        if not engine.jobs.get(job.slug).finished:
            engine.jobs.control(job.slug, "cancel")
            engine.jobs.wait(job.slug, SECONDS)


def _n_tokens(engine: Engine, job: Job) -> float:
    now = engine.jobs.get(job.slug)
    assert now.state in ("queued", "running", "pausing", "completed"), now.error
    return now.metrics.get("n_tokens", 0)


def parts(engine: Engine) -> list[Path]:
    """What is half written."""
    return [path for ending in ("part", "old") for path in engine.home.rglob(f"*.{ending}")]
