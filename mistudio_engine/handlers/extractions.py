"""Handlers of api/operations/extractions.py: one pass over the tokens, then the logit lens, the interpretability scores
and the search index of each SAE.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mistudio_engine.api.errors import BadInput, Conflict
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.datasets import Deleted
from mistudio_engine.api.operations.extractions import (
    DeleteExtraction,
    Extract,
    Extracted,
    ListExtractions,
    ShowExtraction,
    UseExtraction,
)
from mistudio_engine.api.records import ExtractionRecord, JobState, ModelRecord, Page, Plan, SAERecord, TokensRecord
from mistudio_engine.discovery.ablation import written_rows
from mistudio_engine.discovery.extraction import ExtractionSettings, Target, extract_together, working_bytes
from mistudio_engine.discovery.extraction_store import ExtractionStore
from mistudio_engine.discovery.interpretability import interpretability
from mistudio_engine.discovery.logit_lens import RESIDUAL_SITES, LogitLens, logit_lens
from mistudio_engine.discovery.logit_store import write_logits
from mistudio_engine.handlers.knowledge import DATA_FOLDER, INTERPRETABILITY_FILE, LOGITS_FILE, Knowledge
from mistudio_engine.handlers.models import remove_folder
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.relay import relay
from mistudio_engine.handlers.resources import (
    fitting_model,
    free_slug,
    language_model,
    open_tokens,
    sparse_autoencoder,
    tokens_of,
)
from mistudio_engine.handlers.search_index import drop_features, index_features
from mistudio_engine.models.checkpoint import load_tokenizer
from mistudio_engine.models.hooks import parse_hook
from mistudio_engine.models.language_model import LanguageModel, unembedding
from mistudio_engine.models.vocabulary import special_ids, token_strings
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import hashing_folder
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import SAE
from mistudio_engine.saes.folders import new_file

LOGITS_KEPT = 100
"""Tokens kept at each end of a feature's logits: what the export may ask for."""

CHECKPOINT_FILE = "pass.npz"

PASS, LENS, SCORES = 0.75, 0.8, 0.9
"""Where the pass, the lenses and the scores end on the way from 0 to 1; the index is the rest."""


@plans(Extract)
def plan_extract(operation: Extract, engine: Engine) -> Planned:
    saes, model, tokens = _subjects(operation, engine)
    first = saes[0]
    beyond = [index for index in operation.features or [] if index >= first.d_sae]
    if beyond:
        raise BadInput(
            f"{first.ref} has no feature {beyond[0]}.",
            why=f"Its features are 0 to {first.d_sae - 1}.",
            fix="Leave it out.",
        )
    _excluded_ids(engine, model, operation.exclude_tokens)
    n_tokens = min(operation.n_tokens or tokens.n_tokens, tokens.n_tokens)
    slug = _free_slug(engine, first, n_tokens)
    n_features = len(operation.features or []) or sum(sae.d_sae for sae in saes)
    of = first.ref if len(saes) == 1 else f"{len(saes)} SAEs in one pass"
    plan = Plan(
        summary=f"Extract {n_features:,} features of {of} from {n_tokens:,} tokens.",
        seconds=_seconds(engine, saes, n_tokens),
        memory_bytes=sum(_working_bytes(operation, sae) for sae in saes),
        details={"n_tokens": n_tokens, "tokens": tokens.slug, "saes": [sae.slug for sae in saes]},
    )
    return Planned(plan, subject=f"extraction/{slug}")


def _subjects(operation: Extract, engine: Engine) -> tuple[list[SAERecord], ModelRecord, TokensRecord]:
    """The SAEs, the model that all of them read, and the tokens.

    Raises:
        BadInput: they read several models, or the tokens are another model's.
    """
    saes = [engine.store.get(SAERecord, slug) for slug in (operation.sae, *operation.also)]
    model = fitting_model(engine, saes[0])
    for other in saes[1:]:
        if (theirs := fitting_model(engine, other)).slug != model.slug:
            raise BadInput(
                f"{saes[0].ref} reads {model.ref} and {other.ref} reads {theirs.ref}.",
                fix="Extract SAEs of different models one after another.",
            )
    tokens = tokens_of(engine, operation.dataset, saes[0])
    if tokens.model != model.slug:
        raise BadInput(
            f"{tokens.ref} was made for model/{tokens.model} and {saes[0].ref} reads {model.ref}.",
            fix="Give a dataset that was tokenised for the SAE's own model.",
        )
    least = min(tokens.context_size, tokens.n_tokens)
    if operation.n_tokens is not None and operation.n_tokens < least:
        raise BadInput(
            f"n_tokens = {operation.n_tokens} is less than one context of {tokens.ref}.",
            fix=f"Use at least {least}, or leave it out to take all.",
        )
    if operation.exclude_first >= tokens.context_size:
        raise BadInput(
            f"exclude_first = {operation.exclude_first} leaves nothing: a context of {tokens.ref} has "
            f"{tokens.context_size} tokens.",
            fix="Use a smaller number.",
        )
    return saes, model, tokens


def _excluded_ids(engine: Engine, model: ModelRecord, tokens: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens that read like these.

    Raises:
        BadInput: the model has none like one of them.
    """
    if not tokens:
        return ()
    tokenizer = load_tokenizer(engine.home / model.folder)
    vocabulary = list(tokenizer.get_vocab().values())
    reading: dict[str, set[int]] = {}  # read once: there may be a thousand tokens to look for
    for token_id, string in zip(vocabulary, token_strings(tokenizer, vocabulary), strict=True):
        for text in {string, string.strip()}:
            reading.setdefault(text, set()).add(token_id)
    found: set[int] = set()
    for token in tokens:
        ids = reading.get(token.strip() or token)
        if not ids:
            raise BadInput(
                f"exclude_tokens: {model.ref} has no token {token!r}.",
                fix="Give single tokens as get_feature shows them; a word may be several.",
            )
        found |= ids
    return tuple(sorted(found))


def _stem(sae: SAERecord, n_tokens: int) -> str:
    return f"{sae.slug}-{n_tokens // 1000}k"


def _free_slug(engine: Engine, sae: SAERecord, n_tokens: int) -> str:
    # A failed or cancelled job may be told to try again: only a completed one has no more use for its name.
    return free_slug(engine, _stem(sae, n_tokens), ExtractionRecord, released={JobState.COMPLETED})


def _seconds(engine: Engine, saes: Sequence[SAERecord], n_tokens: int) -> float | None:
    """From the last pass of the same SAE; None before there was one, or for several at once."""
    if len(saes) > 1:
        return None
    rates = [each.tokens_per_second for each in engine.store.all(ExtractionRecord, sae=saes[0].slug)]
    known = [rate for rate in rates if rate]
    return n_tokens / known[-1] / PASS if known else None


def _working_bytes(operation: Extract, sae: SAERecord) -> int:
    return working_bytes(
        sae.d_sae,
        n_examples=operation.n_examples,
        n_per_quantile=operation.n_per_quantile,
        n_random=operation.n_random,
    )


@runs(Extract, lane="compute", resumes="checkpoint")
def run_extract(operation: Extract, engine: Engine, context: JobContext) -> Generator[Progress, Signal, Extracted]:
    # What this job has made already, if the engine was killed after that.
    made = {each.sae: each for each in engine.store.all(ExtractionRecord, job=context.job.slug)}
    if not made:
        made = yield from _extract(operation, engine, context)
    records = [made[slug] for slug in (operation.sae, *operation.also)]
    for number, record in enumerate(records):
        with Knowledge.of(engine, record.sae) as known:
            if known.sae.extraction == record.slug:  # else somebody has chosen another one meanwhile
                part = (SCORES + (1 - SCORES) * number / len(records), (1 - SCORES) / len(records))
                yield from _index(engine, known, *part)
    return Extracted(**records[0].model_dump(exclude={"ref"}), also=records[1:])


def _index(engine: Engine, known: Knowledge, start: float, share: float) -> Generator[Progress, Signal, None]:
    def say(step: Progress) -> Progress:
        return Progress(stage="indexing", fraction=start + share * (step.fraction or 0.0))

    yield from relay(index_features(engine, known), say)


class _Making(NamedTuple):
    """An extraction that is being made."""

    sae: SAERecord
    slug: str
    folder: Path


def _extract(
    operation: Extract, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, dict[str, ExtractionRecord]]:
    """The pass, the lenses and the scores, written down as the SAEs' current extractions; by SAE."""
    assert context.job.subject
    saes, model, tokens = _subjects(operation, engine)
    slugs = [context.job.subject.partition("/")[2]]
    n_tokens = min(operation.n_tokens or tokens.n_tokens, tokens.n_tokens)
    if engine.store.exists(ExtractionRecord, slugs[0]):
        # Made since, by a job of several SAEs, which finds its names only here: it is not ours to replace.
        slugs = [_free_slug(engine, saes[0], n_tokens)]
    slugs += [_free_slug(engine, sae, n_tokens) for sae in saes[1:]]
    making = [_Making(sae, slug, engine.home / "extractions" / slug) for sae, slug in zip(saes, slugs, strict=True)]
    for each in making:
        shutil.rmtree(each.folder, ignore_errors=True)  # what an attempt that was killed left
        each.folder.mkdir(parents=True)
    settings = ExtractionSettings(
        **{
            name: getattr(operation, name)
            for name in ExtractionSettings.__dataclass_fields__
            if name != "exclude_token_ids"
        },
        exclude_token_ids=_excluded_ids(engine, model, operation.exclude_tokens),
    )
    try:
        with ExitStack() as open_saes, language_model(engine, model.slug) as lm:
            modules = [open_saes.enter_context(sparse_autoencoder(engine, each.sae.slug)) for each in making]
            targets = [
                Target(
                    sae=module,
                    hook_name=each.sae.hook_name,
                    folder=each.folder / DATA_FOLDER,
                    features=operation.features,
                    provenance={"sae": each.sae.sha256, "model": model.sha256, "tokens": tokens.sha256},
                )
                for each, module in zip(making, modules, strict=True)
            ]
            needed = sum(_working_bytes(operation, sae) for sae in saes)
            with engine.memory.reserve(f"Extracting {operation.sae}", needed, device="cpu"):
                pass_ = _Pass(engine, context)
                stores = yield from pass_.done(lm, targets, tokens, settings)
            specials = special_ids(lm.tokenizer) | frozenset(settings.exclude_token_ids)
            for number, (each, module, store) in enumerate(zip(making, modules, stores, strict=True)):
                yield from _lens(lm, module, each, store, number / len(making), 1 / len(making))
            for number, (each, store) in enumerate(zip(making, stores, strict=True)):
                yield from _scores(each, store, specials, number / len(making), 1 / len(making))
        hashes = yield from _hashes(making)
        records = {
            each.sae.slug: ExtractionRecord(
                slug=each.slug,
                sae=each.sae.slug,
                model=model.slug,
                tokens=tokens.slug,
                hook_name=each.sae.hook_name,
                n_tokens=store.info.n_tokens,
                n_features=store.info.n_features,
                n_alive=store.info.n_alive,
                n_dense=store.info.n_dense,
                l0=store.info.l0,
                tokens_per_second=pass_.tokens_per_second,
                job=context.job.slug,
                settings=store.info.settings | {"window": operation.window, "exclude_tokens": operation.exclude_tokens},
                folder=str(each.folder.relative_to(engine.home)),
                sha256=sha256,
            )
            for each, store, sha256 in zip(making, stores, hashes, strict=True)
        }
        with engine.store.transaction():
            for slug, record in records.items():
                engine.store.put(record)
                engine.store.update(SAERecord, slug, extraction=record.slug)
    except BaseException:
        for each in making:
            if not engine.store.exists(ExtractionRecord, each.slug):
                shutil.rmtree(each.folder, ignore_errors=True)
        raise
    return records


class _Pass:
    """The pass over the tokens, which goes on where an interrupted one was."""

    def __init__(self, engine: Engine, context: JobContext) -> None:
        self.engine, self.context = engine, context
        self.tokens_per_second: float | None = None

    def done(
        self, lm: LanguageModel, targets: Sequence[Target], tokens: TokensRecord, settings: ExtractionSettings
    ) -> Generator[Progress, Signal, list[ExtractionStore]]:
        checkpoint = self.context.folder / CHECKPOINT_FILE
        work = extract_together(lm, targets, open_tokens(self.engine, tokens), settings, checkpoint=checkpoint)
        return (yield from relay(work, self._say))

    def _say(self, step: Any) -> Progress:
        if step.stage == "reading tokens" and step.eta_seconds is not None:
            self.tokens_per_second = step.tokens_per_second
        return Progress(
            stage=step.stage,
            fraction=PASS * step.fraction,
            rate=step.tokens_per_second,
            unit="tokens",
            eta_seconds=None if step.eta_seconds is None else step.eta_seconds / PASS,
            checkpointed=step.checkpointed,
        )


def _lens(
    lm: LanguageModel, sae: SAE, making: _Making, store: ExtractionStore, start: float, share: float
) -> Generator[Progress, Signal, None]:
    """Write what every extracted feature promotes; nothing where it does not write into the residual stream.

    Both forms are kept: with the final norm's gain folded in, and the plain one that others show.
    """
    W_U, gain = unembedding(lm)
    site = parse_hook(sae.cfg.hook_name_out or making.sae.hook_name).site
    if site not in RESIDUAL_SITES or sae.cfg.output_width != W_U.shape[1]:
        return
    rows = written_rows(sae, store.indices)
    lenses: list[LogitLens] = []
    gains = [None] if gain is None else [gain, None]
    for number, each in enumerate(gains):
        at, of = start + share * number / len(gains), share / len(gains)
        work = logit_lens(rows, W_U, each, k=min(LOGITS_KEPT, W_U.shape[0]))
        lenses.append((yield from _staged(work, "logit lens", PASS, LENS, at, of)))
    write_logits(making.folder / LOGITS_FILE, lenses[0], lenses[-1])


def _scores(
    making: _Making, store: ExtractionStore, special: Iterable[int], start: float, share: float
) -> Generator[Progress, Signal, None]:
    """Write how well the text alone tells where each feature fires."""
    work = interpretability(store, special_ids=frozenset(special))
    found = yield from _staged(work, "interpretability", LENS, SCORES, start, share)
    with new_file(making.folder / INTERPRETABILITY_FILE) as part:
        pq.write_table(pa.table(found._asdict()), part)


def _hashes(making: Sequence[_Making]) -> Generator[Progress, Signal, list[str]]:
    """What each extraction is known by from now on."""
    hashes = []
    for each in making:
        work = hashing_folder(each.folder)
        hashes.append((yield from relay(work, lambda _: Progress(stage="hashing", fraction=SCORES))))
    return hashes


def _staged(
    work: Any, stage: str, begin: float, end: float, start: float, share: float
) -> Generator[Progress, Signal, Any]:
    """A part's progress as a share of the whole job: `share` of a stage that goes from `begin` to `end`."""

    def say(step: Any) -> Progress:
        done = step if isinstance(step, float) else step.fraction
        return Progress(stage=stage, fraction=begin + (end - begin) * (start + share * done))

    return relay(work, say)


@handles(ListExtractions)
def list_extractions(operation: ListExtractions, engine: Engine) -> Page[ExtractionRecord]:
    where = {"sae": operation.sae} if operation.sae else {}
    return engine.store.page(ExtractionRecord, where=where, limit=operation.limit, cursor=operation.cursor)


@handles(ShowExtraction)
def show_extraction(operation: ShowExtraction, engine: Engine) -> ExtractionRecord:
    return _record(engine, operation.extraction)


def _record(engine: Engine, name: str) -> ExtractionRecord:
    return engine.store.get(ExtractionRecord, name.removeprefix("extraction/"))


@plans(UseExtraction)
def plan_use_extraction(operation: UseExtraction, engine: Engine) -> Planned:
    record = _record(engine, operation.extraction)
    summary = f"Make {record.ref} the current extraction of sae/{record.sae} and index its features."
    return Planned(Plan(summary=summary, details={"n_features": record.n_alive}), subject=record.ref)


@runs(UseExtraction, lane="io", resumes="start")
def run_use_extraction(
    operation: UseExtraction, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, ExtractionRecord]:
    record = _record(engine, operation.extraction)
    engine.store.update(SAERecord, record.sae, extraction=record.slug)
    with Knowledge.of(engine, record.sae) as known:
        yield from _index(engine, known, 0.0, 1.0)
    return record


@handles(DeleteExtraction)
def delete_extraction(operation: DeleteExtraction, engine: Engine) -> Deleted:
    record = _record(engine, operation.extraction)
    busy = [
        job.ref
        for job in engine.jobs.active()
        if job.subject == record.ref or (job.arguments.get("sae") == record.sae and job.operation != "train_sae")
    ]
    if busy:
        raise Conflict(f"{record.ref} may be in use by {', '.join(busy)}.", fix="Wait for it, or cancel it first.")
    with engine.store.transaction():
        was_current = engine.store.get(SAERecord, record.sae).extraction == record.slug
        if was_current:
            engine.store.update(SAERecord, record.sae, extraction=None)
        engine.store.delete(ExtractionRecord, record.slug)
    if was_current:
        drop_features(engine, record.sae)
    return Deleted(ref=record.ref, freed_bytes=remove_folder(engine, record.folder))
