"""Handlers of api/operations/extractions.py: one pass over the tokens, the logit lens, and the search index."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from mistudio_engine.api.errors import BadInput
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.extractions import Extract, ListExtractions, ShowExtraction
from mistudio_engine.api.records import ExtractionRecord, JobState, Page, Plan, SAERecord
from mistudio_engine.discovery.extraction import extract, working_bytes
from mistudio_engine.discovery.extraction_store import ExtractionStore
from mistudio_engine.discovery.logit_lens import logit_lens
from mistudio_engine.discovery.logit_store import write_logits
from mistudio_engine.handlers.knowledge import DATA_FOLDER, LOGITS_FILE, Knowledge
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
from mistudio_engine.handlers.search_index import index_features
from mistudio_engine.models.hooks import parse_hook
from mistudio_engine.models.language_model import LanguageModel, unembedding
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import sha256_folder
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import SAE

LOGITS_KEPT = 100
"""Tokens kept at each end of a feature's logits: what the export may ask for."""

RESIDUAL_SITES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Sites whose values are added to the residual stream: not `attn.hook_z`, though it is as wide in most models."""

PASS, LENS = 0.8, 0.9
"""Where the pass and the lens end on the way from 0 to 1; the index is the rest."""


@plans(Extract)
def plan_extract(operation: Extract, engine: Engine) -> Planned:
    sae = engine.store.get(SAERecord, operation.sae)
    model = fitting_model(engine, sae)
    tokens = tokens_of(engine, operation.dataset, sae)
    if tokens.model != model.slug:
        raise BadInput(
            f"{tokens.ref} was made for model/{tokens.model} and {sae.ref} reads {model.ref}.",
            fix="Give a dataset that was tokenised for the SAE's own model.",
        )
    beyond = [index for index in operation.features or [] if index >= sae.d_sae]
    if beyond:
        raise BadInput(
            f"{sae.ref} has no feature {beyond[0]}.", why=f"Its features are 0 to {sae.d_sae - 1}.", fix="Leave it out."
        )
    n_tokens = min(operation.n_tokens or tokens.n_tokens, tokens.n_tokens)
    # A failed or cancelled job may be told to try again: only a completed one has no more use for its name.
    slug = free_slug(engine, f"{sae.slug}-{n_tokens // 1000}k", ExtractionRecord, released={JobState.COMPLETED})
    n_features = len(operation.features or []) or sae.d_sae
    plan = Plan(
        summary=f"Extract {n_features:,} features of {sae.ref} from {n_tokens:,} tokens.",
        memory_bytes=working_bytes(sae.d_sae, n_examples=operation.n_examples),
        details={"n_tokens": n_tokens, "tokens": tokens.slug},
    )
    return Planned(plan, subject=f"extraction/{slug}")


@runs(Extract, lane="compute", resumes="start")
def run_extract(
    operation: Extract, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, ExtractionRecord]:
    assert context.job.subject
    slug = context.job.subject.partition("/")[2]
    # The name is this job's alone: what has it was made before the engine was killed.
    if engine.store.exists(ExtractionRecord, slug):
        record = engine.store.get(ExtractionRecord, slug)
    else:
        record = yield from _extract(operation, engine, slug)
    with Knowledge.of(engine, operation.sae) as known:
        yield from index_features(engine, known, known.alive())
    return record


def _extract(operation: Extract, engine: Engine, slug: str) -> Generator[Progress, Signal, ExtractionRecord]:
    """The pass and the lens, written down as the SAE's current extraction."""
    sae_record = engine.store.get(SAERecord, operation.sae)
    model = fitting_model(engine, sae_record)
    tokens = tokens_of(engine, operation.dataset, sae_record)
    folder = engine.home / "extractions" / slug
    shutil.rmtree(folder, ignore_errors=True)  # what an attempt that was killed left
    folder.mkdir(parents=True)
    try:
        with language_model(engine, model.slug) as lm, sparse_autoencoder(engine, sae_record.slug) as sae:
            needed = working_bytes(sae.cfg.d_sae, n_examples=operation.n_examples)
            with engine.memory.reserve(f"Extracting {sae_record.slug}", needed, device="cpu"):
                work = extract(
                    lm,
                    sae,
                    open_tokens(engine, tokens),
                    sae_record.hook_name,
                    folder / DATA_FOLDER,
                    n_tokens=operation.n_tokens,
                    n_examples=operation.n_examples,
                    features=operation.features,
                    min_activation=operation.min_activation,
                    seed=operation.seed,
                    provenance={"sae": sae_record.sha256, "model": model.sha256, "tokens": tokens.sha256},
                )
                extraction = yield from _within(work, 0.0, PASS)
            yield from _lens(lm, sae, sae_record.hook_name, extraction, folder / LOGITS_FILE)
        info = extraction.info
        record = ExtractionRecord(
            slug=slug,
            sae=sae_record.slug,
            model=model.slug,
            tokens=tokens.slug,
            hook_name=sae_record.hook_name,
            n_tokens=info.n_tokens,
            n_features=info.n_features,
            n_alive=info.n_alive,
            n_dense=info.n_dense,
            settings=info.settings,
            folder=str(folder.relative_to(engine.home)),
            sha256=sha256_folder(folder),
        )
        with engine.store.transaction():
            engine.store.put(record)
            engine.store.update(SAERecord, sae_record.slug, extraction=slug)
    except BaseException:
        if not engine.store.exists(ExtractionRecord, slug):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return record


def _within(work: Any, start: float, end: float) -> Generator[Progress, Signal, Any]:
    """A part's progress as a share of the whole job, from `start` to `end`."""

    def say(step: Any) -> Progress:
        fraction = start + (end - start) * (step.fraction or 0.0)
        return Progress(stage=getattr(step, "stage", "logit lens"), fraction=fraction)

    return relay(work, say)


def _lens(
    lm: LanguageModel, sae: SAE, hook_name: str, extraction: ExtractionStore, path: Path
) -> Generator[Progress, Signal, None]:
    """Write what every extracted feature promotes; nothing where it does not write into the residual stream."""
    W_U, gain = unembedding(lm)
    site = parse_hook(sae.cfg.hook_name_out or hook_name).site
    if site not in RESIDUAL_SITES or sae.cfg.output_width != W_U.shape[1]:
        return
    rows = sae.W_dec[torch.from_numpy(extraction.indices.copy())]
    work = logit_lens(rows, W_U, gain, k=min(LOGITS_KEPT, W_U.shape[0]))
    write_logits(path, (yield from _within(work, PASS, LENS)))


@handles(ListExtractions)
def list_extractions(operation: ListExtractions, engine: Engine) -> Page[ExtractionRecord]:
    where = {"sae": operation.sae} if operation.sae else {}
    return engine.store.page(ExtractionRecord, where=where, limit=operation.limit, cursor=operation.cursor)


@handles(ShowExtraction)
def show_extraction(operation: ShowExtraction, engine: Engine) -> ExtractionRecord:
    return engine.store.get(ExtractionRecord, operation.extraction.removeprefix("extraction/"))
