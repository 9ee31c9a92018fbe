"""Activations are computed once, used by every training on them, checked on every read, and go with their dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mistudio_engine.api.errors import Conflict
from mistudio_engine.api.operations import DeleteDataset, ExtendTraining, GetDataset, ListEvents
from mistudio_engine.api.records import Job, TrainingRecord
from mistudio_engine.runtime.engine import Engine
from tests.behaviour.trainings import (
    assert_same_bits,
    completed,
    ended,
    endless,
    parts,
    running,
    tensors,
    train,
    training_of,
)

CACHED = {"activations": "cached", "dataset": "lines"}


@pytest.fixture
def lines(engine: Engine, tmp_path: Path) -> Path:
    """The folder where the activations of the dataset `lines` will lie."""
    path = tmp_path / "lines.jsonl"
    texts = (f"The cat saw {n} dogs near the river . Then it slept in the garden ." for n in range(600))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    job = completed(engine, GetDataset(source=str(path), name="lines", model="tiny"))
    assert job.result is not None
    yield engine.home / "activations" / job.result["tokens"][0]
    engine.call(DeleteDataset(dataset="lines"))


def stages(engine: Engine, job: Job) -> set[str]:
    events = engine.call(ListEvents(channels=f"jobs/{job.slug}")).events
    return {event.data.get("stage") for event in events if event.event == "checkpoint"} | {job.stage}


def written_at(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_training_writes_the_cache_and_the_next_one_reads_it(engine: Engine, lines: Path) -> None:
    completed(engine, train(name="live", dataset="lines", seed=2))
    completed(engine, train(name="cached", seed=2, **CACHED))
    assert_same_bits(tensors(engine, "live"), tensors(engine, "cached"))
    assert [path.name for path in lines.iterdir()] == ["blocks.2.hook_resid_post-float32"]
    before = written_at(lines)
    assert before
    assert_same_bits(tensors(engine, "cached"), tensors(engine, completed_name(engine, seed=2)))
    completed(engine, ExtendTraining(training="cached", n_tokens=2048))
    assert written_at(lines) == before, "it was read, not written again"
    assert parts(engine) == []


def completed_name(engine: Engine, **arguments: Any) -> str:
    result = completed(engine, train(**CACHED, **arguments)).result
    assert result is not None
    return result["slug"]


def test_a_cache_is_one_of_its_hooks_and_its_type(engine: Engine, lines: Path) -> None:
    completed_name(engine)
    completed_name(engine, cache_dtype="bfloat16")
    variants = [{"hook_name": f"blocks.{layer}.{site}"} for layer in range(4) for site in SITES]
    completed_name(engine, variants=variants)
    names = sorted(path.name for path in lines.iterdir())
    assert names[1:] == ["blocks.2.hook_resid_post-bfloat16", "blocks.2.hook_resid_post-float32"]
    assert names[0].startswith("8-hooks-"), "more hooks than a file's name can hold"
    sizes = {name: sum(path.stat().st_size for path in (lines / name).iterdir()) for name in names[1:]}
    assert sizes[names[1]] < 0.6 * sizes[names[2]]


SITES = ("ln2.hook_normalized", "hook_resid_post")


def test_a_plan_counts_the_disk_that_a_cache_will_take(engine: Engine, lines: Path) -> None:
    def disk(**arguments: Any) -> int:
        plan = engine.call(train(dataset="lines", dry_run=True, **arguments)).plan
        assert plan is not None
        return plan.disk_bytes

    live, cached = disk(), disk(activations="cached")
    completed_name(engine)
    size = sum(path.stat().st_size for path in lines.rglob("*") if path.is_file())
    assert 0.9 * size < cached - live < 1.1 * size
    assert disk(activations="cached") == live, "it is there by now"


@pytest.mark.parametrize("what", ["a bit", "the end", "a shard", "the index"])
def test_a_damaged_cache_is_named_with_what_to_do(engine: Engine, lines: Path, what: str) -> None:
    completed_name(engine)
    (folder,) = lines.iterdir()
    shard, index = folder / "shard-00000.safetensors", folder / "index.json"
    if what == "a bit":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    elif what == "the end":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif what == "a shard":
        shard.unlink()
    else:
        index.write_text(index.read_text().replace('"n_contexts": ', '"n_contexts": 1'))
    job = ended(engine, train(**CACHED, n_tokens=40_960))
    assert job.state == "failed" and job.error is not None
    assert job.error.code == "corrupt_file"
    assert folder.name in job.error.what
    assert f"Delete the folder {folder}" in job.error.fix and "live" in job.error.fix
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    completed_name(engine)
    assert load_file(shard)


def test_deleting_the_dataset_deletes_its_activations(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "short-lived.jsonl"
    path.write_text("".join(json.dumps({"text": f"The dog ate {n} apples ."}) + "\n" for n in range(600)))
    made = completed(engine, GetDataset(source=str(path), name="short-lived", model="tiny")).result
    assert made is not None
    folder = engine.home / "activations" / made["tokens"][0]
    with (
        running(engine, endless(name="reader", dataset="short-lived", activations="cached")),
        pytest.raises(Conflict, match="training/reader"),
    ):
        engine.call(DeleteDataset(dataset="short-lived"))
    n_bytes = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
    freed = engine.call(DeleteDataset(dataset="short-lived")).freed_bytes
    assert not folder.exists() and freed >= n_bytes > 0
    assert training_of(engine, "reader").status == "cancelled"
    assert engine.store.exists(TrainingRecord, "reader")
