"""Documents packed into fixed contexts of token ids, written once and read memory-mapped.

Nothing is thrown away: a document that does not fit goes on in the next context, and the last context is padded, with
the number of its real tokens recorded. This file knows no dataset formats (datasets.py) and no language model: a
tokenizer is enough.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import time
from array import array
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistudio_engine.api.errors import BadInput, Conflict, CorruptFile, DiskFull, EmptyData
from mistudio_engine.models.vocabulary import special_ids, tokenizer_hash

__all__ = ["BosPolicy", "PackProgress", "PackedTokens", "TokensInfo", "load_tokens", "pack", "tokens_key"]

BosPolicy = Literal["context", "document", "both", "none"]
"""Where BOS stands: at the start of every context, of every document, of both (once where both start), or nowhere."""

STEP_SECONDS = 0.2
"""How long `pack` works between two yields; a single longer document is one step."""

BATCH_CHARACTERS = 50_000
"""Text handed to the tokenizer at once: enough for its threads, little enough to stop soon."""


class TokensInfo(BaseModel):
    """What tokens.json says of a folder of packed tokens."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, extra="forbid")

    format: Literal["mistudio-tokens-1"] = "mistudio-tokens-1"
    """The layout of the folder."""

    context_size: int
    """Tokens in a context, BOS included."""

    n_contexts: int
    """How many contexts there are."""

    n_tokens: int
    """Real tokens, BOS and separators included, padding not."""

    n_documents: int
    """Documents that have at least one token in the contexts."""

    bos_policy: BosPolicy
    """What was done; "none" also where another policy was asked of a tokenizer that has no BOS."""

    bos_token_id: int | None
    """The id that stands for BOS, None where the tokenizer has none."""

    separator_token_id: int | None
    """The id between two documents: EOS, else BOS, None where there is neither or where each document's BOS does it."""

    pad_token_id: int
    """What fills the last context; `n_real` tells it from text, not its id."""

    special_ids: tuple[int, ...]
    """Ids that stand for no text, sorted."""

    d_vocab: int
    """Ids are below this: one more than the tokenizer's largest id."""

    tokenizer_hash: str
    """sha256 of the tokenizer's rules and vocabulary."""


class PackProgress(NamedTuple):
    """One step of `pack`."""

    n_documents: int
    n_tokens: int

    fraction: float | None
    """Share of the wanted `n_tokens`; None without a limit."""


class PackedTokens:
    """Packed contexts, read from disk as they are needed.

    Attributes:
        ids: int32 (n_contexts, context_size), memory-mapped.
        n_real: int32 (n_contexts,), how many of a context's tokens are real; padding follows them.
        document_lengths: int32 (n_documents,), tokens of each document's text, BOS and separators not counted.
        info: how they were made.
    """

    def __init__(self, ids: Tensor, n_real: Tensor, document_lengths: Tensor, info: TokensInfo) -> None:
        self.ids, self.n_real, self.document_lengths, self.info = ids, n_real, document_lengths, info
        self._special = torch.tensor(info.special_ids, dtype=ids.dtype)

    def __len__(self) -> int:
        return self.ids.shape[0]

    def mask(self, rows: Tensor | list[int] | slice, *, special: bool = True) -> Tensor:
        """bool (n_rows, context_size): True where a real token stands.

        Args:
            rows: which contexts, as an index into `ids`.
            special: False leaves BOS, EOS, separators and other special tokens out too.
        """
        real = torch.arange(self.info.context_size) < self.n_real[rows].unsqueeze(-1)  # (n_rows, context_size)
        return real if special else real & ~torch.isin(self.ids[rows], self._special)


def pack(
    documents: Iterable[str],
    tokenizer: Any,
    folder: Path,
    *,
    context_size: int = 128,
    bos_policy: BosPolicy = "context",
    n_tokens: int | None = None,
    n_ctx: int | None = None,
) -> Generator[PackProgress, None, TokensInfo]:
    """Tokenises documents and writes them as packed contexts; a generator of small steps that returns the info.

    Args:
        documents: texts; those without a token are passed over.
        folder: made here, whole or not at all (`folder.part` → fsync → rename). Closing the generator leaves nothing.
        context_size: tokens in a context.
        n_tokens: stop after exactly so many real tokens.
        n_ctx: the model's longest context, to check `context_size` against.

    Raises:
        BadInput: `context_size` or `n_tokens` cannot be used.
        Conflict: `folder` exists.
        EmptyData: no document has a token.
        DiskFull: the disk is full; nothing is left behind.
    """
    _check_sizes(context_size, n_tokens, n_ctx)
    folder = Path(folder)
    if folder.exists():
        raise Conflict(f"{folder.name!r} exists already.", fix="Use the tokens that are there, or delete them first.")
    rules = _Rules(tokenizer, bos_policy)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    packer = _Packer(part / "tokens.safetensors", context_size, rules, n_tokens)
    try:
        with packer:
            step_ends = time.monotonic() + STEP_SECONDS
            for batch in _batches(documents):
                encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
                for ids in encoded["input_ids"]:
                    packer.add(ids)
                if time.monotonic() >= step_ends:
                    fraction = None if n_tokens is None else packer.n_tokens / n_tokens
                    yield PackProgress(packer.n_documents, packer.n_tokens, fraction)
                    step_ends = time.monotonic() + STEP_SECONDS
                if packer.is_full:
                    break
            if not packer.n_documents:
                raise EmptyData(
                    "There is no text to tokenise.", why="No document has a token.", fix="Give a source with text."
                )
            n_real_tokens = packer.finish()
        info = TokensInfo(
            context_size=context_size,
            n_contexts=packer.n_contexts,
            n_tokens=n_real_tokens,
            n_documents=packer.n_documents,
            bos_policy=rules.policy,
            bos_token_id=rules.bos,
            separator_token_id=rules.separator,
            pad_token_id=rules.pad,
            special_ids=tuple(sorted(special_ids(tokenizer))),
            d_vocab=1 + max(tokenizer.get_vocab().values()),
            tokenizer_hash=tokenizer_hash(tokenizer),
        )
        _write_synced(part / "tokens.json", info.model_dump_json(indent=2).encode())
        _sync_folder(part)
        part.rename(folder)
        _sync_folder(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            n_bytes = 4 * (n_tokens or packer.n_tokens)
            raise DiskFull.of("Packing tokens", n_bytes, shutil.disk_usage(folder.parent).free) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    yield PackProgress(info.n_documents, info.n_tokens, 1.0)
    return info


def load_tokens(folder: Path) -> PackedTokens:
    """Opens a folder that `pack` wrote.

    Raises:
        CorruptFile: a file is missing or torn, or the two contradict each other.
        EmptyData: there are no tokens in it.
    """
    folder = Path(folder)
    fix = "Tokenise the dataset again."
    try:
        info = TokensInfo.model_validate_json((folder / "tokens.json").read_bytes())
        with safe_open(folder / "tokens.safetensors", framework="pt") as file:
            ids, n_real, lengths = (file.get_tensor(name) for name in ("ids", "n_real", "document_lengths"))
    except FileNotFoundError as error:
        name = Path(error.filename).name if error.filename else "tokens.safetensors"
        raise CorruptFile(f"{name} is missing from {folder.name!r}.", fix=fix) from error
    except (SafetensorError, ValidationError) as error:
        raise CorruptFile(f"The tokens in {folder.name!r} are torn: {error}.", fix=fix) from error
    if ids.shape != (info.n_contexts, info.context_size) or n_real.shape != (info.n_contexts,):
        raise CorruptFile(
            f"tokens.json in {folder.name!r} promises {info.n_contexts} contexts of {info.context_size} tokens.",
            why=f"tokens.safetensors has {tuple(ids.shape)}.",
            fix=fix,
        )
    if ids.dtype != torch.int32 or n_real.dtype != torch.int32 or int(n_real.sum(dtype=torch.int64)) != info.n_tokens:
        raise CorruptFile(f"tokens.json and tokens.safetensors in {folder.name!r} count differently.", fix=fix)
    if not info.n_tokens:
        raise EmptyData(f"There are no tokens in {folder.name!r}.", fix="Tokenise a dataset that has text.")
    return PackedTokens(ids, n_real, lengths, info)


def tokens_key(source: str, tokenizer: Any, settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that change when the text, the tokenizer or a setting changes: a folder name for tokens.

    Args:
        source: what identifies the text, such as what `datasets.hashing` returns.
        settings: JSON values: context_size, bos_policy, n_tokens, text_field, …
    """
    text = json.dumps([source, tokenizer_hash(tokenizer), dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Rules:
    """Which special tokens go where, for one tokenizer and one policy."""

    def __init__(self, tokenizer: Any, policy: BosPolicy) -> None:
        self.bos: int | None = tokenizer.bos_token_id
        eos: int | None = tokenizer.eos_token_id
        self.policy: BosPolicy = policy if self.bos is not None else "none"
        self.starts_context = self.policy in ("context", "both")
        self.starts_document = self.policy in ("document", "both")
        self.separator = eos if eos is not None else self.bos
        if self.separator == self.bos and (self.starts_document or (eos is None and self.policy == "none")):
            self.separator = None  # each document's own BOS separates; or BOS was to be nowhere
        pad = tokenizer.pad_token_id
        self.pad: int = next((i for i in (pad, eos, self.bos) if i is not None), 0)


class _Packer:
    """Fills contexts and streams them into one safetensors file, whose header is filled in at the end.

    The safetensors library writes whole tensors only, and a tokenised corpus need not fit in memory. Layout: 8 bytes
    header length, a JSON header padded with spaces (as the format allows), then the tensors without holes.
    """

    HEADER_BYTES = 512

    def __init__(self, path: Path, context_size: int, rules: _Rules, limit: int | None) -> None:
        self.context_size, self.rules, self.limit = context_size, rules, limit
        self.n_contexts = 0
        self._row: list[int] = []
        self._lengths = array("i")
        self._file = path.open("wb")
        self._file.write(bytes(8 + self.HEADER_BYTES))

    def __enter__(self) -> _Packer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._file.close()

    @property
    def n_documents(self) -> int:
        return len(self._lengths)

    @property
    def n_tokens(self) -> int:
        return self.n_contexts * self.context_size + len(self._row)

    @property
    def is_full(self) -> bool:
        return self.limit is not None and self.n_tokens >= self.limit

    def add(self, ids: list[int]) -> None:
        """One document, after its separator and its BOS."""
        if not ids:
            return
        rules = self.rules
        lead = [rules.separator] if self.n_documents else []
        lead += [rules.bos] if rules.starts_document else []
        for token_id in lead:
            # A context that starts here has its BOS already, and one is enough.
            is_start = rules.starts_context and self._row in ([], [rules.bos])
            if token_id is not None and not (is_start and token_id == rules.bos):
                self._fill([token_id])
        if n_written := self._fill(ids):
            self._lengths.append(n_written)

    def finish(self) -> int:
        """Pads the last context, writes the small tensors and the header, syncs; returns the number of real tokens."""
        n_real_tokens = self.n_tokens
        n_last = len(self._row) or self.context_size
        if self._row:
            self._write_row(self._row + [self.rules.pad] * (self.context_size - len(self._row)))
        n_real = np.full(self.n_contexts, self.context_size, dtype="<i4")
        n_real[-1] = n_last
        lengths = np.asarray(self._lengths, dtype="<i4")
        self._file.write(n_real.tobytes() + lengths.tobytes())
        ids_shape = (self.n_contexts, self.context_size)
        shapes = {"ids": ids_shape, "n_real": n_real.shape, "document_lengths": lengths.shape}
        header, offset = {}, 0
        for name, shape in shapes.items():
            end = offset + 4 * math.prod(shape)
            header[name] = {"dtype": "I32", "shape": shape, "data_offsets": [offset, end]}
            offset = end
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self.HEADER_BYTES) + json.dumps(header).encode().ljust(self.HEADER_BYTES))
        self._file.flush()
        os.fsync(self._file.fileno())
        return n_real_tokens

    def _fill(self, ids: list[int]) -> int:
        """Appends ids, starting contexts as it goes; returns how many fitted under the limit."""
        done = 0
        while done < len(ids) and not self.is_full:
            if not self._row and self.rules.starts_context and self.rules.bos is not None:
                self._row = [self.rules.bos]
            room = self.context_size - len(self._row)
            if self.limit is not None:
                room = min(room, self.limit - self.n_tokens)
            self._row += ids[done : done + room]
            done = min(done + room, len(ids))
            if len(self._row) == self.context_size:
                self._write_row(self._row)
                self._row = []
        return done

    def _write_row(self, row: list[int]) -> None:
        self._file.write(np.asarray(row, dtype="<i4").tobytes())
        self.n_contexts += 1


def _check_sizes(context_size: int, n_tokens: int | None, n_ctx: int | None) -> None:
    if context_size < 2:
        raise BadInput(f"context_size {context_size} is too small.", fix="Use at least 2; 128 is usual.")
    if n_ctx is not None and context_size > n_ctx:
        raise BadInput(
            f"context_size {context_size} is more than the model's context of {n_ctx} tokens.",
            fix=f"Use at most {n_ctx}.",
        )
    if n_tokens is not None and n_tokens < 1:
        raise BadInput(f"n_tokens {n_tokens} is not a positive number.", fix="Leave it out to take all the text.")


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    n_characters = 0
    for document in documents:
        batch.append(document)
        n_characters += len(document)
        if n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
