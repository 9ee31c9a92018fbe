"""Files are whole or not there, and no path leaves its root."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistudio_engine.api.errors import Conflict, DiskFull, Forbidden
from mistudio_engine.runtime.files import (
    atomic_folder,
    free_bytes,
    hashing_folder,
    require_free,
    safe_path,
    sha256_file,
    sha256_folder,
    slugify,
    sweep_parts,
    write_atomic,
)


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "sae"
    with atomic_folder(target) as part:
        assert part == tmp_path / "sae.part"
        (part / "nested").mkdir()
        (part / "nested" / "cfg.json").write_text("{}")
        assert not target.exists()
    assert (target / "nested" / "cfg.json").read_text() == "{}"
    assert os.listdir(tmp_path) == ["sae"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "sae") as part:
        (part / "half").write_text("half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_what_a_crash_left_does_not_get_into_the_next_folder(tmp_path: Path) -> None:
    (tmp_path / "sae.part").mkdir()
    (tmp_path / "sae.part" / "torn").write_text("torn")
    with atomic_folder(tmp_path / "sae") as part:
        (part / "whole").write_text("whole")
    assert os.listdir(tmp_path / "sae") == ["whole"]


@pytest.mark.parametrize("content", [[], ["cfg.json"]])
def test_an_existing_folder_is_not_replaced(tmp_path: Path, content: list[str]) -> None:
    target = tmp_path / "sae"
    with pytest.raises(Conflict, match="'sae' exists already"), atomic_folder(target):
        target.mkdir()  # by somebody else, meanwhile; even an empty one is not ours
        for name in content:
            (target / name).touch()
    assert os.listdir(tmp_path) == ["sae"]


def test_a_file_is_replaced_as_a_whole_and_is_private_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    path.write_text("old")
    write_atomic(path, "new ü", mode=0o600)
    assert path.read_bytes() == "new ü".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_atomic(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert os.listdir(tmp_path) == ["engine.json"]


def test_a_file_that_cannot_be_put_in_place_leaves_no_part(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "taken", "data")
    assert os.listdir(tmp_path) == ["taken"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left_is_a_typed_error(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(DiskFull, match=r"Writing sae needs more than the .* that are free"),
        atomic_folder(tmp_path / "sae"),
    ):
        raise OSError(code, os.strerror(code))
    assert os.listdir(tmp_path) == []


def test_other_faults_of_the_system_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "sae"):
        raise PermissionError(errno.EACCES, "no")


def test_space_is_asked_for_before_it_is_used(tmp_path: Path) -> None:
    require_free(tmp_path / "not" / "yet", 1, "A model")
    needed = free_bytes(tmp_path) + (1 << 50)
    with pytest.raises(DiskFull, match=r"A model needs .* TiB of disk and .* is free"):
        require_free(tmp_path / "not" / "yet", needed, "A model")


@pytest.mark.parametrize("parts", [("saes", "l2"), ("saes/l2", "cfg.json"), ("データ",), ("über.txt",), ("a-b_c.1",)])
def test_plain_names_are_joined_below_the_root(tmp_path: Path, parts: tuple[str, ...]) -> None:
    assert safe_path(tmp_path, *parts) == tmp_path.joinpath(*parts)


@pytest.mark.parametrize(
    "part",
    [
        *("", ".", "..", "../etc", "a/../../b", "a/./b", "a//b", "/etc/passwd", "a/", "..."),
        *("a\0b", "a\nb", "a\u202eb", "a\u200bb", "\ufeffa", "a\u2028b", "\udc80"),
        *("..\\x", "C:\\x", "c:x", "\\\\host\\share"),
        # two-dot leader, one-dot leaders, fullwidth dots, solidus and reverse solidus, fraction and division slash
        *("‥", "․․", "．．", "a／b", "a＼b", "a⁄b", "a∕b", "a∖b", "a⧸b", "a﹨b"),
        *("a.", "a ", " ", "x" * 256, "ü" * 128),
    ],
)
def test_a_hostile_name_is_refused_with_its_reason(tmp_path: Path, part: str) -> None:
    with pytest.raises(Forbidden, match=r"is not allowed: (it|one of its names)"):
        safe_path(tmp_path, "saes", part)


def test_a_link_that_leads_outside_is_refused_and_one_that_stays_is_followed(tmp_path: Path) -> None:
    root = tmp_path / "home"
    (root / "saes" / "real").mkdir(parents=True)
    (root / "inside").symlink_to(root / "saes")
    (root / "outside").symlink_to(tmp_path)
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    assert safe_path(root, "inside", "real") == root / "saes" / "real"
    for name in ("outside", "outside/x", "dangling"):
        with pytest.raises(Forbidden, match="through a link"):
            safe_path(root, name)


def test_a_root_that_is_a_link_itself_is_fine(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    assert safe_path(tmp_path / "home", "saes") == tmp_path / "home" / "saes"


@given(st.text())
def test_whatever_the_name_the_path_stays_inside(name: str) -> None:
    root = Path("/nonexistent-root")
    try:
        path = safe_path(root, name)
    except Forbidden:
        return
    assert root in path.parents


@given(st.text())
def test_a_slug_of_any_text_is_a_safe_name(text: str) -> None:
    slug = slugify(text)
    assert safe_path(Path("/nonexistent-root"), slug).name == slug
    assert slugify(slug) == slug
    assert len(slug) <= 80


def test_slugs_are_readable_and_never_look_partial() -> None:
    assert slugify("EleutherAI/pythia-70m") == "eleutherai-pythia-70m"
    assert slugify("Café: ½ voll!") == "cafe-12-voll"
    assert slugify("../../etc/passwd") == "etc-passwd"
    assert slugify("model.part") == "model-part"
    assert slugify("日本") != slugify("中国")


def test_hashes_depend_on_names_and_contents_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x").write_text("1")
    os.utime(tmp_path / "b" / "sub" / "x", (0, 0))
    assert sha256_folder(tmp_path / "a") == sha256_folder(tmp_path / "b")
    assert sha256_file(tmp_path / "a" / "sub" / "x") == (
        "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    )
    (tmp_path / "b" / "sub" / "x").rename(tmp_path / "b" / "sub" / "y")
    assert sha256_folder(tmp_path / "a") != sha256_folder(tmp_path / "b")


def test_a_folder_is_hashed_in_steps_that_can_be_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(range(250)))
    (tmp_path / "empty").touch()
    monkeypatch.setattr("mistudio_engine.runtime.files.HASHED_AT_ONCE", 100)
    steps = hashing_folder(tmp_path)
    assert list(steps) == [0.4, 0.8, 1.0]
    lines = "".join(f"{name}\0{sha256_file(tmp_path / name)}\n" for name in ("a", "empty"))
    assert sha256_folder(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


def test_a_start_sweeps_away_what_a_crash_left_and_follows_no_links(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (root / "saes" / "l2.part" / "deep").mkdir(parents=True)
    (root / "saes" / "whole").mkdir()
    (root / "engine.json.1a2b.part").touch()
    (elsewhere / "mine.part").mkdir(parents=True)
    (root / "link").symlink_to(elsewhere)
    (root / "link.part").symlink_to(elsewhere)
    assert sweep_parts(root, older_than_seconds=3600) == []
    swept = sweep_parts(root)
    assert sorted(path.name for path in swept) == ["engine.json.1a2b.part", "l2.part", "link.part"]
    assert sorted(os.listdir(root)) == ["link", "saes"]
    assert (elsewhere / "mine.part").is_dir()
