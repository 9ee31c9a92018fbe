"""An SAE's features as one JSON document: what get_feature says of each, the same bytes every time."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from typing import Any

import pytest

from mistudio_engine.api.operations import (
    DownloadExport,
    Export,
    Extract,
    GetFeature,
    ListExports,
    SetLabel,
    ShowExport,
)
from mistudio_engine.export.features_json import FeaturesDocument, write_features
from mistudio_engine.export.studio_zip import ExportProgress, write_zip
from mistudio_engine.handlers import exports
from mistudio_engine.runtime.engine import Engine
from tests.behaviour.doors import Served
from tests.behaviour.trainings import completed, steered, until

WRITERS = {"json": write_features, "zip": write_zip}

EXTRACTED = list(range(0, 128, 3))
"""The others are exported with their labels alone."""


@pytest.fixture(scope="module")
def studio(studio: Served) -> Served:
    """With an extraction of some features only."""
    completed(studio.engine, Extract(sae="first", n_tokens=8192, features=EXTRACTED))
    return studio


def exported(engine: Engine, **more: Any) -> tuple[dict[str, Any], bytes]:
    """The record of an export and its bytes."""
    job = completed(engine, Export(sae="first", format="json", **more))
    assert job.result is not None
    download = engine.call(DownloadExport(export=job.result["slug"]))
    with open(download.path, "rb") as file:
        data = file.read()
    assert download.sha256 == hashlib.sha256(data).hexdigest() == job.result["sha256"]
    assert download.n_bytes == len(data)
    return job.result, data


def test_each_feature_is_what_get_feature_says(studio: Served) -> None:
    engine = studio.engine
    engine.call(SetLabel(feature="first#3", label="猫 and “dogs”", category="Animals", evidence="I looked."))
    record, data = exported(engine, n_examples=4, window=6, histogram_bins=20)
    assert record["format"] == "json" and record["status"] == "completed"
    document = json.loads(data)
    FeaturesDocument.model_validate(document)
    assert document["sae"]["slug"] == "first" and document["n_features"] == 128 == len(document["features"])
    assert document["extraction"]["slug"] == document["features"][0]["extraction"]
    assert document["provenance"]["bos_policy"]
    bare = [feature for feature in document["features"] if feature["index"] not in EXTRACTED]
    assert all(feature["examples"] is feature["histogram"] is feature["top_tokens"] is None for feature in bare)
    assert sum(feature["label"] is not None for feature in bare) > 40
    for index in EXTRACTED:
        feature = document["features"][index]
        operation = GetFeature(sae="first", index=index, n=4, window=6, bins=20, sampling="all")
        card = engine.call(operation).model_dump(mode="json")
        examples, shown = feature.pop("examples"), card.pop("examples")
        assert feature == card
        assert [{key: each[key] for key in shown[0]} for each in examples] == shown if shown else not examples
        for each in examples:
            assert len(each["token_ids"]) == len(each["tokens"]) == len(each["values"])
            if each["value"]:
                assert each["values"][each["position"]] == each["value"]
    third = document["features"][3]
    assert third["label"] == "猫 and “dogs”" and third["labels"][0]["author"] == "person"


def test_the_same_export_is_the_same_bytes_also_compressed(studio: Served) -> None:
    some: dict[str, Any] = {"feature_selection": "custom", "range_start": 0, "range_end": 20}
    one, plain = exported(studio.engine, **some)
    two, again = exported(studio.engine, **some)
    assert one["slug"] != two["slug"] and plain == again
    packed_record, packed = exported(studio.engine, **some, compress=True)
    assert packed_record["format"] == "json.gz"
    assert gzip.decompress(packed) == plain
    assert exported(studio.engine, **some, compress=True)[1] == packed


def test_what_was_not_asked_for_is_null(studio: Served) -> None:
    _, data = exported(
        studio.engine,
        feature_selection="custom",
        indices=[6, 3],
        include_explanations=False,
        include_histograms=False,
        include_logit_lens=False,
        include_top_tokens=False,
        n_examples=0,
    )
    features = json.loads(data)["features"]
    assert [each["index"] for each in features] == [3, 6]
    for each in features:
        absent = ("label", "category", "labels", "histogram", "promoted", "suppressed", "top_tokens")
        assert not any(each[name] for name in absent) and each["examples"] == []
        assert each["activation_frequency"] is not None


def test_numbers_of_tokens_are_honoured(studio: Served) -> None:
    _, data = exported(studio.engine, feature_selection="extracted", top_tokens_k=2, logit_lens_k=3)
    for each in json.loads(data)["features"]:
        assert len(each["promoted"]) == len(each["suppressed"]) == 3
        assert 1 <= len(each["top_tokens"]) <= 2


def test_a_dry_run_says_about_how_large_it_will_be(studio: Served) -> None:
    job = studio.engine.call(Export(sae="first", format="json", dry_run=True))
    _, data = exported(studio.engine)
    assert job.plan is not None and 0.3 < job.plan.disk_bytes / len(data) < 5


def test_the_download_is_a_file_over_rest(studio: Served) -> None:
    record, data = exported(studio.engine, compress=True, feature_selection="custom", indices=[3])
    with studio.http(headers=studio.headers) as http:
        answer = http.get(
            f"/api/v1/neuronpedia/export/{record['slug']}/download", headers={"Accept-Encoding": "identity"}
        )
        assert answer.status_code == 200 and answer.content == data
        assert answer.headers["content-type"].startswith("application/gzip")
    assert studio.engine.call(ShowExport(export=record["slug"])).file_size_bytes == len(data)


@pytest.mark.parametrize("selection", [{"range_start": 0, "range_end": 9}, {"range_start": 0}, {"indices": [1]}])
@pytest.mark.parametrize("which", ["all", "extracted"])
def test_a_selection_that_would_be_ignored_is_refused(selection: dict[str, Any], which: Any) -> None:
    with pytest.raises(ValueError, match="go with feature_selection='custom'"):
        Export(sae="first", feature_selection=which, **selection)


def test_the_zip_is_still_there_and_is_not_compressed_twice(studio: Served) -> None:
    job = completed(studio.engine, Export(sae="first", feature_selection="custom", indices=[2, 3]))
    assert job.result is not None and job.result["format"] == "zip"
    assert studio.engine.call(DownloadExport(export=job.result["slug"])).media_type == "application/zip"
    with pytest.raises(ValueError, match="compress goes with format='json'"):
        Export(sae="first", compress=True)


@pytest.mark.parametrize("form", ["json", "zip"])
def test_a_list_by_status_has_those_that_are_shown_with_it(
    studio: Served, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Also while it packs what it has written, which is held up here."""
    engine, goes_on = studio.engine, threading.Event()

    def held_up(*arguments: Any, **more: Any) -> Any:
        steps = WRITERS[form](*arguments, **more)
        written = yield from steps
        yield ExportProgress("Held up", 1.0, 3)
        assert goes_on.wait(60)
        return written

    monkeypatch.setattr(exports, WRITERS[form].__name__, held_up)
    with steered(engine, Export(sae="first", format=form, feature_selection="custom", indices=[0, 3, 6])) as job:
        slug = (job.subject or "").removeprefix("export/")
        until(lambda: engine.call(ShowExport(export=slug)).status == "packaging", "packaging")
        listed = {
            status: [row.slug for row in engine.call(ListExports(sae="first", status=status)).rows]
            for status in ("computing", "packaging", "completed")
        }
        goes_on.set()
        assert engine.jobs.wait(job.slug, 60).state == "completed"
    assert listed["packaging"] == [slug] and slug not in listed["computing"] + listed["completed"]
    assert engine.call(ShowExport(export=slug)).status == "completed"
