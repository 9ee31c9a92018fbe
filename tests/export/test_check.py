"""The verifier accepts our zips and names what is wrong with any other."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_data import ABOUT, FEATURES, saelens_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_golden import OPTIONS

from mistudio_engine.api.errors import CorruptFile
from mistudio_engine.export.check import check_zip
from mistudio_engine.export.studio_zip import write_zip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    sae = saelens_folder(folder / "sae")
    path = folder / "good.zip"
    list(write_zip(path, ABOUT, FEATURES, n_features=3, options=OPTIONS, saelens_folder=sae))
    return path


def rewritten(good: Path, path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A zip with the good one's files after a change."""
    with zipfile.ZipFile(good) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return path


def test_a_good_zip_is_reported_in_numbers(good: Path) -> None:
    report = check_zip(good)
    assert (report.n_features, report.n_labelled, report.n_examples) == (3, 2, 2)
    assert report.n_bytes == good.stat().st_size
    assert all(report.includes.values())


def edit(name: str, *keys: Any, to: Any) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        data = json.loads(files[name])
        inner = data
        for key in keys[:-1]:
            inner = inner[key]
        if to is KeyError:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = to
        files[name] = json.dumps(data).encode()

    return change


F0 = "features/0.json"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files: files.pop("README.md"), r"README.md is missing"),
        (lambda files: files.pop("metadata.json"), r"metadata.json is missing"),
        (lambda files: files.pop("features/2.json"), r"counts 3 features and there are 2"),
        (lambda files: files.pop("explanations/explanations.json"), r"explanations.json is missing"),
        (lambda files: files.pop("saelens/cfg.json"), r"saelens/cfg.json is missing"),
        (lambda files: files.update({"../evil": b""}), r"\.\./evil does not belong"),
        (lambda files: files.update({"features/007.json": b""}), r"features/007.json does not belong"),
        (lambda files: files.update({F0: b'{"feature_index": NaN}'}), r"holds NaN, which is not JSON"),
        (lambda files: files.update({F0: b'{"feature_index": 1e999}'}), r"holds 1e999"),
        (lambda files: files.update({F0: b'{"feature_index": 0, "feature_index": 0}'}), r"has a key twice"),
        (lambda files: files.update({F0: b'{"label": "\\ud800"}'}), r"half a surrogate pair"),
        (lambda files: files.update({F0: b"\xff\xfe"}), r"features/0.json is not JSON"),
        (lambda files: files.update({F0: b"[" * 100_000}), r"features/0.json is not JSON"),
        (edit(F0, "feature_index", to=1), r"features/0.json is of feature 1"),
        (edit(F0, "label", to=KeyError), r"label: Field required"),
        (edit(F0, "extra", to=1), r"extra: Extra inputs"),
        (edit(F0, "statistics", "activation_frequency", to=1.5), r"statistics.activation_frequency: .* less than"),
        (edit(F0, "logit_lens", to=KeyError), r"lacks logit_lens"),
        (edit(F0, "logit_lens", "top_positive", 0, "value", to=0.1), r"strongest tokens first"),
        (edit(F0, "logit_lens", "top_positive", 0, "token_id", to="7"), r"token_id: .* valid integer"),
        (edit(F0, "histogram", "counts", 0, to=21), r"counts other activations"),
        (edit(F0, "histogram", "bin_edges", 0, to=99), r"bins in order"),
        (edit("features/2.json", "histogram", "counts", to=[0, 0]), r"never fires"),
        (edit(F0, "activations", 0, "values", to=[1.0]), r"3 tokens and 1 values in activation 0"),
        (edit(F0, "activations", 0, "token_index", to=0), r"another prime token"),
        (edit("metadata.json", "d_sae", to=7), r"features/7.json lies beyond d_sae = 7"),
        (edit("metadata.json", "d_in", to=5), r"saelens/cfg.json is of another size"),
        (edit("metadata.json", "export_date", to="yesterday"), r"export_date"),
        (edit("metadata.json", "includes", "top_tokens", to=False), r"has top_tokens"),
        (edit("metadata.json", "settings", "top_tokens_k", to=0), r"settings.top_tokens_k"),
        (edit("explanations/explanations.json", "0", to="sun"), r"other labels than the features"),
        (lambda f: f.update({"saelens/sae_weights.safetensors": f["saelens/sae_weights.safetensors"][:-4]}), r"torn"),
        (lambda f: f.update({"saelens/sae_weights.safetensors": b"\xff" * 9}), r"sae_weights.safetensors is torn"),
    ],
)
def test_anything_against_the_documents_is_named(good: Path, tmp_path: Path, change, said: str) -> None:
    with pytest.raises(CorruptFile, match=said):
        check_zip(rewritten(good, tmp_path / "bad.zip", change))


def test_links_repeated_names_and_bombs_are_refused_unread(good: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.zip"
    shutil.copy(good, link)
    with zipfile.ZipFile(link, "a") as archive:
        entry = zipfile.ZipInfo("features/5.json")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(CorruptFile, match=r"features/5\.json is not a plain file"):
        check_zip(link)

    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo("features/5.json")
        entry.external_attr, entry.compress_type = 0o100644 << 16, zipfile.ZIP_DEFLATED
        with archive.open(entry, "w") as file:
            for _ in range(65):
                file.write(bytes(1 << 20))
    with pytest.raises(CorruptFile, match=r"features/5\.json would unpack to 68157440 bytes"):
        check_zip(bomb)

    twice = tmp_path / "twice.zip"
    shutil.copy(good, twice)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("features/0.json", b"{}")
    with pytest.raises(CorruptFile, match="two entries of one name"):
        check_zip(twice)


def test_what_is_no_zip_is_refused(tmp_path: Path) -> None:
    for data in (b"", b"PK", b"not a zip at all"):
        (tmp_path / "x.zip").write_bytes(data)
        with pytest.raises(CorruptFile, match="not a whole zip"):
            check_zip(tmp_path / "x.zip")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_found_or_harmless_and_never_crash(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.zip"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        report = check_zip(path)
    except CorruptFile:
        return
    assert report.n_features == 3
