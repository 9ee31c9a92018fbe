"""Activations on disk: a model runs over its text once, and any number of trainings read what it computed.

A cache is a folder that is there whole or not at all. While it is written it is called `NAME.part` and has a shard only
when that is complete, so that a writer who was killed goes on after the last one. Reading is memory-mapped, and every
context that is read is checked. What the files look like is in cache_files.py. It does not know who trains, nor where
caches are kept.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from bisect import bisect_right
from collections.abc import Generator, Mapping, Sequence
from itertools import accumulate, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput, Conflict, DiskFull, MistudioError
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens
from mistudio_engine.saes.tensor_file import is_finite
from mistudio_engine.training.activations import LiveActivations, limited
from mistudio_engine.training.cache_files import (
    CacheDtype,
    CacheInfo,
    Shard,
    disk_full_is_said,
    free_bytes,
    read_index,
    shard_path,
    sync,
    write_index,
    write_shard,
)

__all__ = [
    "CacheDtype",
    "CacheInfo",
    "CachedActivations",
    "cache_bytes",
    "model_fingerprint",
    "read_index",
    "write_cache",
]

_READ_BYTES = 1 << 25
_HASHED_CONTEXTS = 4096
_SAMPLED = 1024
"""Values of each weight matrix that a fingerprint looks at: fine-tuning changes them all."""


class CachedActivations:
    """A source of activations (see activations.Source) that reads them from a cache.

    Args:
        folder: what `write_cache` made.
        tokens: those that it was made of; they say where special tokens and padding stand.
        hook_names: which of its hooks.
        n_contexts: use the first so many contexts; None for all that the cache has.
        model_sha256: what the cache has to have been made with, as it was given to `write_cache` or as
            `model_fingerprint` has it; None for whatever model it was.
        device: where the activations come out.

    Raises:
        NotFound: there is no such cache.
        CorruptFile: a file of it is missing or torn; on reading, a context that is not what was written.
        BadInput: it was made of another model, tokenizer or tokens, or lacks a hook or contexts; says what differs.
    """

    def __init__(
        self,
        folder: Path,
        tokens: PackedTokens,
        hook_names: Sequence[str],
        n_contexts: int | None = None,
        *,
        model_sha256: str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.info, self.tokens, self.device = read_index(folder), tokens, torch.device(device)
        info = self.info
        found = _differences(info, tokens, hook_names, n_contexts, model_sha256=model_sha256)
        if found:
            raise BadInput(
                f"The activations in {folder.name} cannot be used here.",
                why=" ".join(found),
                fix="Write a cache of this model and these tokens (write_cache), or use what this one was made of.",
            )
        self.n_contexts = info.n_contexts if n_contexts is None else n_contexts
        self.model_name = info.model_name
        self.widths = {name: info.widths[name] for name in hook_names}
        n_bytes = info.context_size * sum(self.widths.values()) * _dtype(info.dtype).itemsize
        self.contexts_at_once = max(1, _READ_BYTES // n_bytes)
        self._shards = [Shard(shard_path(folder, i), info, n) for i, n in enumerate(info.shard_contexts)]
        self._starts = [0, *accumulate(info.shard_contexts)]

    def contexts(self, rows: Tensor) -> dict[str, Tensor]:
        """See activations.Source; in the cache's dtype.

        Raises:
            CorruptFile: a context is not what was written.
        """
        shape, dtype = (len(rows), self.info.context_size), _dtype(self.info.dtype)
        acts = {name: torch.empty(*shape, width, dtype=dtype) for name, width in self.widths.items()}
        for i, row in enumerate(rows.tolist()):
            shard = bisect_right(self._starts, row) - 1
            for name, into in acts.items():
                into[i] = self._shards[shard].context(name, row - self._starts[shard])
        return {name: tensor.to(self.device) for name, tensor in acts.items()}


def write_cache(
    lm: LanguageModel,
    tokens: PackedTokens,
    hook_names: Sequence[str],
    folder: Path,
    *,
    n_contexts: int | None = None,
    dtype: CacheDtype = "float32",
    shard_bytes: int = 1 << 27,
    model_sha256: str | None = None,
) -> Generator[Progress, Signal | None, CacheInfo]:
    """Run a model over contexts and keep its activations; goes on where an earlier call with the same arguments was
    closed or killed, and has nothing to do where one finished.

    Closing the generator leaves `NAME.part` with the shards that are complete; delete it where nobody will go on. One
    of other activations is replaced. Memory: one shard.

    Args:
        lm: the language model; each forward pass stops after the last hook.
        tokens: contexts to run it on.
        hook_names: where to read.
        folder: the cache to make.
        n_contexts: the first so many contexts; None for all.
        dtype: of the numbers on disk. bfloat16 halves them at a relative error of 2⁻⁸ each.
        shard_bytes: about how much is written at once, and lost at a kill.
        model_sha256: what identifies the weights *and their precision*; None for `model_fingerprint`.

    Yields:
        Progress after each forward pass, with `checkpointed` where a shard was completed. CHECKPOINT completes one at
        once; STOP keeps the contexts so far, a cache of so many.

    Raises:
        UnknownHook: the model has no such hook.
        BadInput: a number does not fit into `dtype`, or there are not so many contexts.
        Conflict: a cache of something else has this name; says what differs.
        DiskFull: there is no room; said before anything is computed, and the shards so far stay.
    """
    folder = Path(folder)
    source = LiveActivations(lm, tokens, hook_names, n_contexts)
    model_sha256 = model_sha256 or model_fingerprint(lm)
    if folder.exists():
        info = read_index(folder)
        found = _differences(info, tokens, hook_names, source.n_contexts, model_sha256=model_sha256, dtype=dtype)
        if found:
            raise Conflict(
                f"{folder.name} exists already and holds other activations.",
                why=" ".join(found),
                fix="Choose another name, or delete it first.",
            )
        yield Progress(fraction=1.0, stage="caching activations", unit="tokens")
        return info
    part = folder.with_name(folder.name + ".part")
    _check_room(part, cache_bytes(tokens, source.widths, source.n_contexts, dtype))
    wanted = CacheInfo(
        model_name=lm.name,
        model_sha256=model_sha256,
        tokenizer_hash=tokens.info.tokenizer_hash,
        tokens_sha256=_tokens_hash(tokens, source.n_contexts),
        context_size=tokens.info.context_size,
        n_contexts=source.n_contexts,
        widths=source.widths,
        dtype=dtype,
    )
    shard_contexts, signal = yield from _whole_shards(part, wanted)
    writer = _Writer(part, source, wanted, shard_contexts, shard_bytes)
    while writer.n_contexts < source.n_contexts and signal is not Signal.STOP:
        completed = writer.forward()
        signal = yield writer.progress(checkpointed=completed)
        while signal is Signal.CHECKPOINT:
            writer.complete_shard()
            signal = yield writer.progress(checkpointed=True)
    writer.complete_shard()
    info = wanted.model_copy(update={"n_contexts": writer.n_contexts, "shard_contexts": tuple(writer.shard_contexts)})
    if info.n_contexts < wanted.n_contexts:
        info = info.model_copy(update={"tokens_sha256": _tokens_hash(tokens, info.n_contexts)})
    with disk_full_is_said(part):
        write_index(part, info)
        part.rename(folder)
        sync(folder.parent)
    yield writer.progress(checkpointed=True)
    return info


def cache_bytes(tokens: PackedTokens, widths: Mapping[str, int], n_contexts: int | None, dtype: CacheDtype) -> int:
    """Bytes that a cache takes on disk, to within the files' headers; None for all contexts.

    Raises:
        BadInput: there are not so many contexts.
    """
    n_numbers = tokens.info.context_size * sum(widths.values())
    return limited(tokens, n_contexts) * (n_numbers * _dtype(dtype).itemsize + 8 * len(widths))


def model_fingerprint(lm: LanguageModel) -> str:
    """sha256 of a model's parameters: their names, types, shapes, and 1024 values spread over each. It tells another
    model, another fine-tuning and another precision, in milliseconds and whatever file the weights came from."""
    hashed = hashlib.sha256()
    for name, parameter in lm.hf.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // _SAMPLED)][:_SAMPLED].cpu().contiguous()
        hashed.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        hashed.update(sample.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


class _Writer:
    """Fills shards with forward passes and puts the complete ones into the folder."""

    def __init__(
        self, part: Path, source: LiveActivations, wanted: CacheInfo, shard_contexts: list[int], shard_bytes: int
    ) -> None:
        self.part, self.source, self.wanted, self.shard_contexts = part, source, wanted, shard_contexts
        dtype = _dtype(wanted.dtype)
        context_bytes = wanted.context_size * sum(wanted.widths.values()) * dtype.itemsize
        most = max(1, shard_bytes // context_bytes)
        # Forward passes begin at the same contexts whether or not the writer was killed in between, and so round alike.
        self._at_once = min(source.contexts_at_once, most)
        self._most = min(most // self._at_once * self._at_once, wanted.n_contexts)
        self._acts = {
            name: torch.empty(self._most, wanted.context_size, width, dtype=dtype)
            for name, width in wanted.widths.items()
        }
        self._n_held = 0
        self._n_before, self._started = sum(shard_contexts), time.monotonic()

    @property
    def n_contexts(self) -> int:
        """Contexts so far."""
        return sum(self.shard_contexts) + self._n_held

    def forward(self) -> bool:
        """Compute some contexts more; whether that completed a shard."""
        start = self.n_contexts
        n = min(self._at_once, self._most - self._n_held, self.wanted.n_contexts - start)
        acts = self.source.contexts(torch.arange(start, start + n))
        for name, held in self._acts.items():
            into = held[self._n_held : self._n_held + n]
            into.copy_(acts[name])
            if not is_finite(into):
                raise BadInput(
                    f"Activations at {name} are not finite in {self.wanted.dtype}.",
                    why=f"They lie in contexts {start} to {start + n - 1}.",
                    fix='Use dtype="bfloat16" or "float32"; if it is not that, load the model in fp32 or bf16.',
                )
        self._n_held += n
        if self._n_held < self._most:
            return False
        self.complete_shard()
        return True

    def complete_shard(self) -> None:
        """Write what is held as a shard, if anything is."""
        if not self._n_held:
            return
        tensors = {name: held[: self._n_held] for name, held in self._acts.items()}
        write_shard(shard_path(self.part, len(self.shard_contexts)), tensors)
        self.shard_contexts.append(self._n_held)
        self._n_held = 0

    def progress(self, *, checkpointed: bool) -> Progress:
        """A step's report."""
        context_size, n_done = self.wanted.context_size, self.n_contexts
        rate = (n_done - self._n_before) * context_size / max(time.monotonic() - self._started, 1e-9)
        return Progress(
            fraction=n_done / self.wanted.n_contexts,
            stage="caching activations",
            rate=rate or None,
            unit="tokens",
            eta_seconds=(self.wanted.n_contexts - n_done) * context_size / rate if rate else None,
            checkpointed=checkpointed,
        )


def _whole_shards(part: Path, wanted: CacheInfo) -> Generator[Progress, Signal | None, tuple[list[int], Signal | None]]:
    """Contexts in each shard that an earlier writer of the same cache completed, and STOP if that was said meanwhile;
    whatever else is there is removed."""
    try:
        same = read_index(part, finished=False).model_copy(update={"shard_contexts": ()}) == wanted
    except MistudioError:
        same = False  # nothing is there, or nothing of use
    if not same:
        shutil.rmtree(part, ignore_errors=True)
        with disk_full_is_said(part):
            part.mkdir(parents=True)
            write_index(part, wanted)
    n_contexts: list[int] = []
    signal: Signal | None = None
    while sum(n_contexts) < wanted.n_contexts:
        try:
            shard = Shard(shard_path(part, len(n_contexts)), wanted)
            for name, at in product(wanted.widths, range(shard.n_contexts)):
                shard.context(name, at)
        except MistudioError:
            break  # this one and those after it are written again
        n_contexts.append(shard.n_contexts)
        fraction = sum(n_contexts) / wanted.n_contexts
        said = yield Progress(fraction=fraction, stage="checking what is there", checkpointed=True)
        signal = Signal.STOP if Signal.STOP in (signal, said) else None
    for path in part.glob("shard-*"):
        if path not in {shard_path(part, i) for i in range(len(n_contexts))}:
            path.unlink()
    return n_contexts, signal


def _differences(
    info: CacheInfo,
    tokens: PackedTokens,
    hook_names: Sequence[str],
    n_contexts: int | None,
    *,
    model_sha256: str | None = None,
    dtype: CacheDtype | None = None,
) -> list[str]:
    """A sentence for each thing that a cache is not what it should be."""
    found = []
    if model_sha256 not in (None, info.model_sha256):
        found.append(f"They are of another model or precision: of {info.model_name} ({info.model_sha256[:12]}…).")
    if tokens.info.tokenizer_hash != info.tokenizer_hash:
        found.append("The tokenizer differs.")
    if tokens.info.context_size != info.context_size:
        found.append(f"Their contexts have {info.context_size} tokens, these {tokens.info.context_size}.")
    elif len(tokens) < info.n_contexts:
        found.append(f"They were made of {info.n_contexts} contexts, and these are {len(tokens)}.")
    elif _tokens_hash(tokens, info.n_contexts) != info.tokens_sha256:
        found.append("They were made of other tokens.")
    lacking = [name for name in dict.fromkeys(hook_names) if name not in info.widths]
    if lacking:
        found.append(f"They were taken at {', '.join(info.widths)}, not at {', '.join(lacking)}.")
    if n_contexts is not None and not 1 <= n_contexts <= info.n_contexts:
        found.append(f"They have {info.n_contexts} contexts, and {n_contexts} are wanted.")
    if dtype not in (None, info.dtype):
        found.append(f"They are {info.dtype}, not {dtype}.")
    return found


def _tokens_hash(tokens: PackedTokens, n_contexts: int) -> str:
    hashed = hashlib.sha256()
    for start in range(0, n_contexts, _HASHED_CONTEXTS):
        rows = slice(start, min(start + _HASHED_CONTEXTS, n_contexts))
        for tensor in (tokens.ids[rows], tokens.n_real[rows]):
            hashed.update(np.ascontiguousarray(tensor.numpy(), dtype="<i4").data)
    return hashed.hexdigest()


def _check_room(part: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in part.glob("shard-*.safetensors"))
    if needed - there > free_bytes(part):
        raise DiskFull.of("Caching activations", needed - there, free_bytes(part))


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
