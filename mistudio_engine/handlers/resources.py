"""What handlers work with: the models, SAEs, tokens and sources that records name, opened and accounted for.

The joint between records and science objects. It knows no operation.
"""

from __future__ import annotations

import gc
import itertools
import re
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from mistudio_engine.api.errors import BadInput, Conflict, NotFound, WrongShape
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.records import (
    TERMINAL_STATES,
    DatasetRecord,
    Job,
    ModelRecord,
    Record,
    SAERecord,
    TokensRecord,
)
from mistudio_engine.api.sae_config import parse_sae_config, sae_bytes
from mistudio_engine.models.device_errors import as_out_of_memory, is_device_lost
from mistudio_engine.models.hooks import check_hook, check_width
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens, load_tokens
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.faults import Faults
from mistudio_engine.saes import SAE, load_sae

__all__ = [
    "EMBEDDED",
    "FAULTS",
    "Source",
    "best_device",
    "check_fit",
    "fitting_model",
    "free_slug",
    "language_model",
    "one_at_a_time",
    "open_tokens",
    "read_source",
    "sparse_autoencoder",
    "tokens_of",
]

EMBEDDED = "embedded"
"""Source name of the model and the corpus that come with miStudio."""

FAULTS = Faults(is_device_lost, as_out_of_memory)
"""How the engine takes torch's errors."""

T = TypeVar("T")

WAIT_SECONDS = 0.1
"""Between two looks whether another job is done; it may be the compute thread that waits."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


class Source(NamedTuple):
    """Where something is brought in from."""

    kind: str
    """embedded, local or hub."""

    path: Path | None = None
    hub_id: str | None = None


def read_source(source: str, what: str) -> Source:
    """Tell a path from a hub id.

    Raises:
        NotFound: it looks like a path and nothing is there.
        BadInput: it is neither.
    """
    if source == EMBEDDED:
        return Source("embedded")
    path = Path(source).expanduser()
    if path.exists():
        return Source("local", path=path.resolve())
    if source.startswith(("/", ".", "~")) or "\\" in source or source.count("/") > 1:
        raise NotFound(
            f"There is nothing at {source!r} to bring in as a {what}.",
            why="The path is looked up on the engine's machine.",
            fix="Give an existing path, or a hub id such as owner/name.",
        )
    if not HUB_ID.fullmatch(source):
        raise BadInput(
            f"{source!r} is neither a path on the engine's machine nor a hub id.",
            fix="Give an existing path, or a hub id such as owner/name.",
        )
    return Source("hub", hub_id=source)


def free_slug(
    engine: Engine, stem: str, *kinds: type[Record], released: Collection[str] = TERMINAL_STATES, exact: bool = False
) -> str:
    """`stem`, or the first of `stem-2`, `stem-3`, … that nothing has and no job may still make.

    Args:
        kinds: no record of any of these may have it.
        released: states of a job in which it has no more use for a name.
        exact: `stem` itself or none: somebody chose it.

    Raises:
        Conflict: `exact`, and it is taken.
    """
    for slug in itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2))):
        refs = [f"{kind.kind}/{slug}" for kind in kinds if engine.store.exists(kind, slug)]
        for kind in kinds:
            jobs = engine.store.all(Job, subject=f"{kind.kind}/{slug}")
            refs += [job.ref for job in jobs if job.state not in released]
        if not refs:
            return slug
        if exact:
            raise Conflict(f"The name {slug!r} is taken by {refs[0]}.", fix="Give the new one another name.")
    raise AssertionError("count() does not end")


_making: set[tuple[str, str]] = set()
_making_lock = threading.Lock()


def one_at_a_time(
    engine: Engine, ref: str, work: Callable[[], Generator[Progress, Signal, T]]
) -> Generator[Progress, Signal, T]:
    """Do `work`, which makes or replaces the files of `ref`, once nobody else does: two would delete each other's."""
    key = (engine.epoch, ref)
    while not _claimed(key):
        yield Progress(stage=f"waiting for another job that works on {ref}")
        time.sleep(WAIT_SECONDS)
    try:
        return (yield from work())
    finally:
        with _making_lock:
            _making.discard(key)


def _claimed(key: tuple[str, str]) -> bool:
    with _making_lock:
        if key in _making:
            return False
        _making.add(key)
        return True


def best_device() -> str:
    """Where models run here: the first GPU, else the CPU."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


@contextmanager
def language_model(engine: Engine, slug: str) -> Iterator[LanguageModel]:
    """The model, loaded and pinned while the block runs; on the compute thread only."""
    record = engine.store.get(ModelRecord, slug)
    folder = engine.home / record.folder

    def load() -> LanguageModel:
        return LanguageModel.load(folder, name=record.slug, precision=record.precision, device=engine.device)  # type: ignore[arg-type]

    with engine.memory.resident(record.ref, record.n_bytes, load, _release, device=engine.device) as model:
        yield model


@contextmanager
def sparse_autoencoder(engine: Engine, slug: str) -> Iterator[SAE]:
    """The SAE, loaded and pinned while the block runs; on the compute thread only."""
    record = engine.store.get(SAERecord, slug)
    n_bytes = sae_bytes(parse_sae_config(record.config))

    def load() -> SAE:
        return load_sae(engine.home / record.folder, device=engine.device)

    with engine.memory.resident(record.ref, n_bytes, load, _release, device=engine.device) as sae:
        yield sae


def _release(_: object) -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tokens_of(engine: Engine, name: str | None, sae: SAERecord | None, model: str | None = None) -> TokensRecord:
    """The tokenisation that a dataset's, a tokenisation's or an SAE's name stands for.

    Raises:
        NotFound: there is none, with the call that makes one.
    """
    if name is None:
        if sae is None or sae.tokens is None or not engine.store.exists(TokensRecord, sae.tokens):
            raise NotFound(
                f"It is not known which tokens belong to {sae.ref if sae else 'this'}.",
                fix="Give a dataset that was tokenised for its model.",
                next_call=("find", {"kind": "tokens"}),
            )
        return engine.store.get(TokensRecord, sae.tokens)
    kind, _, slug = name.rpartition("/")
    if kind in ("", "tokens") and engine.store.exists(TokensRecord, slug):
        return engine.store.get(TokensRecord, slug)
    if kind not in ("", "dataset"):
        raise BadInput(f"{name!r} is not a dataset.", fix="Give a dataset or a tokenisation, as find lists them.")
    dataset = engine.store.get(DatasetRecord, slug)
    model = model or (sae.model if sae else None)
    for tokens in reversed([engine.store.get(TokensRecord, each) for each in dataset.tokens]):
        if model is None or tokens.model == model:
            return tokens
    raise NotFound(
        f"{dataset.ref} has not been tokenised for model {model!r}.",
        fix="Tokenise it first.",
        next_call=("get_dataset", {"source": dataset.source, "name": dataset.slug, "model": model}),
    )


def open_tokens(engine: Engine, record: TokensRecord) -> PackedTokens:
    """The tokens themselves, memory-mapped."""
    return load_tokens(engine.home / record.folder)


def fitting_model(engine: Engine, sae: SAERecord, wanted: str | None = None) -> ModelRecord:
    """The model that an SAE reads.

    Raises:
        NotFound: it is not here.
        WrongShape: another one was asked for, and the SAE does not fit it.
    """
    slug = wanted or sae.model
    if slug is None or not engine.store.exists(ModelRecord, slug):
        raise NotFound(
            f"The model {slug!r} that {sae.ref} reads is not here.",
            fix="Bring it in with get_model, under that name.",
            next_call=("get_model", {"source": slug or "HUB_ID", "name": slug}),
        )
    model = engine.store.get(ModelRecord, slug)
    if "resid" in sae.hook_name and sae.d_in != model.d_model:
        raise WrongShape(
            f"{sae.ref} reads {sae.d_in} numbers and {model.ref} has a residual stream of {model.d_model}.",
            fix="Use the model that the SAE was trained on.",
        )
    return model


def check_fit(model: LanguageModel, hook_name: str, d_in: int) -> None:
    """Refuse a hook outside the model, or one of another width."""
    check_hook(model, hook_name)
    check_width(model, hook_name, d_in)
