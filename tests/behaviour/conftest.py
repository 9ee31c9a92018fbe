"""An engine a module with a small trained SAE, and a `call` that goes through each door in turn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mistudio_engine.api.operations import EvalSAE, Extract, GetDataset, GetModel, LabelFeatures, TrainSAE
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.runtime.engine import Engine
from tests.behaviour.doors import DOORS, Door, Loop, Served, served, started

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    """An event loop on a thread."""
    made = Loop()
    yield made
    made.close()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the embedded model and corpus brought in and a small SAE trained, to be copied."""
    home = tmp_path_factory.mktemp("prepared")
    engine = started(home)
    prepare(engine)
    engine.stop()
    return home


@pytest.fixture(scope="module")
def studio(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real engine behind a real server on a copy of that home. What a module makes in it, no other module meets."""
    home = tmp_path_factory.mktemp("studio") / "home"
    shutil.copytree(prepared, home)
    with served(home) as made:
        yield made


@pytest.fixture(scope="module")
def engine(studio: Served) -> Engine:
    """The module's engine, without its server."""
    return studio.engine


@pytest.fixture(params=DOORS)
def call(request: pytest.FixtureRequest, studio: Served, loop: Loop) -> Iterator[Door]:
    """`call(operation)` through each door in turn."""
    yield from DOORS[request.param](studio, loop)


def prepare(engine: Engine) -> None:
    """The path from a model to a labelled SAE called `first`, small enough to take seconds."""
    for operation in (
        GetModel(source="embedded", name="tiny"),
        GetDataset(source="embedded", name="corpus", model="tiny", n_tokens=40_000),
        TrainSAE(
            model="tiny",
            dataset="corpus",
            hook_name=DEMO_HOOK,
            d_sae=128,
            k=16,
            name="first",
            hyperparameters=Hyperparameters(n_tokens=40_960, batch_size=1024, lr=2e-3, buffer_tokens=16_384),
        ),
        EvalSAE(sae="first", n_tokens=2048),
        Extract(sae="first", n_tokens=20_000),
        LabelFeatures(sae="first"),
    ):
        job = engine.jobs.wait(engine.call(operation).slug, 100)
        assert job.state == "completed", job.error
