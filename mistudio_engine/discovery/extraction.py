"""Extraction: one pass over the tokens computes what there is to know of **all** features of an SAE at once.

Activations are made sparse at once and go through accumulators block by block (statistics, histograms, top tokens,
examples), so memory grows with the features and not with the text. Contexts are visited in a seeded random order: what
comes first is then a fair sample, and an extraction that is stopped early is one of fewer tokens, not of the first
book. Nothing is kept between runs: an interrupted extraction starts again and gives the same result.

It knows no labels and no text; extraction_store.py reads what it writes.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_engine.api.errors import BadInput, Conflict, EmptyData
from mistudio_engine.api.events import Signal
from mistudio_engine.discovery.activation_block import Block, sparse_acts
from mistudio_engine.discovery.examples import ExamplePool
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
from mistudio_engine.discovery.extraction_writer import ExtractionWriter, FeatureTotals
from mistudio_engine.discovery.histogram import N_LOG_BINS
from mistudio_engine.models.hooks import activations, check_width
from mistudio_engine.saes.folders import new_folder

if TYPE_CHECKING:
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.models.tokens import PackedTokens
    from mistudio_engine.saes.base import SAE

__all__ = ["ExtractProgress", "extract", "load_extraction", "working_bytes"]

_STEP_FLOPS_CPU, _STEP_FLOPS_GPU = 5e9, 2e12
"""Arithmetic in one step: about a tenth of a second on two cores, or on a data-centre GPU."""

_BLOCK_TOKENS, _BLOCK_ENTRIES = 8192, 1 << 18
"""A block is taken in when it has so many tokens or activations: another tenth of a second."""

_PASS_SHARE = 0.9
"""Share of the work that is the pass; the rest is writing."""


class ExtractProgress(NamedTuple):
    """One step of an extraction."""

    stage: str
    """"reading tokens" or "writing features"."""

    fraction: float
    n_tokens: int
    """Tokens looked at so far."""

    tokens_per_second: float
    eta_seconds: float | None
    """Seconds left at this rate; None in the first step."""


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
) -> Generator[ExtractProgress, Signal | None, ExtractionStore]:
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
    settings = _Settings(
        n_tokens=n_tokens,
        n_examples=n_examples,
        n_quantiles=n_quantiles,
        n_per_quantile=n_per_quantile,
        n_random=n_random,
        n_zero=n_zero,
        n_top_tokens=n_top_tokens,
        features=None if features is None else tuple(sorted({int(feature) for feature in features})),
        min_activation=min_activation,
        exclude_special=exclude_special,
        seed=seed,
    )
    settings.check(sae.cfg.d_sae)
    check_width(lm, hook_name, sae.cfg.d_in)
    if folder.exists():
        raise Conflict(f"{folder.name!r} exists already.", fix="Use the extraction that is there, or delete it first.")
    reader = _Reader(lm, sae, tokens, hook_name, settings)
    totals = FeatureTotals(
        len(reader.selection),
        lm.d_vocab,
        ExamplePool(
            len(reader.selection), n_top=n_examples, n_stratified=n_per_quantile, n_random=n_random, n_zero=n_zero
        ),
    )
    clock = _Clock()
    stopped_early = False
    for block in reader.blocks():
        if block is not None:
            totals.add(block)
        signal = yield clock.progress("reading tokens", _PASS_SHARE * reader.fraction, reader.n_read)
        if signal is Signal.STOP and block is not None:
            stopped_early = reader.fraction < 1
            break
    totals.n_tokens = reader.n_counted
    if not totals.n_tokens:
        raise EmptyData(
            "There is no token to look at.", why="All of them are special tokens or padding.", fix="Use other text."
        )
    with new_folder(folder) as part:
        writer = ExtractionWriter(part, tokens, reader.selection, totals, n_quantiles, n_per_quantile, n_top_tokens)
        for share in writer.write():
            yield clock.progress("writing features", _PASS_SHARE + (1 - _PASS_SHARE) * share, reader.n_read)
        info = ExtractionInfo(
            created_at=time.time(),
            model=lm.name,
            hook_name=hook_name,
            d_sae=sae.cfg.d_sae,
            n_features=len(reader.selection),
            n_alive=int((totals.n_active > 0).sum()),
            n_dense=int((totals.n_active > DENSE_ABOVE * totals.n_tokens).sum()),
            n_tokens=totals.n_tokens,
            n_contexts=totals.n_contexts,
            context_size=tokens.info.context_size,
            stopped_early=stopped_early,
            settings=asdict(settings) | {"batch_contexts": reader.batch_contexts},
            provenance=_provenance(sae, tokens) | (provenance or {}),
            files={name: file_sha256(part / name) for name in (FEATURES_FILE, EXAMPLES_FILE, CONTEXTS_FILE)},
        )
        (part / INFO_FILE).write_text(info.model_dump_json(indent=2), encoding="utf-8")
    yield clock.progress("writing features", 1.0, reader.n_read)
    return load_extraction(folder)


def working_bytes(d_sae: int, *, n_examples: int = 20, n_per_quantile: int = 5, n_random: int = 5) -> int:
    """Memory that `extract` needs beside the model and the SAE, at most, whatever the number of tokens.

    Examples are counted with ten activations in each of their contexts.
    """
    n_kept = n_examples + 16 * n_per_quantile + n_random
    a_feature = 4 * N_LOG_BINS + n_kept * (8 + 24 + 10 * 8)
    token_table = 2 * 40 * max(4_000_000, 256 * d_sae)
    return d_sae * a_feature + token_table + 512 * 2**20  # and a dense block with its sparse copies


@dataclass(frozen=True)
class _Settings:
    """What was asked for, as it is recorded; `extract` documents each."""

    n_tokens: int | None
    n_examples: int
    n_quantiles: int
    n_per_quantile: int
    n_random: int
    n_zero: int
    n_top_tokens: int
    features: tuple[int, ...] | None
    min_activation: float
    exclude_special: bool
    seed: int

    def check(self, d_sae: int) -> None:
        """Refuse what cannot be used."""
        least = {"n_examples": 1, "n_quantiles": 1, "n_top_tokens": 1, "n_per_quantile": 0, "n_random": 0, "n_zero": 0}
        for name, minimum in (least | {"min_activation": 0, "seed": 0}).items():
            if not getattr(self, name) >= minimum:
                raise BadInput(f"{name} is {getattr(self, name)}.", fix=f"Use at least {minimum}.")
        if self.features is not None and not all(0 <= feature < d_sae for feature in self.features or [-1]):
            wrong = next((str(feature) for feature in self.features if not 0 <= feature < d_sae), "none")
            raise BadInput(
                f"The features to extract cannot be used: {wrong}.",
                why=f"The SAE has {d_sae} features, 0 to {d_sae - 1}.",
                fix="Give at least one index in that range, or leave features out to take all.",
            )


class _Reader:
    """Runs the model and the SAE over the contexts and hands out blocks.

    Attributes:
        selection: (n_features,) the features looked at.
        batch_contexts: contexts in one forward pass.
        n_read: real tokens read so far.
        n_counted: of those, the ones that count.
    """

    def __init__(self, lm: LanguageModel, sae: SAE, tokens: PackedTokens, hook_name: str, settings: _Settings) -> None:
        self.lm, self.sae, self.tokens, self.hook_name, self.settings = lm, sae, tokens, hook_name, settings
        d_sae = sae.cfg.d_sae
        self.selection = np.arange(d_sae) if settings.features is None else np.array(settings.features)
        self.row_of = np.full(d_sae, -1, dtype=np.int64)
        self.row_of[self.selection] = np.arange(len(self.selection))
        self.order = _visiting_order(tokens, settings.n_tokens, settings.seed)
        self.batch_contexts = _batch_contexts(lm, sae, tokens.info.context_size)
        self.n_read = self.n_counted = 0
        self._n_planned = int(tokens.n_real[torch.from_numpy(self.order)].sum())

    @property
    def fraction(self) -> float:
        """Share of the planned tokens that is read."""
        return self.n_read / self._n_planned

    def blocks(self) -> Iterator[Block | None]:
        """After each step a block if one is full, else None."""
        size = self.tokens.info.context_size
        contexts: list[NDArray] = []
        parts: list[tuple[NDArray, NDArray, NDArray]] = []
        n_waiting = n_entries = 0
        for at in range(0, len(self.order), self.batch_contexts):
            rows = self.order[at : at + self.batch_contexts]
            feature, place, value = self._entries(torch.from_numpy(rows))
            contexts.append(rows)
            parts.append((feature, place + n_waiting * size, value))
            n_waiting += len(rows)
            n_entries += len(feature)
            yield None  # taking a block in is a step of its own
            at_end = at + self.batch_contexts >= len(self.order)
            if n_waiting * size < _BLOCK_TOKENS and n_entries < _BLOCK_ENTRIES and not at_end:
                continue
            which = np.concatenate(contexts)
            feature, place, value = (np.concatenate(column) for column in zip(*parts, strict=True))
            contexts, parts, n_waiting, n_entries = [], [], 0, 0
            yield Block.of(which, self.tokens.ids[torch.from_numpy(which)].numpy(), feature, place, value)

    def _entries(self, rows: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Feature rows, places and values of what is active in these contexts."""
        mask = self.tokens.mask(rows, special=not self.settings.exclude_special)
        # Causal attention never looks at the padding behind the text: no attention mask is needed.
        acts = activations(self.lm, self.tokens.ids[rows], [self.hook_name])[self.hook_name]
        x = acts[mask.to(acts.device)].to(self.sae.device)  # (n_counted, d_in)
        with torch.no_grad():
            token, feature, value = sparse_acts(self.sae, x, self.settings.min_activation)
        self.n_read += int(self.tokens.n_real[rows].sum())
        self.n_counted += len(x)
        place = torch.nonzero(mask.reshape(-1)).squeeze(1).numpy()[token]
        if len(self.selection) == len(self.row_of):
            return feature, place, value
        feature = self.row_of[feature]
        kept = feature >= 0
        return feature[kept], place[kept], value[kept]


class _Clock:
    """Rate and time left, from the wall clock."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def progress(self, stage: str, fraction: float, n_tokens: int) -> ExtractProgress:
        seconds = max(time.monotonic() - self._began, 1e-9)
        eta = seconds * (1 - fraction) / fraction if fraction else None
        return ExtractProgress(stage, fraction, n_tokens, n_tokens / seconds, eta)


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
