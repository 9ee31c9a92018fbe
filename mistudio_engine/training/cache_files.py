"""The files of a cache of activations: an index, and shards of whole contexts that every read checks.

`index.json` says whose activations these are. `shard-00000.safetensors` and so on hold whole contexts in order: for
each hook a tensor (n, context_size, width), and `checksums` (n_hooks, n), the crc32 of each context's bytes, hooks
sorted by name. A file has its final name only when it is complete. It does not know a language model, nor what is read
when (activation_cache.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistudio_engine.api.errors import CorruptFile, DiskFull, NotFound
from mistudio_engine.saes.tensor_file import TensorInfo, read_header, read_json, write_tensors

__all__ = [
    "CacheDtype",
    "CacheInfo",
    "Shard",
    "disk_full_is_said",
    "free_bytes",
    "read_index",
    "shard_path",
    "sync",
    "write_index",
    "write_shard",
]

CacheDtype = Literal["float32", "bfloat16", "float16"]

_INDEX = "index.json"
_CHECKSUMS = "checksums"
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class CacheInfo(BaseModel):
    """What index.json says of a cache."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, extra="forbid", protected_namespaces=())

    format: Literal["mistudio-activations-1"] = "mistudio-activations-1"
    """The layout of the folder."""

    model_name: str
    """Whose activations they are, for people."""

    model_sha256: str
    """What identifies the weights and their precision: `model_fingerprint`, or what the writer was given."""

    tokenizer_hash: str
    """sha256 of the tokenizer's rules and vocabulary."""

    tokens_sha256: str
    """sha256 of the ids of the contexts."""

    context_size: int
    """Tokens in a context."""

    n_contexts: int
    """How many contexts, the first ones of the tokens."""

    widths: dict[str, int]
    """Numbers per token at each hook, by name."""

    dtype: CacheDtype
    """Type of the numbers."""

    shard_contexts: tuple[int, ...] = ()
    """Contexts in each shard; empty while the cache is being written."""


def read_index(folder: Path, *, finished: bool = True) -> CacheInfo:
    """What a cache is, or with `finished=False` what one that is being written will be.

    Raises:
        NotFound: there is no such cache.
        CorruptFile: the index is torn, or a bit of it flipped, or the cache was never finished.
    """
    fix = "Delete the cache and write it again."
    if not (folder / _INDEX).is_file():
        raise NotFound(f"There is no cache of activations {folder.name}.", fix="Write it with write_cache.")
    content = read_json(folder / _INDEX)
    said = content.pop("sha256", None)
    try:
        info = CacheInfo.model_validate(content)
    except ValidationError as error:
        raise CorruptFile(f"{_INDEX} of the cache {folder.name} is not an index: {error}.", fix=fix) from error
    if said != _index_hash(info):
        raise CorruptFile(
            f"{_INDEX} of the cache {folder.name} is damaged: its hash is not the one that was recorded.", fix=fix
        )
    if finished and sum(info.shard_contexts) != info.n_contexts:
        raise CorruptFile(f"The cache {folder.name} was never finished.", fix="Finish it with write_cache.")
    return info


def write_index(folder: Path, info: CacheInfo) -> None:
    """Put it into the folder, in the place of one that is there."""
    content: dict[str, Any] = {**info.model_dump(mode="json"), "sha256": _index_hash(info)}
    unfinished = folder / f"{_INDEX}.part"
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    sync(unfinished)
    unfinished.replace(folder / _INDEX)
    sync(folder)


class Shard:
    """One file of a cache, memory-mapped.

    Args:
        path: the file.
        info: of the cache that it is to be part of.
        n_contexts: how many contexts it is to have; None for any number.

    Raises:
        CorruptFile: it is missing, torn, or has other tensors.
    """

    def __init__(self, path: Path, info: CacheInfo, n_contexts: int | None = None) -> None:
        self._path = path
        try:
            found = read_header(path).tensors
            shape = found[_CHECKSUMS].shape if _CHECKSUMS in found else ()
            self.n_contexts = n_contexts if n_contexts is not None else shape[-1] if shape else 0
            if found != self._expected(info):
                raise self._damaged(f"It does not have the contexts at {', '.join(info.widths)} in {info.dtype}.")
            self._file = safe_open(path, framework="pt", device="cpu")
            self._slices = {name: self._file.get_slice(name) for name in info.widths}
            self._checksums = dict(zip(sorted(info.widths), self._file.get_tensor(_CHECKSUMS).tolist(), strict=True))
        except (NotFound, SafetensorError, OSError) as error:
            raise self._damaged(str(error)) from error

    def context(self, name: str, at: int) -> Tensor:
        """(context_size, width), a view of the file.

        Raises:
            CorruptFile: it is not what was written.
        """
        acts = self._slices[name][at]
        if _crc(acts) != self._checksums[name][at]:
            raise self._damaged(f"Context {at} of it at {name} is not what was written: its checksum differs.")
        return acts

    def _expected(self, info: CacheInfo) -> dict[str, TensorInfo]:
        shape = (self.n_contexts, info.context_size)
        acts = {name: TensorInfo(_SAFETENSORS[info.dtype], (*shape, width)) for name, width in info.widths.items()}
        return {**acts, _CHECKSUMS: TensorInfo("I64", (len(info.widths), self.n_contexts))}

    def _damaged(self, why: str) -> CorruptFile:
        return CorruptFile(
            f"{self._path.name} of the cache {self._path.parent.name} is damaged.",
            why=why,
            fix="Delete the cache and write it again.",
        )


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A shard of contexts, (n, context_size, width) for each hook, on the CPU.

    Raises:
        DiskFull: there is no room.
    """
    checksums = torch.tensor([[_crc(acts) for acts in tensors[name]] for name in sorted(tensors)])
    unfinished = path.with_suffix(".part")
    with disk_full_is_said(path.parent):
        write_tensors(unfinished, {**tensors, _CHECKSUMS: checksums})
        sync(unfinished)
        unfinished.rename(path)
        sync(path.parent)


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05d}.safetensors"


@contextmanager
def disk_full_is_said(folder: Path) -> Iterator[None]:
    """While inside, a disk that fills up raises DiskFull, with the size that the folder reached."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        written = sum(path.stat().st_size for path in folder.glob("shard-*"))
        raise DiskFull.of("Caching activations", written, free_bytes(folder)) from error


def free_bytes(folder: Path) -> int:
    """Of the disk on which a folder lies, or will."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def sync(path: Path) -> None:
    """Have the disk keep a file, or a folder's names, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _index_hash(info: CacheInfo) -> str:
    return hashlib.sha256(json.dumps(info.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _crc(acts: Tensor) -> int:
    return zlib.crc32(acts.contiguous().view(torch.uint8).numpy().data)
