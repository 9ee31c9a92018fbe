"""Analyses and maps of a dictionary's features: made in processes of their own, kept, resumed, refused and shown."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mistudio_engine.api.errors import BadInput, Forbidden, MistudioError, NotFound
from mistudio_engine.api.operations import AnalyseFeatures, Extract, MapFeatures, ShowAnalysis, ShowMap
from mistudio_engine.api.records import Job, SAERecord
from mistudio_engine.discovery.analysis_store import ANALYSIS_FILE, part_features, read_analysis, write_part
from mistudio_engine.handlers import analysis as handlers
from mistudio_engine.handlers.feature_map import run_map_features
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.runtime import processes
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext
from tests.behaviour.doors import DOORS, Door, Loop, Served
from tests.behaviour.trainings import completed, until

D_SAE = 128
FEATURES = list(range(0, D_SAE, 3))
"""Those that are extracted: what is made for each of them takes a third of the time."""

PLAIN = ["in process", "REST"]
"""Doors that give a program all of an answer; an agent's tools are tested where they are made."""


@pytest.fixture(scope="module")
def engine(studio: Served) -> Engine:
    """With an extraction of some features."""
    completed(studio.engine, Extract(sae="first", n_tokens=8192, features=FEATURES))
    return studio.engine


@pytest.fixture
def doors(studio: Served, loop: Loop) -> Iterator[list[Door]]:
    """Both, one after another: a job is made once and seen through each."""
    opened = [DOORS[name](studio, loop) for name in PLAIN]
    yield [next(door) for door in opened]
    for door in opened:
        next(door, None)


@pytest.fixture
def derived(engine: Engine) -> Iterator[Path]:
    """Where analyses and maps lie; empty before and after."""
    with Knowledge.of(engine, "first") as known:
        folder = known.folder / handlers.DERIVED_FOLDER
    yield folder
    for file in folder.glob("*"):
        file.unlink()


def living(engine: Engine) -> list[int]:
    with Knowledge.of(engine, "first") as known:
        return list(known.alive())


@pytest.fixture
def folder_pipeline(tmp_path: Path) -> str:
    """A pipeline in a folder, whose rules know the lemma of one word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spacy

        nlp = spacy.blank("en")
        ruler = nlp.add_pipe("attribute_ruler")
        ruler.add(patterns=[[{"IS_ALPHA": True}]], attrs={"POS": "X", "LEMMA": "word"})
        nlp.meta["name"], nlp.meta["version"] = "rules", "0.1"
        nlp.to_disk(tmp_path / "rules")
    return str(tmp_path / "rules")


def test_every_living_feature_is_analysed(engine, doors, derived):
    alive = living(engine)
    at_once = engine.call(ShowAnalysis(sae="first", index=alive[3]))
    assert not at_once.stored

    job = completed(engine, AnalyseFeatures(sae="first"))
    assert (job.result["n_analysed"], job.result["n_dead"]) == (len(alive), len(FEATURES) - len(alive))
    assert (job.result["pipeline"], job.result["missing"][0]) == ("blank:xx", "part_of_speech")
    assert "install" in job.result["advice"]
    assert sorted(part_features(derived / ANALYSIS_FILE)) == alive
    kept = engine.call(ShowAnalysis(sae="first", index=alive[3]))
    assert kept == at_once.model_copy(update={"stored": True})
    for door in doors:
        shown = door(ShowAnalysis(sae="first", index=alive[3]))
        assert (shown.sae, shown.index, shown.stored) == ("first", alive[3], True)
        assert len(shown.words) == 20 or sum(word.share for word in shown.words) == pytest.approx(1)
        assert shown.n_silent_words > 0
        assert shown.summary.startswith("Looked at")
    assert read_analysis(derived, D_SAE) is None


def test_the_setting_counts_where_a_call_is_silent(engine, derived, folder_pipeline):
    engine.store.put_setting("nlp_pipeline", folder_pipeline)
    try:
        shown = engine.call(ShowAnalysis(sae="first", index=living(engine)[1]), caller="agent:claude")
        assert shown.pipeline == "en_rules 0.1"
    finally:
        engine.store.put_setting("nlp_pipeline", None)


def test_an_agent_may_not_name_a_folder(engine, folder_pipeline):
    for operation in (
        AnalyseFeatures(sae="first", pipeline=folder_pipeline),
        ShowAnalysis(sae="first", index=0, pipeline=folder_pipeline),
    ):
        with pytest.raises(Forbidden, match="Only a person may name a pipeline by its folder"):
            engine.call(operation, caller="agent:claude")


@pytest.mark.parametrize(
    ("operation", "error", "match"),
    [
        (AnalyseFeatures(sae="first", features=[D_SAE]), NotFound, "no feature 128"),
        (AnalyseFeatures(sae="first", pipeline="en_core_web_none"), NotFound, "not installed"),
        (AnalyseFeatures(sae="first", pipeline="blank:klingon"), NotFound, "no language 'klingon'"),
        (ShowAnalysis(sae="first", index=D_SAE), NotFound, "no feature 128"),
        (ShowAnalysis(sae="none", index=0), NotFound, "no sae 'none'"),
        (ShowMap(sae="first", what="labels", method="pca"), NotFound, "no map of the labels"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_starts(doors, operation, error, match):
    for door in doors:
        with pytest.raises(error, match=match):
            door(operation)


def test_a_dry_run_says_what_it_would_do_and_starts_nothing(engine, derived):
    before = len(engine.store.all(Job))
    job = engine.call(AnalyseFeatures(sae="first", features=living(engine)[:4], dry_run=True))
    assert job.plan.details == {"n_features": 4, "n_dead": 0, "pipeline": "blank:xx"}
    job = engine.call(MapFeatures(sae="first", dry_run=True))
    assert job.plan.details["n_features"] == len(living(engine))
    assert len(engine.store.all(Job)) == before
    assert not list(derived.glob("*"))


def workers() -> list[int]:
    """Processes of this one that do such work."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"parent_pid={os.getpid()}," in (entry / "cmdline").read_text() or (
                "spawn_main" in (entry / "cmdline").read_text()
                and (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid())
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_cancelling_ends_the_process_within_five_seconds(engine, derived):
    job = engine.call(AnalyseFeatures(sae="first"))
    until(workers, "a process")
    begun = time.monotonic()
    engine.jobs.control(job.slug, "cancel")
    assert engine.jobs.wait(job.slug, 10).state == "cancelled"
    assert time.monotonic() - begun < 5
    assert not workers()
    assert not (derived / ANALYSIS_FILE).exists()


def test_a_crash_and_a_stop_keep_what_is_analysed_and_other_analyses_stay(
    engine, derived, folder_pipeline, monkeypatch
):
    """The parts of an attempt that was cut short stay in the job's folder, and the next attempt begins there."""
    monkeypatch.setattr(handlers, "ANALYSED_AT_ONCE", 1)
    *wanted, again, other = living(engine)
    kept = [engine.call(ShowAnalysis(sae="first", index=index)) for index in (again, other)]
    write_part(derived / ANALYSIS_FILE, [(each.index, each.model_dump_json()) for each in kept])

    features = [again, *wanted, again]
    job = engine.call(AnalyseFeatures(sae="first", features=features, pipeline=folder_pipeline, n_examples=2))
    folder = engine.home / "jobs" / job.slug
    until(lambda: [*folder.rglob("*.parquet")], "a part")
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    failed = engine.jobs.wait(job.slug, 30)
    assert (failed.state, failed.error.code) == ("failed", "job_failed")
    assert "SIGKILL" in failed.error.what
    n_parts = len([*folder.rglob("*.parquet")])
    assert 0 < n_parts <= len(wanted)
    calls: list[int] = []
    pool_map = processes.ProcessPool.map

    def watched(self, function, arguments):
        arguments = list(arguments)
        calls.extend(feature for each in arguments for feature in each[-1])
        return pool_map(self, function, arguments)

    monkeypatch.setattr(processes.ProcessPool, "map", watched)
    engine.jobs.control(job.slug, "retry")
    until(lambda: len([*folder.rglob("*.parquet")]) > n_parts, "another part")
    engine.jobs.control(job.slug, "stop")
    stopped = engine.jobs.wait(job.slug, 30)
    assert (stopped.state, stopped.result["pipeline"]) == ("completed", "en_rules 0.1")
    done = [again, *wanted][: stopped.result["n_analysed"]]
    assert n_parts < len(done) and calls == [again, *wanted][n_parts:]

    assert sorted(part_features(derived / ANALYSIS_FILE)) == sorted([*done, other])
    assert read_analysis(derived, other) == kept[1]
    found = read_analysis(derived, again)
    assert (found.pipeline, found.n_examples) == ("en_rules 0.1", min(found.n_examples, 6))
    assert {"lemmas", "part_of_speech"}.isdisjoint(found.missing)
    assert {row.name for row in found.part_of_speech} == {"X"}


@pytest.mark.parametrize("method", ["pca", "umap"])
def test_a_map_of_decoder_directions_is_kept_and_shown_with_labels_and_frequencies(engine, doors, derived, method):
    job = completed(engine, MapFeatures(sae="first", method=method))
    alive = living(engine)
    assert (job.result["n_features"], job.result["method"]) == (len(alive), method)
    for door in doors:
        shown = door(ShowMap(sae="first"))
        assert (shown.index, shown.method) == (alive, method)
        assert np.isfinite([shown.x, shown.y]).all()
        assert (shown.total, shown.shown) == (len(alive), len(alive))
        with Knowledge.of(engine, "first") as known:
            rows = [known.row(index) for index in alive]
        assert shown.frequency == [row.activation_frequency for row in rows]
        assert (shown.label, shown.category) == ([row.label for row in rows], [row.category for row in rows])
        assert any(shown.label)
        assert (shown.explained_variance is None) == (method == "umap")


def test_the_same_map_comes_out_again_and_pca_is_that_of_the_decoder(engine, derived):
    from sklearn.decomposition import PCA

    completed(engine, MapFeatures(sae="first", method="pca"))
    first = engine.call(ShowMap(sae="first"))
    completed(engine, MapFeatures(sae="first", method="pca"))
    assert engine.call(ShowMap(sae="first")) == first
    from mistudio_engine.saes import load_sae

    W_dec = load_sae(engine.home / engine.store.get(SAERecord, "first").folder).W_dec[first.index]
    rows = W_dec.detach().double().numpy()
    reference = PCA(2, svd_solver="full").fit_transform(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    np.testing.assert_allclose(np.stack([first.x, first.y], axis=1), reference, atol=1e-6)


def test_labels_are_mapped_by_meaning_where_there_is_an_embedder(engine, derived):
    operation = MapFeatures(sae="first", what="labels", method="pca")
    if engine.embedder is None:
        with pytest.raises(BadInput, match="no text embedder"):
            engine.call(operation)
        return
    job = completed(engine, operation)
    shown = engine.call(ShowMap(sae="first", what="labels"))
    assert all(shown.label)
    assert job.result["n_left_out"] == len(living(engine)) - shown.total
    assert shown.settings["embedder"] == engine.embedder.id
    places = dict(zip(shown.label, zip(shown.x, shown.y, strict=True), strict=True))
    for label, x, y in zip(shown.label, shown.x, shown.y, strict=True):
        np.testing.assert_allclose(places[label], (x, y), atol=1.0)


def test_a_map_of_labels_says_so_when_the_embedder_has_gone_since_it_was_planned(engine, derived, monkeypatch):
    operation = MapFeatures(sae="first", what="labels", method="pca")
    monkeypatch.setattr(engine, "embedder", None)
    context = JobContext(Job(slug="map", operation="map_features"), derived, engine.bus.publish)
    with pytest.raises(BadInput, match="no text embedder"):
        list(run_map_features(operation, engine, context))


def test_a_map_is_filtered_and_paged_without_losing_or_repeating_a_feature(engine, doors, derived):
    completed(engine, MapFeatures(sae="first", method="pca"))
    door = doors[1]
    whole = door(ShowMap(sae="first"))
    middle = sorted(whole.frequency)[len(whole.frequency) // 2]
    often = door(ShowMap(sae="first", min_frequency=middle))
    assert often.index == [i for i, f in zip(whole.index, whole.frequency, strict=True) if f >= middle]
    assert often.total + often.hidden.frequency == whole.total
    labelled = door(ShowMap(sae="first", labelled=True))
    assert labelled.index == [i for i, label in zip(whole.index, whole.label, strict=True) if label]
    category = next(each for each in whole.category if each)
    within = door(ShowMap(sae="first", category=category))
    assert within.index == [
        i
        for i, each in zip(whole.index, whole.category, strict=True)
        if (each or "").split(" > ")[0] == category or each == category or (each or "").startswith(f"{category} > ")
    ]
    seen, cursor = [], None
    while True:
        page = door(ShowMap(sae="first", limit=30, cursor=cursor))
        seen += page.index
        if (cursor := page.next_cursor) is None:
            break
        last = cursor
    assert seen == whole.index
    with pytest.raises(BadInput, match="does not belong"):
        door(ShowMap(sae="first", labelled=False, limit=30, cursor=last))
    with pytest.raises(BadInput, match="does not belong to this list"):
        door(ShowMap(sae="first", limit=30, cursor=f"{last.rpartition('-')[0]}-{'9' * 5000}"))


def test_a_torn_map_or_analysis_is_a_typed_error(engine, derived):
    index = living(engine)[0]
    completed(engine, MapFeatures(sae="first", method="pca"))
    write_part(derived / ANALYSIS_FILE, [(index, "{}")])
    for file in derived.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    for operation in (ShowMap(sae="first"), ShowAnalysis(sae="first", index=index)):
        with pytest.raises(MistudioError) as caught:
            engine.call(operation)
        assert caught.value.code == "corrupt_file"
