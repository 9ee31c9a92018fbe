"""Published labels and examples come in, keep their authors, and never replace a person's word."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mistudio_engine.api.errors import EmptyData, Forbidden, NotFound, Unreachable, WrongShape
from mistudio_engine.api.operations import (
    AnalyseFeatures,
    DeleteSAE,
    Extract,
    GetSAE,
    ImportLabels,
    LabelHistory,
    SearchFeatures,
    SetLabel,
    ShowPublished,
    UseExtraction,
)
from mistudio_engine.api.records import Job, LabelRecord, SAERecord
from mistudio_engine.handlers import published
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import load_sae, save_sae
from tests.behaviour.doors import Served
from tests.behaviour.trainings import completed, ended, until
from tests.bucket_server import BucketServer, bucket_server


def rows(engine: Engine, source: str, shuffled: bool = False) -> dict[str, list[dict[str, Any]]]:
    """What Neuronpedia would have published of the SAE, its statistics our own in other units."""
    record = engine.store.get(SAERecord, "first")
    with Knowledge(engine, record) as known:
        maxima, frequency = known.extraction.max.tolist(), known.extraction.frequency.tolist()
    if shuffled:
        maxima, frequency = maxima[::-1], frequency[::-1]
    of = {"modelId": "tiny", "layer": source}
    return {
        "features": [
            of
            | {
                "index": str(n),
                "maxActApprox": 3 * maxima[n],
                "frac_nonzero": frequency[n],
                "hookName": record.hook_name,
            }
            for n in range(record.d_sae)
        ],
        "explanations": [
            of
            | {
                "id": f"e{n}",
                "index": str(n),
                "description": f"published words {n}",
                "authorId": "ann",
                "typeName": "oai_token-act-pair",
                "explanationModelName": "gpt-4o-mini",
                "scoreV1": 0.75,
            }
            for n in range(40)
        ],
        "activations": [
            of
            | {
                "id": f"a{n}-{k}",
                "index": str(n),
                "tokens": ["The", " cat", f" {k}"],
                "values": [0.0, 10.0 - k, 1.0],
                "binMin": -1,
                "binMax": -1,
                "binContains": -1,
            }
            for n in range(40)
            for k in range(3)
        ],
    }


def packed(table: dict[str, list[dict[str, Any]]], per_file: int = 16) -> dict[str, bytes]:
    """Files of the tree, some features to a file."""
    files = {}
    for kind, lines in table.items():
        for line in lines:
            name = f"{kind}/batch-{int(line['index']) // per_file}.jsonl.gz"
            files[name] = files.get(name, b"") + json.dumps(line).encode() + b"\n"
    return {name: gzip.compress(data) for name, data in files.items()}


@pytest.fixture
def source_id(studio: Served) -> str:
    return f"{studio.engine.store.get(SAERecord, 'first').layer}-res-test"


@pytest.fixture
def folder(studio: Served, source_id: str, tmp_path: Path) -> Path:
    return written(tmp_path / "tree", packed(rows(studio.engine, source_id)))


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def bucket(studio: Served, source_id: str) -> Iterator[BucketServer]:
    with bucket_server() as made:
        made.files = {
            f"v1/tiny/{source_id}/{name}": data for name, data in packed(rows(studio.engine, source_id)).items()
        }
        yield made


@pytest.fixture(autouse=True)
def labels_of_jobs_alone(studio: Served) -> Iterator[None]:
    """Each test begins with the labels that jobs made, and leaves those that were there."""
    store = studio.engine.store
    before = [label for n in range(128) for label in reversed(store.label_history("first", n))]

    def put(labels: list[LabelRecord]) -> None:
        with store.transaction():
            store._writer.execute("DELETE FROM labels WHERE sae = ?", ("first",))
            for label in labels:
                store.add_label(label)

    put([label for label in before if label.author.startswith("job:")])
    yield
    put(before)


def imported(engine: Engine, source: Path | str, **more: Any) -> dict[str, Any]:
    job = completed(engine, ImportLabels(sae="first", source=str(source), **more))
    assert job.result is not None
    assert not list((engine.home / "saes").rglob("*.part"))
    return job.result


def test_labels_and_examples_come_in_with_their_authors(studio: Served, folder: Path, source_id: str) -> None:
    engine = studio.engine
    report = imported(engine, folder)
    assert report["source"] == f"tiny/{source_id}"
    assert (report["n_features"], report["n_labels"], report["n_examples"], report["refused"]) == (128, 40, 120, {})
    assert report["fidelity"]["verdict"] == "matches"
    assert report["fidelity"]["max_correlation"] == pytest.approx(1.0)
    label = engine.store.label("first", 7)
    assert label is not None
    assert (label.label, label.author) == ("published words 7", "neuronpedia:ann")
    assert label.method == "oai_token-act-pair/gpt-4o-mini" and f"tiny/{source_id} feature 7" in label.evidence
    assert label.scores == {"published": {"scoreV1": 0.75}} and label.confidence is None
    shown = engine.call(ShowPublished(sae="first", index=7, n=2))
    assert [each.label for each in shown.labels] == ["published words 7"]
    (source,) = shown.sources
    assert (source.source, source.total, source.shown) == (f"tiny/{source_id}", 3, 2)
    assert source.examples[0].tokens == ["The", " cat", " 0"] and source.examples[0].values == [0.0, 10.0, 1.0]
    found = engine.call(SearchFeatures(sae="first", query="published words", mode="text", include_dense=True))
    assert found.rows and all("published words" in (row.label or "") for row in found.rows)


def test_a_persons_and_an_agents_labels_stay(studio: Served, folder: Path) -> None:
    engine = studio.engine
    engine.call(SetLabel(feature="first#3", label="mine"))
    engine.call(SetLabel(feature="first#4", label="the agent's"), caller="agent:a")
    report = imported(engine, folder, examples=False)
    assert (report["n_labels"], report["n_kept"]) == (38, 2)
    for index, words in ((3, "mine"), (4, "the agent's")):
        history = engine.call(LabelHistory(sae="first", index=index)).rows
        assert history[0].label == words and not any("published" in each.label for each in history)


def test_the_same_import_again_adds_nothing(studio: Served, folder: Path) -> None:
    imported(engine := studio.engine, folder)
    before = [engine.store.label_history("first", n) for n in range(40)]
    again = imported(engine, folder)
    assert (again["n_labels"], again["n_known"], again["n_examples"]) == (0, 40, 120)
    assert [engine.store.label_history("first", n) for n in range(40)] == before
    assert engine.call(ShowPublished(sae="first", index=7)).sources[0].total == 3


def test_what_an_engine_that_was_killed_left_of_an_earlier_import_is_not_shown_beside_the_newer_one(
    studio: Served, folder: Path
) -> None:
    engine = studio.engine
    imported(engine, folder)
    before = engine.call(ShowPublished(sae="first", index=7))
    (newer,) = (engine.home / engine.store.get(SAERecord, "first").folder / "published").iterdir()
    left = newer.with_name(f"{newer.name}.old")
    shutil.copytree(newer, left)
    assert engine.call(ShowPublished(sae="first", index=7)) == before
    shutil.rmtree(newer)  # as between the two renames
    assert engine.call(ShowPublished(sae="first", index=7)) == before
    left.rename(newer)


def test_of_several_labels_that_with_the_best_score_counts(studio: Served, source_id: str, tmp_path: Path) -> None:
    table = rows(studio.engine, source_id)
    one = table["explanations"][5]
    table["explanations"] = [
        one | {"id": str(n), "description": f"w{n}", "scoreV1": s} for n, s in enumerate((0.2, 0.9, None))
    ]
    report = imported(studio.engine, written(tmp_path / "t", packed(table)), examples=False)
    assert report["n_labels"] == 3
    label = studio.engine.store.label("first", 5)
    assert label is not None and label.label == "w1"


def test_only_the_features_asked_for_come_in(studio: Served, folder: Path) -> None:
    report = imported(studio.engine, folder, features=[1, 2])
    assert (report["n_features"], report["n_labels"], report["n_examples"]) == (2, 2, 6)
    assert report["fidelity"]["verdict"] == "unknown"
    with pytest.raises(NotFound, match="Nothing published"):
        studio.engine.call(ShowPublished(sae="first", index=9))


def test_other_statistics_are_noticed(studio: Served, source_id: str, tmp_path: Path) -> None:
    files = packed(rows(studio.engine, source_id, shuffled=True))
    report = imported(studio.engine, written(tmp_path / "t", files), labels=False)
    assert report["fidelity"]["verdict"] == "differs" and report["n_labels"] == 0


def test_maxima_are_compared_in_the_units_of_decoder_rows_of_length_one(
    studio: Served, source_id: str, tmp_path: Path
) -> None:
    """A twin whose decoder rows are of all lengths has the same activations; published of it are those times the
    lengths."""
    engine = studio.engine
    sae = load_sae(engine.home / engine.store.get(SAERecord, "first").folder)
    lengths = torch.logspace(-2, 2, sae.cfg.d_sae)[torch.randperm(sae.cfg.d_sae, generator=torch.manual_seed(0))]
    sae.W_dec.mul_(lengths[:, None])
    completed(engine, GetSAE(source=str(save_sae(sae, tmp_path / "twin")), name="twin", model="tiny"))
    completed(engine, Extract(sae="twin", dataset="corpus", n_tokens=20_000))
    table = rows(engine, source_id)
    for line, length in zip(table["features"], lengths.tolist(), strict=True):
        line["maxActApprox"] *= length
    job = completed(engine, ImportLabels(sae="twin", source=str(written(tmp_path / "t", packed(table)))))
    assert job.result is not None and job.result["fidelity"]["verdict"] == "matches"
    engine.call(DeleteSAE(sae="twin"))


def test_whoever_cancels_does_not_wait_for_lines_that_nobody_wants(
    studio: Served, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "ROWS_AT_ONCE", 8)
    operation = ImportLabels(sae="first", source=str(folder), labels=False, features=[99])
    job = completed(studio.engine, operation)
    work = published.run_import_labels(operation, studio.engine, JobContext(job, tmp_path, studio.engine.bus.publish))
    n_steps = sum("activations" in step.stage for step in work)
    assert n_steps >= 120 // 8


def test_a_bucket_is_read_as_a_folder_is(studio: Served, bucket: BucketServer, source_id: str) -> None:
    report = imported(studio.engine, f"tiny/{source_id}", base_url=bucket.url)
    assert (report["n_features"], report["n_labels"], report["n_examples"]) == (128, 40, 120)
    n_files = len(bucket.files)
    assert report["n_files"] == n_files and sum("batch-" in path for path in bucket.requests) == n_files


def test_a_dry_run_says_how_much_there_is_and_fetches_nothing(
    studio: Served, bucket: BucketServer, source_id: str
) -> None:
    operation = ImportLabels(sae="first", source=f"tiny/{source_id}", base_url=bucket.url, dry_run=True)
    plan = studio.engine.call(operation).plan
    n_bytes = sum(map(len, bucket.files.values()))
    assert plan is not None
    assert plan.details == {"n_files": len(bucket.files), "n_bytes": n_bytes, "n_features_at_most": 128}
    assert not any("batch-" in path for path in bucket.requests)


def test_nobody_waits_for_the_listing_of_a_bucket(studio: Served, bucket: BucketServer, source_id: str) -> None:
    """An import is accepted before its bucket answers: while it does not, others submit."""
    answers = threading.Event()
    bucket.answers = answers
    engine = studio.engine
    job = engine.call(ImportLabels(sae="first", source=f"tiny/{source_id}", base_url=bucket.url, examples=False))
    until(lambda: bucket.requests, "the request for a listing")
    other = completed(engine, AnalyseFeatures(sae="first", features=[]))
    assert other.state == "completed" and not engine.jobs.get(job.slug).finished
    answers.set()
    assert engine.jobs.wait(job.slug, 30).state == "completed"


def test_two_imports_of_one_source_at_once_are_both_whole(studio: Served, bucket: BucketServer, source_id: str) -> None:
    engine = studio.engine
    operation = ImportLabels(sae="first", source=f"tiny/{source_id}", base_url=bucket.url)
    jobs = [engine.call(operation) for _ in range(3)]
    seen = 0
    while not all(engine.jobs.get(job.slug).finished for job in jobs):
        with contextlib.suppress(NotFound):
            seen += sum(source.total for source in engine.call(ShowPublished(sae="first", index=7)).sources)
    results = [engine.jobs.wait(job.slug, 30).result for job in jobs]
    assert all(result is not None and result["n_examples"] == 120 for result in results), results
    assert sorted(result["n_labels"] for result in results if result) == [0, 0, 40]
    assert sorted(result["n_known"] for result in results if result) == [0, 40, 40]
    (source,) = engine.call(ShowPublished(sae="first", index=7)).sources
    assert source.total == 3 and seen % 3 == 0, "whoever looks meanwhile sees all of it or nothing"
    for n in range(40):
        authors = [each.author for each in engine.store.label_history("first", n)]
        assert authors.count("neuronpedia:ann") == 1


def test_examples_belong_to_the_sae_and_outlive_an_extraction(studio: Served, folder: Path, source_id: str) -> None:
    engine = studio.engine
    imported(engine, folder)
    before = engine.call(ShowPublished(sae="first", index=7))
    extraction = engine.store.get(SAERecord, "first").extraction
    completed(engine, Extract(sae="first", n_tokens=2048, features=[7]))
    assert engine.call(ShowPublished(sae="first", index=7)) == before
    completed(engine, UseExtraction(extraction=extraction))

    sae = load_sae(engine.home / engine.store.get(SAERecord, "first").folder)
    save_sae(sae, folder.parent / "sae")
    completed(engine, GetSAE(source=str(folder.parent / "sae"), name="bare", model="tiny"))
    report = completed(engine, ImportLabels(sae="bare", source=str(folder), features=[7])).result
    assert report is not None and report["n_examples"] == 3 and report["fidelity"] is None
    assert engine.call(ShowPublished(sae="bare", index=7)).sources[0].total == 3
    folders = engine.home / engine.store.get(SAERecord, "bare").folder
    engine.call(DeleteSAE(sae="bare"))
    assert not folders.exists()


def test_a_killed_import_goes_on_with_the_file_it_was_at(
    studio: Served, bucket: BucketServer, source_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator is dropped in the middle of a file of labels; another begins in the same job's folder."""
    monkeypatch.setattr(published, "LABELS_AT_ONCE", 4)
    engine = studio.engine
    operation = ImportLabels(sae="first", source=f"tiny/{source_id}", base_url=bucket.url)
    job = completed(engine, ImportLabels(sae="first", source=f"tiny/{source_id}", base_url=bucket.url, features=[99]))
    context = JobContext(job, engine.home / "jobs" / "killed", engine.bus.publish)
    work = published.run_import_labels(operation, engine, context)
    n_done = 0
    while n_done < 9:
        n_done += next(work).checkpointed
    while next(work).stage != "reading explanations/batch-1.jsonl.gz":
        pass
    del work  # what it wrote is all that is left
    half = engine.store.label("first", 17)
    assert half is not None and half.author == "neuronpedia:ann", "some of the file's labels were written"
    bucket.requests.clear()
    second = published.run_import_labels(operation, engine, context)
    while True:
        try:
            next(second)
        except StopIteration as stop:
            report = stop.value
            break
    assert sum("batch-" in path for path in bucket.requests) == len(bucket.files) - 9
    assert (report.n_features, report.n_labels, report.n_known, report.n_examples) == (128, 40, 0, 120)
    for n in range(40):
        authors = [each.author for each in engine.store.label_history("first", n)]
        assert authors.count("neuronpedia:ann") == 1


def test_what_is_hostile_is_counted_and_the_rest_comes_in(studio: Served, source_id: str, tmp_path: Path) -> None:
    table = rows(studio.engine, source_id)
    table["explanations"][0]["description"] = "\u202edog\x1b[2J"
    table["explanations"][1]["description"] = ["no", "text"]
    table["explanations"][2]["layer"] = "9-other"
    table["activations"][0]["values"] = [1.0]
    files = packed(table)
    report = imported(studio.engine, written(tmp_path / "t", files))
    refused = {"no description": 1, "of another source": 1, "not 1 to 4096 tokens with a value each": 1}
    assert report["refused"] == refused and report["n_labels"] == 38 and report["n_examples"] == 119
    label = studio.engine.store.label("first", 0)
    assert label is not None and label.label == "dog [2J"


def test_what_is_of_another_sae_is_refused(studio: Served, source_id: str, tmp_path: Path) -> None:
    engine = studio.engine
    other_layer = written(tmp_path / "layer", packed(rows(engine, "31-res-test")))
    table = rows(engine, source_id)
    table["features"].append(table["features"][0] | {"index": "128"})
    too_many = written(tmp_path / "many", packed(table))
    table = rows(engine, source_id)
    for line in (line for lines in table.values() for line in lines):
        line["modelId"] = "gpt2-small"
    other_model = written(tmp_path / "model", packed(table))
    for folder, words in ((other_layer, "layer 31"), (too_many, "feature 128"), (other_model, "check_model=false")):
        job = ended(engine, ImportLabels(sae="first", source=str(folder)))
        assert job.state == "failed" and job.error is not None
        assert job.error.code == "wrong_shape" and words in str(job.error)
    assert all(not each.author.startswith("neuronpedia:") for each in engine.store.labels("first").values())
    assert imported(engine, other_model, check_model=False)["n_labels"] == 40
    with pytest.raises(WrongShape, match="'gpt2-small'"):
        engine.call(ImportLabels(sae="first", source=f"gpt2-small/{source_id}"))


def test_an_agent_may_name_neither_a_folder_nor_a_bucket(studio: Served, folder: Path, source_id: str) -> None:
    for arguments in ({"source": str(folder)}, {"source": f"tiny/{source_id}", "base_url": "https://bucket.invalid"}):
        with pytest.raises(Forbidden, match="Only a person"):
            studio.engine.call(ImportLabels(sae="first", **arguments), caller="agent:a")


def test_offline_no_bucket_is_asked(
    studio: Served, source_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTUDIO_OFFLINE", "1")
    engine = studio.engine
    operation = ImportLabels(sae="first", source=f"tiny/{source_id}")
    with pytest.raises(Unreachable, match="MISTUDIO_OFFLINE=1"):
        engine.call(operation.model_copy(update={"dry_run": True}))
    context = JobContext(Job(slug="offline", operation="import_labels"), tmp_path, engine.bus.publish)
    with pytest.raises(Unreachable, match="MISTUDIO_OFFLINE=1"):
        list(published.run_import_labels(operation, engine, context))


def test_a_source_without_files_is_refused(studio: Served, tmp_path: Path) -> None:
    with pytest.raises(EmptyData, match="has no activations or explanations"):
        studio.engine.call(ImportLabels(sae="first", source=str(tmp_path)))
    with pytest.raises(NotFound, match="There is no folder"):
        studio.engine.call(ImportLabels(sae="first", source=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="ask for labels or examples"):
        ImportLabels(sae="first", source="a/b", labels=False, examples=False)


def test_a_damaged_file_fails_the_job_and_says_which(studio: Served, folder: Path) -> None:
    path = folder / "activations" / "batch-1.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-30])
    job = ended(studio.engine, ImportLabels(sae="first", source=str(folder)))
    assert job.state == "failed" and job.error is not None
    assert job.error.code == "corrupt_file" and "batch-1.jsonl.gz" in job.error.what
