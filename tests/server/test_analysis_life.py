"""Analysing words and importing labels in an engine that is killed: both go on by themselves and lose nothing."""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from mistudio_engine.api.client import Studio, connect
from mistudio_engine.api.home import read_engine_file
from mistudio_engine.api.operations import SetSetting
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.discovery.analysis_part import analyse_part
from mistudio_engine.discovery.extraction_store import load_extraction
from tests.bucket_server import BucketServer, bucket_server
from tests.server.processes import WAIT_SECONDS, kill, until

pytestmark = pytest.mark.slow

D_SAE, LABELS_EACH = 128, 2


def publish(bucket: BucketServer, source: str) -> None:
    """Labels for all features in one file, so that a kill finds it half read, and an example each."""
    of = [{"modelId": "tiny", "layer": source, "index": str(index)} for index in range(D_SAE)]
    tables: dict[str, list[dict[str, Any]]] = {
        "explanations": [
            row | {"description": f"published words {row['index']} {n}", "authorId": "ann", "scoreV1": n / 10}
            for row in of
            for n in range(LABELS_EACH)
        ],
        "activations": [row | {"tokens": ["a", " cat"], "values": [0.0, 1.0]} for row in of],
    }
    bucket.files = {
        f"v1/tiny/{source}/{kind}/batch-0.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows)).encode())
        for kind, rows in tables.items()
    }


def worker_of(home: Path) -> psutil.Process:
    """The process that the engine on this directory has spawned for words."""
    engine = read_engine_file(home)
    assert engine is not None
    (worker,) = (each for each in psutil.Process(engine.pid).children() if "spawn_main" in " ".join(each.cmdline()))
    return worker


def at_its_end(studio: Studio, slug: str) -> Any:
    return until(lambda: (now := studio.show_job(job=slug, wait_s=10)).finished and now, f"the end of {slug}")


def test_what_was_killed_goes_on_by_itself_and_is_what_an_undisturbed_run_makes(home: Path) -> None:
    with bucket_server() as bucket, connect(home) as studio:
        studio.call(SetSetting(key="embedder", value="words"))  # embedding the labels takes longer than all the rest
        studio.get_model(source="embedded", name="tiny").wait(WAIT_SECONDS)
        studio.get_dataset(source="embedded", name="corpus", model="tiny", n_tokens=5_000).wait(WAIT_SECONDS)
        sae = studio.train_sae(
            model="tiny", dataset="corpus", hook_name=DEMO_HOOK, d_sae=D_SAE, k=16, n_tokens=4096, batch_size=512
        ).wait(WAIT_SECONDS)
        record = studio.extract(sae=sae.slug, n_tokens=4096).wait(WAIT_SECONDS)
        folder = home / record.folder
        source = f"{sae.layer}-res-life"
        publish(bucket, source)
        bucket.answers = threading.Event()

        importing = studio.import_labels(sae=sae.slug, source=f"tiny/{source}", base_url=bucket.url)
        analysing = studio.analyse_features(sae=sae.slug, n_examples=5)
        parts = home / "jobs" / analysing.slug
        until(lambda: list(parts.rglob("*.parquet")), "a part of the analysis")
        worker = worker_of(home)
        os.kill(worker.pid, signal.SIGSTOP)  # so that it is not done before the labels are half there
        n_parts = len(list(parts.rglob("*.parquet")))
        bucket.answers.set()
        until(lambda: studio.label_history(sae=sae.slug, index=20).rows, "some labels")
        kill(home)
        assert not list(folder.rglob("analysis*")) and not (home / sae.folder / "published").exists()
        os.kill(worker.pid, signal.SIGCONT)
        assert psutil.wait_procs([worker], timeout=10)[1] == [], "without its engine a worker ends"

        for slug in (importing.slug, analysing.slug):
            assert studio.show_job(job=slug).state in ("queued", "running", "completed"), "the next engine takes it up"
        imported, analysed = at_its_end(studio, importing.slug), at_its_end(studio, analysing.slug)
        assert (imported.state, analysed.state) == ("completed", "completed"), (imported.error, analysed.error)
        assert not list(home.rglob("*.part"))

        # The labels are all this import's own, each is written once, and those of before the kill are found, too.
        report = imported.result
        assert (report["n_labels"], report["n_known"], report["n_examples"]) == (LABELS_EACH * D_SAE, 0, D_SAE)
        for index in (0, 20, 21, D_SAE - 1):
            history = [row.label for row in studio.label_history(sae=sae.slug, index=index).rows]
            assert history == [f"published words {index} {n}" for n in reversed(range(LABELS_EACH))]
            assert studio.show_published(sae=sae.slug, index=index).sources[0].total == 1
        assert studio.show_sae(sae=sae.slug).n_labelled == D_SAE

        # Every living feature is analysed, what was done before the kill not again, and each as by itself.
        extraction = load_extraction(folder / "data")
        alive = extraction.indices[extraction.n_active > 0].tolist()
        kept = pq.read_table(folder / "derived" / "analysis.parquet").to_pydict()
        assert sorted(kept["feature"]) == alive and analysed.result["n_analysed"] == len(alive) > 32 * n_parts
        model = home / studio.show_model(model="tiny").folder
        fixed = (sae.slug, record.slug, str(folder / "data"), str(model), "blank:xx", 5)
        some = alive[::16]
        found = sorted((index, text) for index, text in zip(*kept.values(), strict=True) if index in some)
        assert found == analyse_part(*fixed, some)
