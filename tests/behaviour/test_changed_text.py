"""Text that changes after it was brought in is never tokenised under the old text's name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio_engine.api.operations import GetDataset, Reproduce, TokenizeDataset, TrainSAE
from mistudio_engine.api.records import DatasetRecord, Job, TokensRecord, TrainingRecord
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.handlers import datasets as handler
from mistudio_engine.runtime.engine import Engine

SMALL = Hyperparameters(n_tokens=2048, batch_size=512, buffer_tokens=2048)


def ended(engine: Engine, operation: Any) -> Job:
    return engine.jobs.wait(engine.call(operation).slug, 60)


def done(engine: Engine, operation: Any) -> Job:
    job = ended(engine, operation)
    assert job.state == "completed", job.error
    return job


def write(path: Path, word: str) -> Path:
    path.write_text(
        "".join(json.dumps({"text": f"The {word} saw {n} dogs near the river ."}) + "\n" for n in range(300))
    )
    return path


def refused(engine: Engine, operation: Any) -> str:
    job = ended(engine, operation)
    assert job.state == "failed" and job.error is not None
    assert job.error.code == "conflict" and "has changed since it was brought in" in job.error.what
    assert job.error.next_call is not None
    return job.error.next_call.arguments["name"]


@pytest.fixture
def text(engine: Engine, tmp_path: Path) -> Path:
    path = write(tmp_path / "text.jsonl", "cat")
    done(engine, GetDataset(source=str(path), name=tmp_path.name))
    # Of the same size and time: only the content tells.
    times = path.stat()
    write(path, "cow")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return path


def test_it_is_refused_with_a_name_under_which_it_can_come_in(engine: Engine, text: Path) -> None:
    slug = text.parent.name
    settings: dict[str, Any] = {"model": "tiny", "context_size": 64}
    for operation in (
        TokenizeDataset(dataset=slug, **settings),
        GetDataset(source=str(text), name=slug, **settings),
        GetDataset(source=str(text), name=slug),
        TrainSAE(model="tiny", dataset=slug, hook_name=DEMO_HOOK, d_sae=64, k=8, hyperparameters=SMALL),
    ):
        name = refused(engine, operation)
    assert engine.store.get(DatasetRecord, slug).tokens == []
    done(engine, GetDataset(source=str(text), name=name, **settings))
    assert engine.store.get(DatasetRecord, name).sha256 != engine.store.get(DatasetRecord, slug).sha256


def test_it_is_noticed_when_it_changes_while_it_is_tokenised(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "text.jsonl", "cat")
    done(engine, GetDataset(source=str(path), name=tmp_path.name))
    pack = handler.pack

    def meanwhile(*args: Any, **options: Any) -> Any:
        yield from pack(*args, **options)
        with path.open("a") as file:
            file.write(json.dumps({"text": "One more ."}) + "\n")

    monkeypatch.setattr(handler, "pack", meanwhile)
    before = sorted((engine.home / "datasets" / "tokens").iterdir())
    refused(engine, TokenizeDataset(dataset=tmp_path.name, model="tiny"))
    assert sorted((engine.home / "datasets" / "tokens").iterdir()) == before


def test_what_was_tokenised_before_stays_of_use(engine: Engine, tmp_path: Path) -> None:
    path = write(tmp_path / "text.jsonl", "cat")
    done(engine, GetDataset(source=str(path), name=tmp_path.name, model="tiny"))
    write(path, "elephant")
    tokens = engine.store.get(DatasetRecord, tmp_path.name).tokens
    again = done(engine, TokenizeDataset(dataset=tmp_path.name, model="tiny"))
    assert again.result is not None and [again.result["slug"]] == tokens


def test_a_reproduction_names_the_files_that_have_changed(engine: Engine, tmp_path: Path) -> None:
    path = write(tmp_path / "text.jsonl", "cat")
    done(engine, GetDataset(source=str(path), name=tmp_path.name, model="tiny"))
    training = f"of-{tmp_path.name}"
    done(
        engine,
        TrainSAE(
            model="tiny",
            dataset=tmp_path.name,
            hook_name=DEMO_HOOK,
            d_sae=64,
            k=8,
            name=training,
            hyperparameters=SMALL,
        ),
    )
    same = done(engine, Reproduce(ref=f"training/{training}")).result
    assert same is not None and same["identical"] and same["changes"] == []

    write(path, "elephant")
    result = done(engine, Reproduce(ref=f"training/{training}")).result
    assert result is not None and result["identical"], "the tokens are still those of the old text"
    assert [change["what"] for change in result["changes"]] == ["files.dataset"]

    record = engine.store.get(TokensRecord, engine.store.get(TrainingRecord, training).tokens)
    tokens = engine.home / record.folder / "tokens.safetensors"
    held = load_file(tokens)
    held["ids"] = torch.roll(held["ids"], 1, dims=0)
    save_file(held, tokens)
    result = done(engine, Reproduce(ref=f"training/{training}")).result
    assert result is not None and not result["identical"]
    assert [change["what"] for change in result["changes"]] == ["files.dataset", "files.tokens"]
    assert "files.tokens was" in result["summary"]
