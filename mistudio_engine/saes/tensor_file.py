"""A safetensors file, read with suspicion and written with care.

The header is checked here before anything is allocated: a file says how large it is before it is believed. It knows
names, types, shapes and offsets; it does not know what the tensors mean.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mistudio_engine.api.errors import CorruptFile, DiskFull, NotFound

__all__ = ["Header", "TensorInfo", "read_header", "read_json", "read_tensors", "write_tensors"]

_MAX_HEADER_BYTES = 1 << 20
"""An SAE has a dozen tensors and a checkpoint some dozens: a longer header is an attack, or not ours."""

_MAX_JSON_BYTES = 4 << 20
_MAX_DIMENSIONS = 8

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
"""Types that we write or expect; another one is refused."""


class TensorInfo(NamedTuple):
    """What the header says of one tensor."""

    dtype: str
    """As safetensors spells it: F32, BF16, …"""

    shape: tuple[int, ...]


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        NotFound: no such file.
        CorruptFile: it is too long, not UTF-8, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptFile(f"{path.name} is {path.stat().st_size} bytes long, far more than a configuration.")
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"There is no {path.name} in {path.parent.name}.", fix="Name the folder of an SAE.") from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"it is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise _corrupt(path, "it holds no JSON object")
    return data


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's length.

    Raises:
        NotFound: no such file.
        CorruptFile: torn, truncated, or not what it claims to be; says which.
    """
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if n_bytes < 10 or length > n_bytes - 8:
                raise _corrupt(path, f"its header claims {length} bytes and the file has {n_bytes}")
            if length > _MAX_HEADER_BYTES:
                raise _corrupt(path, f"its header claims {length} bytes, more than {_MAX_HEADER_BYTES}")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except FileNotFoundError as error:
        raise NotFound(f"There is no {path.name} in {path.parent.name}.", fix="Name the folder of an SAE.") from error
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({error!s:.100})") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "its metadata is not a table of strings")

    tensors: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int]] = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise _corrupt(path, f"the header's entry for {name!r:.80} is incomplete") from error
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            raise _corrupt(path, f"{name!r:.80} has the type {dtype!r:.20}, which is none of {', '.join(_ITEM_BYTES)}")
        if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(_is_size(n) for n in shape):
            raise _corrupt(path, f"{name!r:.80} has the shape {shape!r:.80}")
        if not _is_size(start) or not _is_size(end) or end - start != prod(shape) * _ITEM_BYTES[dtype]:
            raise _corrupt(path, f"{name!r:.80} has a shape that does not fill its bytes {start!r:.20} to {end!r:.20}")
        tensors[name] = TensorInfo(dtype, tuple(shape))
        ranges.append((start, end))

    position = 0
    for start, end in sorted(ranges):
        if start != position:
            raise _corrupt(path, f"its tensors overlap or leave a gap at byte {min(start, position)}")
        position = end
    if position != n_bytes - 8 - length:
        raise _corrupt(path, f"its tensors need {position} bytes and {n_bytes - 8 - length} are there")
    return Header(tensors, metadata)


def read_tensors(path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a file, copied out of it, so that what happens to the file later does not matter.

    Raises:
        NotFound: no such file.
        CorruptFile: as `read_header`; and a floating point tensor that has a NaN or an infinity.
    """
    read_header(path)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                tensors[name] = tensor.to(device) if device != "cpu" else tensor.clone()
    except (SafetensorError, OSError) as error:
        raise _corrupt(path, str(error)) from error
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CorruptFile(
                f"{name} in {path.name} has NaN or infinite values.",
                why="It was saved by a run that had already failed, or the file is damaged.",
                fix="Use an earlier checkpoint, or fetch the file again.",
            )
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, contiguous and from any device. Make the folder around it atomic (folders.py), not this file.

    Raises:
        DiskFull: there is no room for them.
    """
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        raise DiskFull.of(f"Writing {path.name}", n_bytes, free)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        # The library passes on what the system said only as text, and a full disk is the one thing that can be mended.
        if "os error 28" in str(error) or "StorageFull" in str(error):
            raise DiskFull.of(f"Writing {path.name}", n_bytes, shutil.disk_usage(path.parent).free) from error
        raise


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; needs no memory of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = tensor.detach().aminmax()  # NaN goes through a minimum
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _corrupt(path: Path, why: str) -> CorruptFile:
    return CorruptFile(
        f"{path.name} in {path.parent.name} cannot be read: {why}.",
        fix="Fetch the file again, or use another copy.",
    )


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
