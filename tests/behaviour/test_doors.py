"""The same behaviour through every door: in process, over REST, over MCP."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from mistudio_engine.api.errors import (
    BadInput,
    Conflict,
    CorruptFile,
    EmptyData,
    MistudioError,
    NotFound,
    UnknownHook,
    WrongShape,
)
from mistudio_engine.api.operations import (
    ControlJob,
    Describe,
    EvalSAE,
    Export,
    Extract,
    FeaturesOnText,
    Find,
    GetDataset,
    GetFeature,
    GetModel,
    GetSAE,
    LabelFeatures,
    ListJobs,
    SearchFeatures,
    SetLabel,
    ShowJob,
    Status,
    Steer,
    TrainSAE,
)
from mistudio_engine.api.sae_config import StandardConfig
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.saes import new_sae, save_sae
from tests.behaviour.doors import Door, Served

TRAIN: dict[str, Any] = {"model": "tiny", "dataset": "corpus", "hook_name": DEMO_HOOK, "d_sae": 64, "k": 8}
SMALL = {"n_tokens": 4096, "batch_size": 512, "buffer_tokens": 4096}


def finished(call: Door, job: Any) -> Any:
    """The job at its end."""
    for _ in range(6):
        if job.state in ("completed", "failed", "cancelled", "paused", "interrupted"):
            return job
        job = call(ShowJob(job=job.slug, wait_s=20))
    raise AssertionError(f"{job.slug} is still {job.state}")


def failed(call: Door, operation: Any) -> str:
    """The code of the error that a call raises, at once or by its job."""
    try:
        job = finished(call, call(operation))
    except MistudioError as error:
        assert error.what and error.fix, "an error says what happened and what to do"
        return error.code
    assert job.state == "failed", job
    assert job.error.what and job.error.fix
    return job.error.code


def test_status_says_what_there_is_and_what_to_do(call: Door) -> None:
    status = call(Status())
    assert status.state == "ready"
    assert status.counts.sae >= 1
    assert status.next_call.tool


def test_find_and_describe_lead_to_an_sae(call: Door) -> None:
    rows = call(Find(kind="sae", query="first")).rows
    assert [row.ref for row in rows] == ["sae/first"]
    described = call(Describe(kind="sae", slug="first"))
    assert described.record.d_sae == 128
    assert described.lineage.model == "model/tiny"


def test_a_job_tells_its_result(call: Door) -> None:
    job = finished(call, call(TrainSAE(**TRAIN, hyperparameters=SMALL)))  # type: ignore[arg-type]
    assert job.state == "completed"
    assert job.result.d_sae == 64
    measured = finished(call, call(EvalSAE(sae=job.result.slug, n_tokens=512)))
    assert 0 < measured.result.fvu < 2


def test_a_dry_run_starts_nothing(call: Door, studio: Served) -> None:
    before = studio.engine.jobs.counts()
    plan = call(TrainSAE(**TRAIN, hyperparameters=SMALL, dry_run=True)).plan  # type: ignore[arg-type]
    assert plan.details.n_steps == 8
    assert plan.memory_bytes > 0
    assert studio.engine.jobs.counts() == before


def test_two_calls_with_one_key_start_one_job(call: Door, request: pytest.FixtureRequest) -> None:
    key = request.node.name
    first = call(LabelFeatures(sae="first", idempotency_key=key))
    again = call(LabelFeatures(sae="first", idempotency_key=key))
    assert first.slug == again.slug
    with pytest.raises(Conflict):
        call(LabelFeatures(sae="first", features=[1], idempotency_key=key))


def test_a_running_job_can_be_cancelled(call: Door) -> None:
    long = TrainSAE(**TRAIN, hyperparameters={**SMALL, "n_tokens": 50_000_000})  # type: ignore[arg-type]
    job = call(long)
    call(ControlJob(job=job.slug, action="cancel"))
    assert finished(call, job).state == "cancelled"
    assert any(row.slug == job.slug or row.ref == f"job/{job.slug}" for row in call(ListJobs()).rows)


def test_search_finds_by_words_and_says_how(call: Door) -> None:
    page = call(SearchFeatures(query="the", sae="first", mode="text", limit=5))
    assert page.mode == "text"
    assert page.total >= page.shown == len(page.rows)


def test_pages_of_a_list_are_a_union_without_duplicates(call: Door) -> None:
    seen: list[str] = []
    cursor = None
    while True:
        page = call(SearchFeatures(sae="first", limit=50, cursor=cursor))
        seen += [row.ref for row in page.rows]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert len(seen) == len(set(seen)) == page.total


def test_a_persons_label_survives_the_next_labelling_job(call: Door) -> None:
    feature = call(SearchFeatures(sae="first", limit=1)).rows[0]
    call(SetLabel(feature=feature.ref, label="mine alone", category="Test > Mine"))
    finished(call, call(LabelFeatures(sae="first", features=[feature.index])))
    card = call(GetFeature(sae="first", index=feature.index))
    assert card.label == "mine alone"
    assert card.labels[0].author in ("person", "agent:mcp")
    found = call(SearchFeatures(query="mine alone", sae="first", mode="text", limit=3))
    assert feature.ref in [row.ref for row in found.rows]


def test_features_on_a_text_name_where_they_peak(call: Door) -> None:
    found = call(FeaturesOnText(sae="first", text="The cat saw three dogs near the river .", k=5))
    assert found.rows
    for row in found.rows:
        assert row.token == found.tokens[row.position]


def test_strength_0_writes_the_baseline(call: Door) -> None:
    feature = call(SearchFeatures(sae="first", limit=1)).rows[0].ref
    job = call(Steer(interventions=[{"feature": feature, "strength": 0}], prompt="The", max_new_tokens=12))  # type: ignore[list-item]
    result = finished(call, job).result
    texts = [getattr(side[0], "text", None) or side[0].text_untrusted for side in (result.baseline, result.steered)]
    assert texts[0] == texts[1]
    assert result.kl_from_baseline == 0


def test_an_export_is_a_file_with_its_hash(call: Door) -> None:
    made = finished(call, call(Export(sae="first", feature_selection="custom", range_start=0, range_end=9))).result
    assert made.feature_count == 10
    assert Path(made.output_path).stat().st_size == made.file_size_bytes


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        (TrainSAE(**{**TRAIN, "model": "nobody"}), NotFound.code),
        (TrainSAE(**{**TRAIN, "dataset": "nothing"}), NotFound.code),
        (TrainSAE(**{**TRAIN, "hook_name": "blocks.2.hook_nonsense"}), UnknownHook.code),
        (TrainSAE(**{**TRAIN, "hook_name": "blocks.99.hook_resid_post"}), UnknownHook.code),
        (TrainSAE(**{**TRAIN, "k": 65}), BadInput.code),
        (TrainSAE(**TRAIN, hyperparameters={**SMALL, "l1_coefficient": 3.0}), BadInput.code),  # type: ignore[arg-type]
        (EvalSAE(sae="nobody"), NotFound.code),
        (Extract(sae="first", features=[128]), BadInput.code),
        (GetFeature(sae="first", index=128), NotFound.code),
        (SetLabel(feature="sae/first#128", label="x"), BadInput.code),
        (FeaturesOnText(sae="first", text=" " * 0 + "\u200b" * 3000), BadInput.code),
        (GetModel(source="/there/is/nothing"), NotFound.code),
        (GetDataset(source="no such:thing"), BadInput.code),
        (Describe(kind="sae", slug="nobody"), NotFound.code),
        (ShowJob(job="nothing-0001"), NotFound.code),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.tool}",
)
def test_what_does_not_exist_or_fit_is_refused_with_advice(call: Door, operation: Any, code: str) -> None:
    assert failed(call, operation) == code


def test_an_sae_of_another_width_is_refused(call: Door, tmp_path: Path) -> None:
    cfg = StandardConfig(d_in=48, d_sae=96, hook_name=DEMO_HOOK, model_name="tiny")
    sae = new_sae(cfg, {name: torch.rand(shape) for name, shape in cfg.tensor_shapes().items()})
    save_sae(sae, tmp_path / "narrow")
    assert failed(call, GetSAE(source=str(tmp_path / "narrow"), model="tiny")) == WrongShape.code


def test_a_corrupt_safetensors_file_is_refused_and_nothing_is_kept(call: Door, tmp_path: Path) -> None:
    cfg = StandardConfig(d_in=128, d_sae=256, hook_name=DEMO_HOOK, model_name="tiny")
    sae = new_sae(cfg, {name: torch.rand(shape) for name, shape in cfg.tensor_shapes().items()})
    folder = save_sae(sae, tmp_path / "torn")
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**62) + weights.read_bytes()[8:])
    before = len(call(Find(kind="sae", limit=200)).rows)
    assert failed(call, GetSAE(source=str(folder), model="tiny")) == CorruptFile.code
    assert len(call(Find(kind="sae", limit=200)).rows) == before


@pytest.mark.parametrize("text", ["", "\n\n   \n"])
def test_empty_text_is_refused(call: Door, tmp_path: Path, text: str) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(text)
    assert failed(call, GetDataset(source=str(path), model="tiny")) == EmptyData.code


def test_a_dataset_brought_in_twice_is_one(call: Door, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"The cat number {n} slept ."}) + "\n" for n in range(50)))
    name = f"lines-{abs(hash(str(tmp_path))) % 10**8}"
    first = finished(call, call(GetDataset(source=str(path), name=name, model="tiny")))
    again = finished(call, call(GetDataset(source=str(path), name=name, model="tiny")))
    assert first.result.ref == again.result.ref
    assert len(again.result.tokens) == 1
