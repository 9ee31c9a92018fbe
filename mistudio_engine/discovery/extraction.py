"""Extraction: one pass over the tokens computes what there is to know of **all** features of an SAE at once.

Activations are made sparse at once and go through accumulators block by block (statistics, histograms, top tokens,
examples), so memory grows with the features and not with the text. Contexts are visited in a seeded random order: what
comes first is then a fair sample, and an extraction that is stopped early is one of fewer tokens, not of the first
book. The model runs once, however many SAEs read it. A run that is interrupted goes on from its last checkpoint and
ends with the same bits.

It knows no labels and no text; extraction_store.py reads what it writes.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mistudio_engine import __version__
from mistudio_engine.api.errors import BadInput, Conflict, EmptyData
from mistudio_engine.api.events import Signal
from mistudio_engine.discovery.examples import ExamplePool
from mistudio_engine.discovery.extraction_checkpoint import Keeper
from mistudio_engine.discovery.extraction_reader import ExtractionReader, WhichTokens
from mistudio_engine.discovery.extraction_store import (
    CONTEXTS_FILE,
    DENSE_ABOVE,
    EXAMPLES_FILE,
    FEATURES_FILE,
    HASHED_AT_ONCE,
    INFO_FILE,
    ExtractionInfo,
    ExtractionStore,
    hashing_file,
    load_extraction,
)
from mistudio_engine.discovery.extraction_writer import ExtractionWriter
from mistudio_engine.discovery.histogram import N_LOG_BINS
from mistudio_engine.discovery.totals import FeatureTotals
from mistudio_engine.models.hooks import check_width
from mistudio_engine.saes.folders import new_folder

if TYPE_CHECKING:
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.models.tokens import PackedTokens
    from mistudio_engine.saes.base import SAE

__all__ = [
    "ExtractProgress",
    "ExtractionSettings",
    "Target",
    "extract",
    "extract_together",
    "load_extraction",
    "working_bytes",
]

S = TypeVar("S")
T = TypeVar("T")

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

    checkpointed: bool = False
    """A checkpoint was completed in this step."""


@dataclass(frozen=True)
class Target:
    """An SAE whose features are looked at."""

    sae: SAE
    hook_name: str
    """Where it reads."""

    folder: Path
    """Its extraction; made, whole or not at all."""

    features: Sequence[int] | None = None
    """Only these; None takes all."""

    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Hashes and versions to record beside ours."""


@dataclass(frozen=True)
class ExtractionSettings:
    """What is asked for, as it is recorded.

    Raises:
        BadInput: a number is out of range.
    """

    n_tokens: int | None = None
    """Use at most so many real tokens, in whole contexts chosen at random; None uses all."""

    n_examples: int = 20
    """Contexts with the largest activations kept for each feature."""

    n_quantiles: int = 5
    """Equal parts of [0, maximum] that the quantile examples are drawn from …"""

    n_per_quantile: int = 5
    """… so many from each."""

    n_random: int = 5
    """Contexts drawn from those in which the feature fires."""

    n_zero: int = 5
    """Contexts drawn from those in which it never does."""

    n_top_tokens: int = 50
    """Tokens kept by count, by mean and by maximum."""

    n_partners: int = 20
    """Features kept that fire on the same tokens most."""

    min_activation: float = 0.0
    """Smaller activations count as none."""

    exclude_special: bool = True
    """Leave BOS, EOS and other special tokens out of everything (padding always is)."""

    exclude_token_ids: tuple[int, ...] = ()
    """Leave these out as well."""

    exclude_first: int = 0
    """Leave so many positions at the beginning of each context out."""

    seed: int = 0
    """For the order of the contexts, and with it the quantile, random and zero examples. Statistics and top examples
    of a run over all tokens do not depend on it."""

    def __post_init__(self) -> None:
        at_least_one = {"n_examples", "n_quantiles", "n_top_tokens"}
        for name in (each.name for each in fields(self) if each.type in ("int", "float")):
            value, least = getattr(self, name), 1 if name in at_least_one else 0
            if not value >= least:
                raise BadInput(f"{name} is {value}.", fix=f"Use at least {least}.")


def extract(
    lm: LanguageModel,
    sae: SAE,
    tokens: PackedTokens,
    hook_name: str,
    folder: Path,
    *,
    features: Sequence[int] | None = None,
    provenance: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    **settings: Any,
) -> Generator[ExtractProgress, Signal | None, ExtractionStore]:
    """`extract_together` for one SAE; the settings are those of `ExtractionSettings`."""
    target = Target(sae, hook_name, Path(folder), features, provenance or {})
    (store,) = yield from extract_together(lm, [target], tokens, ExtractionSettings(**settings), checkpoint=checkpoint)
    return store


def extract_together(
    lm: LanguageModel,
    targets: Sequence[Target],
    tokens: PackedTokens,
    settings: ExtractionSettings | None = None,
    *,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> Generator[ExtractProgress, Signal | None, list[ExtractionStore]]:
    """Extract all features of some SAEs of one model in one pass; a generator of small steps.

    Send it `Signal.STOP` to finish early with the tokens seen so far, `Signal.CHECKPOINT` to write a checkpoint now;
    close it to cancel, which leaves nothing behind but the checkpoint.

    Args:
        lm: the language model.
        targets: SAEs with their hooks and folders.
        tokens: packed contexts.
        settings: the same for all.
        checkpoint: file that the state of the pass is written to now and then, and that an interrupted run goes on
            from; the result has the same bits as that of an undisturbed run. None writes none.
        checkpoint_seconds: between two of them.

    Returns:
        The opened extractions, in the order of the targets.

    Raises:
        Conflict: a folder exists.
        BadInput: a feature index is out of range, or an activation is not finite.
        UnknownHook, WrongShape: a hook is not the model's, or not as wide as its SAE.
        EmptyData: no token is left to look at.
    """
    settings = settings or ExtractionSettings()
    for target in targets:
        check_width(lm, target.hook_name, target.sae.cfg.d_in)
        _check_features(target)
        if target.folder.exists():
            raise Conflict(
                f"{target.folder.name!r} exists already.", fix="Use the extraction that is there, or delete it first."
            )
    which = WhichTokens(settings.exclude_special, settings.exclude_token_ids, settings.exclude_first)
    reader = ExtractionReader(
        lm,
        targets,
        tokens,
        which,
        n_tokens=settings.n_tokens,
        min_activation=settings.min_activation,
        seed=settings.seed,
    )
    totals = [_totals(lm, chosen, settings) for chosen in reader.selections]
    made_from = []
    for target in targets:
        sae_sha256 = yield from _saying(_hashing(target.sae), _Clock(reader).reading)
        made_from.append(_provenance(sae_sha256, tokens) | dict(target.provenance))
    keeper = Keeper(checkpoint, checkpoint_seconds, reader, totals, _what(targets, made_from, tokens, settings))
    keeper.go_on()
    clock = _Clock(reader)
    stopped_early = False
    signal: Signal | None = None
    for blocks in reader.steps():
        if blocks is not None:
            for total, block in zip(totals, blocks.of_each, strict=True):
                total.add(block, blocks.counted)
                if len(totals) > 1:
                    yield clock.reading()
        if wanted := keeper.is_wanted(signal is Signal.CHECKPOINT):
            for _ in keeper.write():
                yield clock.reading()
        signal = yield clock.reading()._replace(checkpointed=wanted)
        if signal is Signal.STOP and blocks is not None:
            stopped_early = reader.fraction < 1
            break
    if not totals[0].n_tokens:
        raise EmptyData(
            "There is no token to look at.", why="All of them are special tokens or padding.", fix="Use other text."
        )
    if keeper.is_worth_it and not stopped_early:
        for _ in keeper.write():
            yield clock.reading()
        yield clock.reading()._replace(checkpointed=True)
    stores = []
    for number, (target, total) in enumerate(zip(targets, totals, strict=True)):
        for share in _write(lm, target, tokens, reader, number, total, settings, made_from[number], stopped_early):
            yield clock.writing((number + share) / len(targets))
        stores.append(load_extraction(target.folder))
    yield clock.writing(1.0)
    return stores


def working_bytes(d_sae: int, *, n_examples: int = 20, n_per_quantile: int = 5, n_random: int = 5) -> int:
    """Memory that an SAE needs in `extract_together`, at most, whatever the number of tokens.

    Beside the model and the SAE itself. Examples are counted with ten activations in each of their contexts.
    """
    n_kept = n_examples + 16 * n_per_quantile + n_random
    a_feature = 4 * N_LOG_BINS + n_kept * (8 + 24 + 10 * 8)
    token_table = 2 * 40 * max(4_000_000, 256 * d_sae)
    return d_sae * a_feature + token_table + 512 * 2**20  # and a dense block with its sparse copies


def _check_features(target: Target) -> None:
    d_sae, features = target.sae.cfg.d_sae, target.features
    if features is not None and not all(0 <= feature < d_sae for feature in features or [-1]):
        wrong = next((str(feature) for feature in features if not 0 <= feature < d_sae), "none")
        raise BadInput(
            f"The features to extract cannot be used: {wrong}.",
            why=f"The SAE has {d_sae} features, 0 to {d_sae - 1}.",
            fix="Give at least one index in that range, or leave features out to take all.",
        )


def _totals(lm: LanguageModel, selection: NDArray[np.int64], settings: ExtractionSettings) -> FeatureTotals:
    pool = ExamplePool(
        len(selection),
        n_top=settings.n_examples,
        n_stratified=settings.n_per_quantile,
        n_random=settings.n_random,
        n_zero=settings.n_zero,
    )
    return FeatureTotals(len(selection), lm.d_vocab, pool)


def _write(
    lm: LanguageModel,
    target: Target,
    tokens: PackedTokens,
    reader: ExtractionReader,
    number: int,
    totals: FeatureTotals,
    settings: ExtractionSettings,
    provenance: dict[str, Any],
    stopped_early: bool,
) -> Generator[float, None, None]:
    """Write one extraction; yields the share that is done."""
    selection = reader.selections[number]
    with new_folder(target.folder) as part:
        writer = ExtractionWriter(
            part,
            tokens,
            selection,
            totals,
            settings.n_quantiles,
            settings.n_per_quantile,
            settings.n_top_tokens,
            settings.n_partners,
        )
        yield from writer.write()
        hashes = {}
        for name in (FEATURES_FILE, EXAMPLES_FILE, CONTEXTS_FILE):
            hashes[name] = yield from _saying(hashing_file(part / name), lambda: 1.0)
        asked = asdict(settings) | {"features": None if target.features is None else selection.tolist()}
        info = ExtractionInfo(
            created_at=time.time(),
            model=lm.name,
            hook_name=target.hook_name,
            d_sae=target.sae.cfg.d_sae,
            n_features=len(selection),
            n_alive=int((totals.n_active > 0).sum()),
            n_dense=int((totals.n_active > DENSE_ABOVE * totals.n_tokens).sum()),
            n_tokens=totals.n_tokens,
            n_contexts=totals.n_contexts,
            context_size=tokens.info.context_size,
            l0=totals.l0_summary(),
            n_coactivation_tokens=totals.coactivation.n_tokens,
            stopped_early=stopped_early,
            settings=asked | {"batch_contexts": reader.batch_contexts},
            provenance=provenance,
            files=hashes,
        )
        (part / INFO_FILE).write_text(info.model_dump_json(indent=2), encoding="utf-8")


def _what(
    targets: Sequence[Target],
    made_from: Sequence[dict[str, Any]],
    tokens: PackedTokens,
    settings: ExtractionSettings,
) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    of_each = [
        {
            "hook_name": target.hook_name,
            "features": None if target.features is None else list(target.features),
            "provenance": provenance,
        }
        for target, provenance in zip(targets, made_from, strict=True)
    ]
    text = {"n_contexts": len(tokens), "context_size": tokens.info.context_size}
    return {"targets": of_each, "tokens": text, "settings": asdict(settings)}


class _Clock:
    """Rate and time left, from the wall clock; what an earlier run has read does not count."""

    def __init__(self, reader: ExtractionReader) -> None:
        self._reader = reader
        self._began, self._n_before, self._share_before = time.monotonic(), reader.n_read, reader.fraction

    def reading(self) -> ExtractProgress:
        return self._progress("reading tokens", _PASS_SHARE * self._reader.fraction)

    def writing(self, share: float) -> ExtractProgress:
        return self._progress("writing features", _PASS_SHARE + (1 - _PASS_SHARE) * share)

    def _progress(self, stage: str, fraction: float) -> ExtractProgress:
        seconds = max(time.monotonic() - self._began, 1e-9)
        done = fraction - _PASS_SHARE * self._share_before
        eta = seconds * (1 - fraction) / done if done > 0 else None
        n_tokens = self._reader.n_read
        return ExtractProgress(stage, fraction, n_tokens, (n_tokens - self._n_before) / seconds, eta)


def _hashing(sae: SAE) -> Generator[None, None, str]:
    """The sha256 of its tensors, in small steps; a small SAE needs one, which is not told."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        content = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, len(content), HASHED_AT_ONCE):
            if start:
                yield
            digest.update(content[start : start + HASHED_AT_ONCE])
    return digest.hexdigest()


def _saying(work: Generator[Any, None, T], say: Callable[[], S]) -> Generator[S, Any, T]:
    """Do some work; at each of its steps yields what is to be said then."""
    try:
        while True:
            next(work)
            yield say()
    except StopIteration as done:
        return done.value
    finally:
        work.close()


def _provenance(sae_sha256: str, tokens: PackedTokens) -> dict[str, Any]:
    return {
        "sae_sha256": sae_sha256,
        "tokenizer_hash": tokens.info.tokenizer_hash,
        "bos_policy": tokens.info.bos_policy,
        "mistudio": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
    }
