"""Hostile, torn and mislabelled files are refused: quickly, with a typed error, without allocating what they claim."""

from __future__ import annotations

import json
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_data import random_sae

from mistudio_engine.api.errors import BadInput, Conflict, CorruptFile, DiskFull, MistudioError, NotFound
from mistudio_engine.saes import load_sae, save_sae
from mistudio_engine.saes.folders import new_folder
from mistudio_engine.saes.tensor_file import read_header, read_tensors, write_tensors

HUGE = 1 << 40


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE: dict[str, tuple[Any, bytes, int | None]] = {
    "an empty object without data is whole, so data is too much": ({}, bytes(8), None),
    "a header longer than the file": ({}, b"", HUGE),
    "a header length of 2^64 - 1": ({}, b"", (1 << 64) - 1),
    "no JSON": (b"{nonsense", b"", None),
    "not an object": ([1, 2], b"", None),
    "not UTF-8": (b"\xff\xfe{}", b"", None),
    "nested without end": (b"[" * 100_000, b"", None),
    "an enormous number": (b'{"a":' + b"9" * 100_000 + b"}", b"", None),
    "the same name twice": (b'{"a":1,"a":2}', b"", None),
    "an entry that is no object": ({"a": 3}, b"", None),
    "an entry without offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), None),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, bytes(8), None),
    "an unknown type": ({"a": entry(dtype="F4096")}, bytes(8), None),
    "a type that is no string": ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, bytes(8), None),
    "a shape of a tebibyte": ({"a": entry(shape=(HUGE,), offsets=(0, 4 * HUGE))}, bytes(8), None),
    "a negative shape": ({"a": entry(shape=(-1, -2))}, bytes(8), None),
    "a shape of floats": ({"a": entry(shape=(2.0,))}, bytes(8), None),
    "too many dimensions": ({"a": entry(shape=(1,) * 1000 + (2,))}, bytes(8), None),
    "a shape that does not fill its bytes": ({"a": entry(shape=(3,))}, bytes(8), None),
    "overlapping tensors": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None),
    "a gap between tensors": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), None),
    "offsets backwards": ({"a": entry(offsets=(8, 0))}, bytes(8), None),
    "data cut short": ({"a": entry()}, bytes(7), None),
    "data too long": ({"a": entry()}, bytes(9), None),
    "metadata that is no table": ({"__metadata__": [1], "a": entry()}, bytes(8), None),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8), None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_within_a_second_and_without_the_memory_it_claims(tmp_path: Path, case: str) -> None:
    header, data, length = HOSTILE[case]
    path = write(tmp_path / "a.safetensors", header, data, length)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CorruptFile):
        read_tensors(path)
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_header_of_a_gigabyte_that_is_really_there_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate((1 << 30) + 8)  # a hole on the disk
    with pytest.raises(CorruptFile, match="more than 1048576"):
        read_header(path)


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_file_is_refused_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.safetensors"
    good = {"W": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    write_tensors(path, good)
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "insert"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    path.write_bytes(content)
    try:
        tensors = read_tensors(path)
    except CorruptFile:
        return
    for tensor in tensors.values():
        assert tensor.numel() * tensor.element_size() <= len(content)
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all())


@given(content=st.binary(max_size=200))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_or_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    try:
        read_tensors(path)
    except MistudioError:
        return


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_infinity_are_refused_in_every_type(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    write_tensors(tmp_path / "a.safetensors", {"W": torch.tensor([1.0, value, 2.0], dtype=dtype)})
    with pytest.raises(CorruptFile, match=r"W in a\.safetensors has NaN or infinite"):
        read_tensors(tmp_path / "a.safetensors")


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"W": torch.ones(1000)})
    tensors = read_tensors(path)
    with path.open("r+b") as file:
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert bool((tensors["W"] == 1).all())


def test_a_missing_file_and_a_missing_folder_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no a\.safetensors"):
        read_header(tmp_path / "a.safetensors")
    with pytest.raises(NotFound, match="no folder nowhere"):
        load_sae(tmp_path / "nowhere")


def test_nan_weights_are_never_saved(tmp_path: Path) -> None:
    sae = random_sae("standard")
    sae.W_dec[3, 2] = float("nan")
    with pytest.raises(BadInput, match="W_dec has NaN"):
        save_sae(sae, tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "sae") as part:
        (part / "half").write_text("half")
        assert not (tmp_path / "sae").exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "sae.part").mkdir()  # left by a process that was killed
    (tmp_path / "sae.part/old").write_text("old")
    with new_folder(tmp_path / "sae") as part:
        (part / "file").write_text("whole")
    assert [file.name for file in (tmp_path / "sae").iterdir()] == ["file"]
    assert [folder.name for folder in tmp_path.iterdir()] == ["sae"]


def test_a_folder_that_exists_is_only_replaced_on_request(tmp_path: Path) -> None:
    first, second = random_sae("standard", seed=1), random_sae("standard", seed=2)
    save_sae(first, tmp_path / "sae")
    with pytest.raises(Conflict, match="sae exists already"):
        save_sae(second, tmp_path / "sae")
    assert torch.equal(load_sae(tmp_path / "sae").W_dec, first.W_dec)
    save_sae(second, tmp_path / "sae", replace=True)
    assert torch.equal(load_sae(tmp_path / "sae").W_dec, second.W_dec)
    assert [folder.name for folder in tmp_path.iterdir()] == ["sae"]


def test_a_full_disk_is_said_with_numbers_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"needs .* of disk and .* is free"), new_folder(tmp_path / "sae") as part:
        write_tensors(part / "a.safetensors", {"W": torch.zeros(1).expand(1 << 50)})
    assert list(tmp_path.iterdir()) == []
