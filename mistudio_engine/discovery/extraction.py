"""Extraction: one pass over the tokens computes what there is to know of **all** features of an SAE at once.

Activations are made sparse at once and go through accumulators block by block (statistics, histograms, top tokens,
examples), so memory grows with the features and not with the text. Contexts are visited in a seeded random order: what
comes first is then a fair sample, and an extraction that is stopped early is one of fewer tokens, not of the first
book. Nothing is kept between runs: an interrupted extraction starts again and gives the same result.

It knows no labels and no text; extraction_store.py reads what it writes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mistudio_engine.api.errors import BadInput, Conflict, DiskFull, EmptyData
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.discovery.activation_block import Block, rank_in_run, sparse_acts
from mistudio_engine.discovery.examples import Chosen, ExamplePool, joined
from mistudio_engine.discovery.extraction_store import (
    CONTEXTS_FILE,
    DENSE_ABOVE,
    EXAMPLES_FILE,
    FEATURES_FILE,
    INFO_FILE,
    ExtractionInfo,
    ExtractionStore,
    file_sha256,
    load_extraction,
)
from mistudio_engine.discovery.histogram import N_LOG_BINS, LogHistograms
from mistudio_engine.discovery.top_tokens import TokenTable, TopTokens, best_tokens
from mistudio_engine.models.hooks import activations, check_width

if TYPE_CHECKING:
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.models.tokens import PackedTokens
    from mistudio_engine.saes.base import SAE

__all__ = ["extract", "load_extraction", "working_bytes"]

_STEP_FLOPS_CPU, _STEP_FLOPS_GPU = 5e9, 2e12
"""Arithmetic in one step: about a tenth of a second on two cores, or on a data-centre GPU."""

_BLOCK_TOKENS, _BLOCK_ENTRIES = 8192, 1 << 18
"""A block is taken in when it has so many tokens or activations: another tenth of a second."""

_FEATURES_PER_PART = 128
"""Features in a row group: one is read when one feature is looked at."""

_PASS_SHARE = 0.9
"""Share of the work that is the pass; the rest is writing."""


def extract(
    lm: LanguageModel,
    sae: SAE,
    tokens: PackedTokens,
    hook_name: str,
    folder: Path,
    *,
    n_tokens: int | None = None,
    n_examples: int = 20,
    n_quantiles: int = 5,
    n_per_quantile: int = 5,
    n_random: int = 5,
    n_zero: int = 5,
    n_top_tokens: int = 50,
    features: Sequence[int] | None = None,
    min_activation: float = 0.0,
    exclude_special: bool = True,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
) -> Generator[Progress, Signal | None, ExtractionStore]:
    """Extract all features; a generator of small steps that returns the opened extraction.

    Send it `Signal.STOP` to finish early with the tokens seen so far; close it to cancel, which leaves nothing behind.
    There are no checkpoints: a run that was interrupted starts again.

    Args:
        lm: the language model.
        sae: reads the activations at `hook_name`.
        tokens: packed contexts.
        hook_name: where the SAE reads.
        folder: made here, whole or not at all.
        n_tokens: use at most so many real tokens, in whole contexts chosen at random; None uses all.
        n_examples: contexts with the largest activations kept for each feature.
        n_quantiles: equal parts of [0, maximum] that the quantile examples are drawn from …
        n_per_quantile: … so many from each.
        n_random: contexts drawn from those in which the feature fires.
        n_zero: contexts drawn from those in which it never does.
        n_top_tokens: tokens kept by count, by mean and by maximum.
        features: only these; None takes all.
        min_activation: smaller activations count as none.
        exclude_special: leave BOS, EOS and other special tokens out of everything (padding always is).
        seed: for the order of the contexts, and with it the quantile, random and zero examples. Statistics and top
            examples of a run over all tokens do not depend on it.
        provenance: hashes and versions to record beside ours.

    Raises:
        Conflict: `folder` exists.
        BadInput: a number is out of range, a feature index is, or an activation is not finite.
        UnknownHook, WrongShape: the hook is not the model's, or not as wide as the SAE.
        EmptyData: no token is left to look at.
        DiskFull: the disk is full; nothing is left behind.
    """
    folder = Path(folder)
    _check_numbers(n_examples=n_examples, n_quantiles=n_quantiles, n_top_tokens=n_top_tokens, minimum=1)
    _check_numbers(n_per_quantile=n_per_quantile, n_random=n_random, n_zero=n_zero, minimum=0)
    if min_activation < 0:
        raise BadInput(f"min_activation {min_activation} is negative.", why="Feature activations are at least 0.")
    check_width(lm, hook_name, sae.cfg.d_in)
    if folder.exists():
        raise Conflict(f"{folder.name!r} exists already.", fix="Use the extraction that is there, or delete it first.")
    selection = _selection(features, sae.cfg.d_sae)
    order = _visiting_order(tokens, n_tokens, seed)
    batch_contexts = _batch_contexts(lm, sae, tokens.info.context_size)
    totals = _Totals(
        len(selection),
        lm.d_vocab,
        ExamplePool(len(selection), n_top=n_examples, n_stratified=n_per_quantile, n_random=n_random, n_zero=n_zero),
    )

    clock = _Clock()
    stopped_early = False
    n_planned = int(tokens.n_real[torch.from_numpy(order)].sum())
    n_read = 0
    for block, n_real, n_counted in _blocks(
        lm, sae, tokens, hook_name, order, selection, batch_contexts, min_activation, exclude_special
    ):
        n_read += n_real
        totals.n_tokens += n_counted
        if block is not None:
            totals.add(block)
        fraction = _PASS_SHARE * n_read / n_planned
        signal = yield clock.progress("reading tokens", fraction, n_read)
        if signal is Signal.STOP and block is not None:
            stopped_early = n_read < n_planned
            break
    if not totals.n_tokens:
        raise EmptyData(
            "There is no token to look at.", why="All of them are special tokens or padding.", fix="Use other text."
        )

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        writer = _Writer(part, tokens, selection, totals, n_quantiles, n_per_quantile, n_top_tokens)
        for share in writer.write():
            yield clock.progress("writing features", _PASS_SHARE + (1 - _PASS_SHARE) * share, n_read)
        info = ExtractionInfo(
            created_at=time.time(),
            model=lm.name,
            hook_name=hook_name,
            d_sae=sae.cfg.d_sae,
            n_features=len(selection),
            n_alive=int((totals.n_active > 0).sum()),
            n_dense=int((totals.n_active > DENSE_ABOVE * totals.n_tokens).sum()),
            n_tokens=totals.n_tokens,
            n_contexts=totals.n_contexts,
            context_size=tokens.info.context_size,
            stopped_early=stopped_early,
            settings={
                "n_tokens": n_tokens,
                "n_examples": n_examples,
                "n_quantiles": n_quantiles,
                "n_per_quantile": n_per_quantile,
                "n_random": n_random,
                "n_zero": n_zero,
                "n_top_tokens": n_top_tokens,
                "features": None if features is None else selection.tolist(),
                "min_activation": min_activation,
                "exclude_special": exclude_special,
                "seed": seed,
                "batch_contexts": batch_contexts,
            },
            provenance=_provenance(sae, tokens) | (provenance or {}),
            files={name: file_sha256(part / name) for name in (FEATURES_FILE, EXAMPLES_FILE, CONTEXTS_FILE)},
        )
        (part / INFO_FILE).write_text(info.model_dump_json(indent=2), encoding="utf-8")
        _sync(*part.iterdir(), part)
        part.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull.of(
                "Writing the extraction", _disk_bytes(part), shutil.disk_usage(part.parent).free
            ) from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    yield clock.progress("writing features", 1.0, n_read)
    return load_extraction(folder)


def working_bytes(d_sae: int, *, n_examples: int = 20, n_per_quantile: int = 5, n_random: int = 5) -> int:
    """Memory that `extract` needs beside the model and the SAE, at most, whatever the number of tokens.

    Examples are counted with ten activations in each of their contexts.
    """
    n_kept = n_examples + 16 * n_per_quantile + n_random
    a_feature = 4 * N_LOG_BINS + n_kept * (8 + 24 + 10 * 8)
    token_table = 2 * 40 * max(4_000_000, 256 * d_sae)
    return d_sae * a_feature + token_table + 512 * 2**20  # and a dense block with its sparse copies


class _Totals:
    """Everything that is accumulated over the pass, for all features."""

    def __init__(self, n_features: int, d_vocab: int, examples: ExamplePool) -> None:
        self.n_tokens = self.n_contexts = 0
        self.n_active = np.zeros(n_features, dtype=np.int64)
        self.sum = np.zeros(n_features, dtype=np.float64)
        self.max = np.zeros(n_features, dtype=np.float32)
        self.histograms = LogHistograms(n_features)
        self.top_tokens = TopTokens(n_features, d_vocab)
        self.examples = examples

    def add(self, block: Block) -> None:
        n_features = len(self.n_active)
        self.n_contexts += len(block.contexts)
        self.n_active += np.bincount(block.feature, minlength=n_features)
        self.sum += np.bincount(block.feature, weights=block.value, minlength=n_features)
        np.maximum.at(self.max, block.feature, block.value)
        self.histograms.add(block.feature, block.value)
        self.top_tokens.add(block)
        self.examples.add(block)


def _blocks(
    lm: LanguageModel,
    sae: SAE,
    tokens: PackedTokens,
    hook_name: str,
    order: NDArray[np.int64],
    selection: NDArray[np.int64],
    batch_contexts: int,
    min_activation: float,
    exclude_special: bool,
) -> Iterator[tuple[Block | None, int, int]]:
    """After each step: a block when one is full (else None), and how many tokens were read and how many counted."""
    size = tokens.info.context_size
    sae_device = next(sae.parameters()).device
    row_of = np.full(sae.cfg.d_sae, -1, dtype=np.int64)
    row_of[selection] = np.arange(len(selection))
    contexts: list[NDArray] = []
    parts: list[tuple[NDArray, ...]] = []
    n_waiting = n_entries = 0
    for at in range(0, len(order), batch_contexts):
        rows = torch.from_numpy(order[at : at + batch_contexts])
        ids, mask = tokens.ids[rows], tokens.mask(rows, special=not exclude_special)
        # Causal attention never looks at the padding behind the text: no attention mask is needed.
        acts = activations(lm, ids, [hook_name])[hook_name]
        x = acts[mask.to(acts.device)].to(sae_device)  # (n_counted, d_in)
        with torch.no_grad():
            row, feature, value = sparse_acts(sae, x, min_activation)
        place = torch.nonzero(mask.reshape(-1)).squeeze(1).numpy()[row]
        feature = row_of[feature]
        kept = slice(None) if len(selection) == len(row_of) else feature >= 0
        parts.append((feature[kept], place[kept] + n_waiting * size, value[kept]))
        contexts.append(rows.numpy())
        n_waiting += len(rows)
        n_entries += len(parts[-1][0])
        block = None
        if n_waiting * size >= _BLOCK_TOKENS or n_entries >= _BLOCK_ENTRIES or at + batch_contexts >= len(order):
            which = np.concatenate(contexts)
            feature, place, value = (np.concatenate(column) for column in zip(*parts, strict=True))
            block = Block.of(which, tokens.ids[torch.from_numpy(which)].numpy(), feature, place, value)
            contexts, parts, n_waiting, n_entries = [], [], 0, 0
        yield block, int(tokens.n_real[rows].sum()), int(mask.sum())


class _Writer:
    """Writes the files of an extraction, some features at a time."""

    def __init__(
        self,
        folder: Path,
        tokens: PackedTokens,
        selection: NDArray[np.int64],
        totals: _Totals,
        n_quantiles: int,
        n_per_quantile: int,
        n_top_tokens: int,
    ) -> None:
        self.folder, self.tokens, self.selection, self.totals = folder, tokens, selection, totals
        self.n_quantiles, self.n_per_quantile, self.n_top_tokens = n_quantiles, n_per_quantile, n_top_tokens
        self.n_real = tokens.n_real.numpy()

    def write(self) -> Iterator[float]:
        """Yields the share that is done."""
        table = self.totals.top_tokens.table()
        yield 0.0
        n = len(self.selection)
        used = np.zeros(len(self.tokens), dtype=bool)
        to_features = to_examples = None
        try:
            for start in range(0, n, _FEATURES_PER_PART):
                features = slice(start, min(start + _FEATURES_PER_PART, n))
                examples, contexts, n_examples = self._examples(features)
                used[contexts] = True
                rows = self._features(features, table, n_examples)
                if to_features is None or to_examples is None:
                    to_features = pq.ParquetWriter(self.folder / FEATURES_FILE, rows.schema, compression="zstd")
                    to_examples = pq.ParquetWriter(self.folder / EXAMPLES_FILE, examples.schema, compression="zstd")
                to_features.write_table(rows)
                to_examples.write_table(examples)
                yield features.stop / n
        finally:
            for writer in (to_features, to_examples):
                if writer is not None:
                    writer.close()
        self._contexts(np.flatnonzero(used))

    def _features(self, features: slice, table: TokenTable, n_examples: NDArray[np.int64]) -> pa.Table:
        totals = self.totals
        n_active, total = totals.n_active[features], totals.sum[features]
        counts = totals.histograms.counts[features]
        filled = counts > 0
        first = filled.argmax(axis=1)
        length = np.where(filled.any(axis=1), N_LOG_BINS - filled[:, ::-1].argmax(axis=1) - first, 0)
        bins = np.arange(N_LOG_BINS)
        inside = (bins >= first[:, None]) & (bins < (first + length)[:, None])
        begin, end = np.searchsorted(table.feature, (features.start, features.stop))
        best = best_tokens(table.rows(slice(begin, end)), self.n_top_tokens)
        of_feature = np.searchsorted(best.feature, np.arange(features.start, features.stop + 1))
        return pa.table(
            {
                "feature": self.selection[features].astype(np.int32),
                "n_active": n_active,
                "frequency": n_active / totals.n_tokens,
                "max": totals.max[features],
                "mean": total / np.maximum(n_active, 1),
                "sum": total,
                "undercount": totals.top_tokens.undercount[features],
                "n_examples": n_examples.astype(np.int32),
                "histogram_first": first.astype(np.int16),
                "histogram_counts": _lists(np.append(0, np.cumsum(length)), counts[inside]),
                "token_ids": _lists(of_feature, best.token_id.astype(np.int32)),
                "token_counts": _lists(of_feature, best.count),
                "token_means": _lists(of_feature, best.mean),
                "token_maxima": _lists(of_feature, best.max),
            }
        )

    def _examples(self, features: slice) -> tuple[pa.Table, NDArray[np.int64], NDArray[np.int64]]:
        """The example rows of these features, the contexts they stand in, and how many each feature has."""
        pool = self.totals.examples
        quantile, part = self._quantiles(features)
        zero_feature, zero_context = pool.zero(features)
        n_zero = len(zero_feature)
        middle = np.maximum(self.n_real[zero_context] - 1, 0) // 2
        none = np.full(n_zero, -1)
        zero = Chosen(zero_feature, zero_context, middle, np.zeros(n_zero, dtype=np.float32), none)
        groups = (pool.top(features), quantile, pool.random(features), zero)
        chosen = joined(groups)
        code = np.repeat(np.arange(4), [len(group.feature) for group in groups])
        which = np.full(len(code), -1)
        which[code == 1] = part
        order = np.lexsort((np.arange(len(code)), code, chosen.feature))
        chosen, code, which = chosen.take(order), code[order], which[order]

        offsets, positions, values = pool.activations(chosen.record)
        table = pa.table(
            {
                "feature": self.selection[chosen.feature].astype(np.int32),
                "group": pa.DictionaryArray.from_arrays(
                    pa.array(code.astype(np.int8)), pa.array(["top", "quantile", "random", "zero"])
                ),
                "quantile": pa.array(which.astype(np.int8), mask=which < 0),
                "context": chosen.context.astype(np.int32),
                "position": chosen.position.astype(np.int32),
                "value": chosen.value,
                "active_positions": _lists(offsets, positions),
                "active_values": _lists(offsets, values),
            }
        )
        n_examples = np.bincount(chosen.feature - features.start, minlength=features.stop - features.start)
        return table, chosen.context, n_examples

    def _quantiles(self, features: slice) -> tuple[Chosen, NDArray[np.int64]]:
        """Quantile examples from the highest part down, and the part of each."""
        chosen = self.totals.examples.stratified(features)
        share = chosen.value.astype(np.float64) / self.totals.max[chosen.feature]
        part = np.minimum((share * self.n_quantiles).astype(np.int64), self.n_quantiles - 1)
        order = np.lexsort((chosen.record, -part, chosen.feature))
        chosen, part = chosen.take(order), part[order]
        first = rank_in_run(chosen.feature * self.n_quantiles + part) < self.n_per_quantile
        return chosen.take(first), part[first]

    def _contexts(self, contexts: NDArray[np.int64]) -> None:
        ids = self.tokens.ids[torch.from_numpy(contexts)].numpy()
        batch = pa.record_batch(
            {
                "context": contexts.astype(np.int32),
                "n_real": self.n_real[contexts],
                "token_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), ids.shape[1]),
            }
        )
        with pa.ipc.new_file(str(self.folder / CONTEXTS_FILE), batch.schema) as file:
            file.write_batch(batch)


class _Clock:
    """Rate and time left, from the wall clock."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def progress(self, stage: str, fraction: float, n_tokens: int) -> Progress:
        seconds = max(time.monotonic() - self._began, 1e-9)
        eta = seconds * (1 - fraction) / fraction if fraction else None
        return Progress(fraction=fraction, stage=stage, rate=n_tokens / seconds, unit="tokens", eta_seconds=eta)


def _lists(offsets: NDArray, values: NDArray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _check_numbers(*, minimum: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < minimum:
            raise BadInput(f"{name} is {number}.", fix=f"Use at least {minimum}.")


def _selection(features: Sequence[int] | None, d_sae: int) -> NDArray[np.int64]:
    """The features to look at, sorted."""
    if features is None:
        return np.arange(d_sae)
    selection = np.unique(np.asarray(features, dtype=np.int64))
    if not len(selection) or selection[0] < 0 or selection[-1] >= d_sae:
        wrong = "none" if not len(selection) else str(selection[0] if selection[0] < 0 else selection[-1])
        raise BadInput(
            f"The features to extract cannot be used: {wrong}.",
            why=f"The SAE has {d_sae} features, 0 to {d_sae - 1}.",
            fix="Give at least one index in that range, or leave features out to take all.",
        )
    return selection


def _visiting_order(tokens: PackedTokens, n_tokens: int | None, seed: int) -> NDArray[np.int64]:
    """Contexts in a random order, as many as n_tokens allows."""
    order = np.random.default_rng(seed).permutation(len(tokens))
    if n_tokens is None:
        return order
    n_contexts = int(np.searchsorted(np.cumsum(tokens.n_real.numpy()[order], dtype=np.int64), n_tokens, side="right"))
    if not n_contexts:
        raise BadInput(
            f"n_tokens {n_tokens} is less than one context.",
            fix=f"Use at least {tokens.info.context_size}, or leave it out.",
        )
    return order[:n_contexts]


def _batch_contexts(lm: LanguageModel, sae: SAE, context_size: int) -> int:
    """Contexts in one forward pass: fixed by sizes, never by the clock, so that a run repeats bit for bit."""
    n_in_layers = sum(p.numel() for block in lm.layout.blocks for p in block.parameters())
    flops = 2 * n_in_layers + (2 * sae.cfg.d_in + 64) * sae.cfg.d_sae  # a token; 64 for looking through its features
    step = _STEP_FLOPS_CPU if lm.device.type == "cpu" else _STEP_FLOPS_GPU
    return max(1, int(min(step / flops, _BLOCK_TOKENS)) // context_size)


def _provenance(sae: SAE, tokens: PackedTokens) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return {
        "sae_sha256": digest.hexdigest(),
        "tokenizer_hash": tokens.info.tokenizer_hash,
        "bos_policy": tokens.info.bos_policy,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
    }


def _sync(*paths: Path) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
