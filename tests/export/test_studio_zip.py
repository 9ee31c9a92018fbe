"""The documents' zip: exact, reproducible, streamed, atomic, and refused when it cannot be right."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import tracemalloc
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from export_data import ABOUT, DEAD, FEATURES, RAIN, many, saelens_folder
from make_golden import GOLDEN, OPTIONS

from mistudio_engine.api.errors import BadInput, DiskFull, EmptyData, NotFound
from mistudio_engine.export import studio_zip
from mistudio_engine.export.check import check_zip
from mistudio_engine.export.feature_json import Activation, ExportOptions, FeatureExport, Histogram, TokenValue, payload
from mistudio_engine.export.studio_zip import ExportedFile, SAEFacts, estimate_bytes, write_zip
from mistudio_engine.saes import load_sae

NO_WEIGHTS = OPTIONS.model_copy(update={"include_saelens_weights": False})


@pytest.fixture
def sae_folder(tmp_path: Path) -> Path:
    return saelens_folder(tmp_path / "sae")


def run(work) -> ExportedFile:
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def export(path: Path, features=FEATURES, *, about: SAEFacts = ABOUT, options: ExportOptions = NO_WEIGHTS, sae=None):
    return run(write_zip(path, about, features, n_features=len(features), options=options, saelens_folder=sae))


def read(path: Path, name: str):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(name))


def test_every_file_of_the_zip_equals_the_golden_one_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "weather.zip"
    export(path, options=OPTIONS, sae=GOLDEN / "saelens")
    golden = {p.relative_to(GOLDEN).as_posix(): p.read_bytes() for p in GOLDEN.rglob("*") if p.is_file()}
    with zipfile.ZipFile(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == golden
        assert archive.namelist() == [
            "metadata.json",
            "README.md",
            "features/0.json",
            "features/2.json",
            "features/7.json",
            "explanations/explanations.json",
            "saelens/cfg.json",
            "saelens/sae_weights.safetensors",
        ]
        for entry in archive.infolist():
            assert entry.date_time == (2025, 12, 5, 10, 30, 6)
            assert (entry.create_system, entry.external_attr, entry.flag_bits & ~0x800) == (3, 0o100644 << 16, 0)


def test_the_feature_json_is_the_one_of_the_requirements(tmp_path: Path) -> None:
    love = FeatureExport(
        index=0,
        label="expressions of romantic love",
        category="Emotion > Positive > Love",
        activation_frequency=0.023,
        max_activation=8.4,
        mean_activation=2.1,
        top_positive=[TokenValue("love", 1, 0.85), TokenValue("heart", 2, 0.72)],
        top_negative=[TokenValue("hate", 3, -0.45)],
        activations=[Activation(["I", " really ", "love", " you", " so much"], [0, 0, 4.52, 0, 0], 2)],
    )
    required = {
        "feature_index": 0,
        "label": "expressions of romantic love",
        "category": "Emotion > Positive > Love",
        "statistics": {"activation_frequency": 0.023, "max_activation": 8.4, "mean_activation": 2.1},
        "logit_lens": {
            "top_positive": [{"token": "love", "value": 0.85}, {"token": "heart", "value": 0.72}],
            "top_negative": [{"token": "hate", "value": -0.45}],
        },
        "activations": [
            {"token": "love", "value": 4.52, "context_before": "I really ", "context_after": " you so much"}
        ],
    }

    def within(small, large) -> bool:
        if isinstance(small, dict):
            return all(key in large and within(value, large[key]) for key, value in small.items())
        if isinstance(small, list):
            return len(small) == len(large) and all(within(a, b) for a, b in zip(small, large, strict=True))
        return small == large

    assert within(required, payload(love, ExportOptions()))


def test_the_same_export_twice_is_the_same_bytes_and_its_hash_is_told(tmp_path: Path, sae_folder: Path) -> None:
    one = export(tmp_path / "one.zip", options=OPTIONS, sae=sae_folder)
    two = export(tmp_path / "two.zip", list(FEATURES), options=OPTIONS, sae=sae_folder)
    data = one.path.read_bytes()
    assert data == two.path.read_bytes()
    assert one.sha256 == two.sha256 == hashlib.sha256(data).hexdigest()
    assert (one.n_bytes, one.n_features) == (len(data), 3)


def test_time_zones_and_the_clock_do_not_show(tmp_path: Path) -> None:
    elsewhere = ABOUT.export_date.astimezone(timezone(timedelta(hours=9)))
    there = export(tmp_path / "there.zip", about=dataclasses.replace(ABOUT, export_date=elsewhere))
    assert there.sha256 == export(tmp_path / "here.zip").sha256
    old = dataclasses.replace(ABOUT, export_date=datetime(1970, 1, 1, tzinfo=UTC))
    export(tmp_path / "old.zip", about=old)
    assert read(tmp_path / "old.zip", "metadata.json")["export_date"] == "1970-01-01T00:00:00Z"


def test_the_weights_load_again(tmp_path: Path, sae_folder: Path) -> None:
    export(tmp_path / "w.zip", options=OPTIONS, sae=sae_folder)
    with zipfile.ZipFile(tmp_path / "w.zip") as archive:
        archive.extractall(tmp_path / "out")
    ours, theirs = load_sae(sae_folder), load_sae(tmp_path / "out" / "saelens")
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("option", "absent"),
    [
        ("include_logit_lens", "logit_lens"),
        ("include_histograms", "histogram"),
        ("include_top_tokens", "top_tokens"),
    ],
)
def test_a_part_that_is_left_out_is_absent_and_the_metadata_says_so(tmp_path: Path, option: str, absent: str) -> None:
    export(tmp_path / "x.zip", options=NO_WEIGHTS.model_copy(update={option: False}))
    assert absent not in read(tmp_path / "x.zip", "features/0.json")
    assert read(tmp_path / "x.zip", "metadata.json")["includes"][option.removeprefix("include_")] is False
    check_zip(tmp_path / "x.zip")


def test_without_explanations_no_label_is_anywhere(tmp_path: Path) -> None:
    export(tmp_path / "x.zip", options=NO_WEIGHTS.model_copy(update={"include_explanations": False}))
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert "explanations/explanations.json" not in archive.namelist()
        assert not any("rain — " in archive.read(name).decode() for name in archive.namelist())
    assert check_zip(tmp_path / "x.zip").n_labelled == 0


def test_ks_and_bins_are_honoured(tmp_path: Path) -> None:
    lens = payload(RAIN, OPTIONS)["logit_lens"]
    assert [len(lens["top_positive"]), len(lens["top_negative"])] == [2, 2]
    assert len(payload(RAIN, OPTIONS)["top_tokens"]) == 1
    assert len(payload(RAIN, OPTIONS.model_copy(update={"top_tokens_k": 50}))["top_tokens"]) == 2
    with pytest.raises(BadInput, match=r"feature 0 has 2 bins and 3 edges; 50 bins"):
        payload(RAIN, ExportOptions())


def test_what_is_unknown_is_null_and_a_dead_feature_has_an_empty_histogram(tmp_path: Path) -> None:
    unknown = payload(FeatureExport(index=7), OPTIONS)
    assert (unknown["logit_lens"], unknown["histogram"], unknown["top_tokens"], unknown["label"]) == (None,) * 4
    assert unknown["activations"] == []
    dead = payload(DEAD, OPTIONS)["histogram"]
    assert (dead["bin_edges"], dead["counts"], dead["total_activations"], dead["non_zero_count"]) == ([0], [0], 1000, 0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_cannot_hold_is_refused_with_its_place(tmp_path: Path, number: float) -> None:
    broken = dataclasses.replace(RAIN, activations=[Activation(["a", "b"], [1.0, number], 0)])
    with pytest.raises(BadInput, match=r"feature 0, activations\[0\], values\[1\] is (nan|inf|-inf)"):
        export(tmp_path / "x.zip", [broken])
    assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_becomes_a_replacement_character_that_every_parser_reads(tmp_path: Path) -> None:
    odd = dataclasses.replace(RAIN, label="a\ud800b \ud83d\ude00", category="\udfff")
    export(tmp_path / "x.zip", [odd])
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        raw = archive.read("features/0.json").decode()
    assert json.loads(raw)["label"] == "a�b 😀"
    assert json.loads(raw)["category"] == "�"
    assert check_zip(tmp_path / "x.zip").n_features == 1


@pytest.mark.parametrize("name", ["../../etc/passwd", "/root/x", "C:\\x", "a\0b", "x" * 5000, "ＡＵＸ", "\ud800"])
def test_no_name_in_the_zip_derives_from_anybodys_text(tmp_path: Path, name: str) -> None:
    about = dataclasses.replace(ABOUT, sae_id=name, sae_name=name, model_name=name, architecture=name)
    feature = FeatureExport(index=3, label=name, category=name)
    export(tmp_path / "x.zip", [feature], about=about)
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.namelist() == [
            "metadata.json",
            "README.md",
            "features/3.json",
            "explanations/explanations.json",
        ]


def test_nothing_in_the_readme_is_a_line_of_somebody_elses(tmp_path: Path) -> None:
    export(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        lines = archive.read("README.md").decode().splitlines()
    assert lines[0] == "# weather L1 # not a heading"
    assert not any(line.startswith("# not") for line in lines)


def test_features_out_of_order_or_twice_or_of_another_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Feature 0 came after feature 2"):
        export(tmp_path / "x.zip", [DEAD, RAIN])
    with pytest.raises(BadInput, match="Feature 2 came after feature 2"):
        export(tmp_path / "x.zip", [DEAD, DEAD])
    for said in (2, 4):
        with pytest.raises(BadInput, match=f"{said} features announced"):
            run(write_zip(tmp_path / "x.zip", ABOUT, FEATURES, n_features=said, options=NO_WEIGHTS))
    with pytest.raises(EmptyData):
        write_zip(tmp_path / "x.zip", ABOUT, [], n_features=0, options=NO_WEIGHTS)
    assert list(tmp_path.iterdir()) == []


def test_examples_that_contradict_themselves_are_refused() -> None:
    for one in (Activation(["a"], [1.0, 2.0], 0), Activation(["a"], [1.0], 1), Activation([], [], 0)):
        with pytest.raises(BadInput, match="Example 0 of feature 4"):
            payload(FeatureExport(4, activations=[one]), OPTIONS)
    with pytest.raises(BadInput, match="feature 4 has 2 bins and 2 edges"):
        payload(FeatureExport(4, histogram=Histogram([0, 1], [1, 2], 3)), OPTIONS)


def test_missing_weights_are_named_before_anything_is_written(tmp_path: Path, sae_folder: Path) -> None:
    with pytest.raises(NotFound, match=r"cfg\.json and sae_weights\.safetensors"):
        write_zip(tmp_path / "x.zip", ABOUT, FEATURES, n_features=3, options=OPTIONS)
    (sae_folder / "sae_weights.safetensors").unlink()
    with pytest.raises(NotFound, match=r"SAE's sae_weights\.safetensors cannot"):
        write_zip(tmp_path / "x.zip", ABOUT, FEATURES, n_features=3, options=OPTIONS, saelens_folder=sae_folder)


def test_progress_goes_up_through_named_stages_to_the_end(tmp_path: Path, sae_folder: Path) -> None:
    path = tmp_path / "x.zip"
    steps = list(write_zip(path, ABOUT, many(100), n_features=100, options=OPTIONS, saelens_folder=sae_folder))
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert len(steps) > 12
    stages = [step.stage.split(" (")[0] for step in steps]
    assert list(dict.fromkeys(stages)) == ["Writing features", "Copying weights", "Hashing"]
    assert steps[0].stage == "Writing features (8/100)"


@pytest.mark.parametrize("n_steps", [1, 5, 14, 15])
def test_cancelling_anywhere_leaves_nothing_behind_and_an_older_export_untouched(
    tmp_path: Path, sae_folder: Path, n_steps: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    path = out / "x.zip"
    path.write_bytes(b"older")
    work = write_zip(path, ABOUT, many(100), n_features=100, options=OPTIONS, saelens_folder=sae_folder)
    for _ in range(n_steps):
        next(work)
    assert {p.name for p in out.iterdir()} == {"x.zip", "x.zip.part"}
    work.close()
    assert [p.name for p in out.iterdir()] == ["x.zip"]
    assert path.read_bytes() == b"older"


def test_a_full_disk_is_a_typed_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def features() -> Iterator[FeatureExport]:
        yield RAIN
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match=r"Writing x\.zip needs"):
        run(write_zip(tmp_path / "x.zip", ABOUT, features(), n_features=2, options=NO_WEIGHTS))
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_features(tmp_path: Path) -> None:
    def peak(n: int) -> int:
        tracemalloc.start()
        for step in write_zip(tmp_path / f"{n}.zip", ABOUT, many(n), n_features=n, options=NO_WEIGHTS):
            if step.n_features == n:
                break
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, more = peak(20), peak(1020)
    # A label and a line of the zip's directory stay of each, under a kilobyte; its ten kilobytes of examples do not.
    assert more - few < 1000 * 1000


def test_large_weights_are_copied_in_pieces(tmp_path: Path, sae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studio_zip, "CHUNK", 64)
    steps = list(
        write_zip(tmp_path / "x.zip", ABOUT, FEATURES, n_features=3, options=OPTIONS, saelens_folder=sae_folder)
    )
    assert sum(step.stage == "Copying weights" for step in steps) > 5
    assert check_zip(tmp_path / "x.zip").includes["saelens_weights"]


def test_the_size_is_estimated_within_a_factor_of_two(tmp_path: Path) -> None:
    done = run(write_zip(tmp_path / "x.zip", ABOUT, many(200), n_features=200, options=NO_WEIGHTS))
    bare = ExportOptions(
        include_logit_lens=False, include_histograms=False, include_top_tokens=False, include_saelens_weights=False
    )
    estimate = estimate_bytes(200, bare, weight_bytes=10**9, n_examples=10, window_tokens=64)
    assert done.n_bytes / 2 < estimate < done.n_bytes * 2
    assert estimate_bytes(200, ExportOptions(), weight_bytes=10**9) > 10**9
