"""The JSON document of features: whole or not there, the same bytes twice, a feature at a time."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mistudio_engine.api.errors import BadInput, DiskFull, EmptyData
from mistudio_engine.export.features_json import FORMAT, FeaturesDocument, write_features
from mistudio_engine.export.studio_zip import ExportedFile

HEAD: dict[str, Any] = {"sae": {"slug": "s"}, "extraction": None, "options": {}, "provenance": {}}


def feature(index: int, **more: Any) -> dict[str, Any]:
    return {"ref": f"sae/s#{index}", "id": f"s:{index}", "sae": "s", "index": index, **more}


def written(path: Path, features: list[dict[str, Any]], **more: Any) -> tuple[ExportedFile, list[Any]]:
    work = write_features(path, HEAD, iter(features), n_features=len(features), **more)
    steps = []
    while True:
        try:
            steps.append(next(work))
        except StopIteration as stop:
            return stop.value, steps


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_written_is_read_back(tmp_path, compress):
    features = [feature(n, label="naïve “quoted” \n 猫 \ud800", max_activation=n / 7) for n in range(20)]
    done, steps = written(tmp_path / "f", features, compress=compress)
    data = (tmp_path / "f").read_bytes()
    assert (done.n_bytes, done.n_features) == (len(data), 20)
    assert done.sha256 == hashlib.sha256(data).hexdigest()
    text = (gzip.decompress(data) if compress else data).decode()
    document = json.loads(text)
    FeaturesDocument.model_validate(document)
    assert document["format"] == FORMAT and document["n_features"] == 20
    expected = [each | {"label": each["label"].replace("\ud800", "�")} for each in features]
    assert document["features"] == expected
    lines = text.splitlines()
    assert json.loads(lines[3].rstrip(",")) == expected[2], "a line is a feature"
    assert [step.n_features for step in steps] == [8, 16]


@pytest.mark.parametrize("compress", [False, True])
def test_the_same_is_the_same_bytes(tmp_path, compress):
    features = [feature(n) for n in range(9)]
    one, _ = written(tmp_path / "one.json.gz", features, compress=compress)
    two, _ = written(tmp_path / "another.name", features, compress=compress)
    assert one.sha256 == two.sha256
    assert one.path.read_bytes() == two.path.read_bytes()


def test_features_are_asked_for_one_by_one(tmp_path):
    asked = []

    def features():
        for n in range(24):
            asked.append(n)
            yield feature(n)

    work = write_features(tmp_path / "f", HEAD, features(), n_features=24)
    assert asked == []
    next(work)
    assert asked == list(range(8))
    work.close()
    assert list(tmp_path.iterdir()) == [], "cancelled: nothing is left behind"


def test_an_older_document_stays_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "f").write_bytes(b"older")
    work = write_features(tmp_path / "f", HEAD, (feature(n) for n in range(24)), n_features=24)
    next(work)
    work.close()
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_bytes() == b"older"

    def features():
        yield feature(0)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match="Writing f needs"):
        list(write_features(tmp_path / "f", HEAD, features(), n_features=2, compress=True))
    assert [path.name for path in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_bytes() == b"older"


def test_a_number_that_json_cannot_hold_is_named_and_nothing_is_left(tmp_path):
    with pytest.raises(BadInput, match="feature 1, max_activation is nan"):
        written(tmp_path / "f", [feature(0), feature(1, max_activation=float("nan"))])
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_number_of_features_is_refused(tmp_path):
    work = write_features(tmp_path / "f", HEAD, [feature(0)], n_features=2)
    with pytest.raises(BadInput, match="1 features came and 2"):
        list(work)
    with pytest.raises(EmptyData):
        list(write_features(tmp_path / "f", HEAD, [], n_features=0))
    assert list(tmp_path.iterdir()) == []
