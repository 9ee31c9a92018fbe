"""Handlers of api/operations/saes.py: SAEs come in, are judged, converted, and go."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from functools import partial
from pathlib import Path

from mistudio_engine.api.errors import BadInput, Conflict, NotFound
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.datasets import Deleted
from mistudio_engine.api.operations.saes import (
    Config,
    ConvertSAE,
    DeleteSAE,
    EvalSAE,
    GetSAE,
    ListSAEs,
    ShowSAE,
    ShowSAEConfig,
)
from mistudio_engine.api.records import (
    Evaluation,
    ExtractionRecord,
    Job,
    ModelRecord,
    Page,
    Plan,
    SAERecord,
    TrainingRecord,
)
from mistudio_engine.handlers.directions import forget_directions
from mistudio_engine.handlers.models import remove_folder
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.relay import relay
from mistudio_engine.handlers.resources import (
    check_fit,
    fitting_model,
    free_slug,
    language_model,
    open_tokens,
    read_source,
    sparse_autoencoder,
    tokens_of,
)
from mistudio_engine.handlers.search_index import drop_features
from mistudio_engine.models.hooks import parse_hook
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import hashing_folder, safe_path, sha256_folder, slugify
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import SAE, detect_format, format_for, load_sae, save_sae
from mistudio_engine.training.evaluation import evaluate

FORMATS = {"saelens": "saelens", "mistudio": "native"}
"""The documents' names of formats, and ours."""


@plans(GetSAE)
def plan_get_sae(operation: GetSAE, engine: Engine) -> Planned:
    source = read_source(operation.source, "SAE")
    if source.kind == "embedded":
        raise BadInput("There is no embedded SAE.", fix="Train one on the embedded model with train_sae.")
    if source.path is not None:
        detect_format(_inside(source.path, operation.path))
    elif operation.path:
        safe_path(engine.home, operation.path)  # refused before anything is fetched
    if operation.model is not None:
        engine.store.get(ModelRecord, operation.model)
    if operation.hook_name is not None:
        parse_hook(operation.hook_name)
    stem = operation.name or slugify("-".join(part for part in (Path(operation.source).name, operation.path) if part))
    disk = 0
    if source.hub_id is not None and operation.dry_run:
        disk = engine.hub.size("sae", source.hub_id, operation.revision, operation.path or None)
    # A training has the name of the SAE that it will make.
    slug = free_slug(engine, stem, SAERecord, TrainingRecord, exact=operation.name is not None)
    return Planned(Plan(summary=f"Bring in {operation.source} as sae/{slug}.", disk_bytes=disk), subject=f"sae/{slug}")


def _inside(folder: Path, path: str) -> Path:
    return safe_path(folder, path) if path else folder


@runs(GetSAE, lane="io")
def run_get_sae(operation: GetSAE, engine: Engine, context: JobContext) -> Generator[Progress, Signal, SAERecord]:
    assert context.job.subject
    slug = context.job.subject.partition("/")[2]
    source = read_source(operation.source, "SAE")
    origin = "/".join(part for part in (operation.source, operation.path) if part)
    if engine.store.exists(SAERecord, slug):
        return _same_sae(engine.store.get(SAERecord, slug), origin)
    target = engine.home / "saes" / slug
    fetched: Path | None = None
    if source.hub_id is not None:
        fetched = engine.home / "saes" / f"{slug}.download"
        shutil.rmtree(fetched, ignore_errors=True)
        yield from engine.hub.download(
            "sae", source.hub_id, fetched, revision=operation.revision, path=operation.path or None
        )
        folder = _inside(fetched, operation.path)
    else:
        assert source.path is not None
        folder = _inside(source.path, operation.path)
    try:
        yield Progress(stage="checking", fraction=0.9)
        found = detect_format(folder)
        sae = load_sae(folder)
        hook_name = operation.hook_name or sae.cfg.hook_name
        model = operation.model or _model_of(engine, sae)
        if model is not None and hook_name is not None:
            engine.compute.run(partial(_check, engine, model, hook_name, sae))
        layer = parse_hook(hook_name).layer if hook_name else None
        # The weights say the same as the record: who measures a feature's activation looks there.
        sae.cfg = sae.cfg.model_copy(update={"hook_name": hook_name})
        form = format_for(sae.cfg.architecture)  # whatever it came as
        provenance = {"source": operation.source, "path": operation.path, "revision": operation.revision}
        save_sae(sae, target, format=form, provenance=provenance, replace=True)
    finally:
        if fetched is not None:
            shutil.rmtree(fetched, ignore_errors=True)
    try:
        sha256 = yield from relay(hashing_folder(target), _hashing)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return engine.store.insert(
        SAERecord(
            slug=slug,
            source="huggingface" if source.kind == "hub" else "upload",
            origin=origin,
            model=model or sae.cfg.model_name,
            hook_name=hook_name or "",
            layer=layer,
            architecture=sae.cfg.architecture,
            d_in=sae.cfg.d_in,
            d_sae=sae.cfg.d_sae,
            format=form,
            source_format=found,
            folder=str(target.relative_to(engine.home)),
            sha256=sha256,
            config=sae.cfg.model_dump(mode="json"),
        )
    )


def _hashing(share: float) -> Progress:
    return Progress(stage="hashing", fraction=0.9 + 0.1 * share)


def _same_sae(record: SAERecord, origin: str) -> SAERecord:
    """The SAE that is there under our name already, when it is ours: the engine was killed after writing it."""
    if record.origin == origin:
        return record
    raise Conflict(f"{record.ref} exists already, from {record.origin or 'a training'}.", fix="Give another name.")


def _model_of(engine: Engine, sae: SAE) -> str | None:
    """The model here that the SAE's config names: by its slug, or by the last part of its source."""
    name = (sae.cfg.model_name or "").rpartition("/")[2].lower()
    for record in engine.store.all(ModelRecord):
        if name and name in (record.slug.lower(), record.source.rpartition("/")[2].lower()):
            return record.slug
    return None


def _check(engine: Engine, model: str, hook_name: str, sae: SAE) -> None:
    with language_model(engine, model) as lm:
        check_fit(lm, hook_name, sae.cfg.d_in)


@handles(ListSAEs)
def list_saes(operation: ListSAEs, engine: Engine) -> Page[SAERecord]:
    names = ("source", "model", "layer", "architecture")
    where = {name: value for name in names if (value := getattr(operation, name)) is not None}
    return engine.store.page(
        SAERecord, query=operation.query, where=where, limit=operation.limit, cursor=operation.cursor
    )


@handles(ShowSAE)
def show_sae(operation: ShowSAE, engine: Engine) -> SAERecord:
    return engine.store.get(SAERecord, operation.sae)


@handles(ShowSAEConfig)
def show_sae_config(operation: ShowSAEConfig, engine: Engine) -> Config:
    record = engine.store.get(SAERecord, operation.sae)
    return Config(sae=record.slug, format=record.format, config=record.config)


def _uses(engine: Engine, job: Job, sae: str) -> bool:
    """Does a job work on an SAE, by its own name or as the one that an extraction is of?"""
    if sae in (job.arguments.get("sae"), *(job.arguments.get("also") or ())):
        return True
    kind, _, slug = (job.subject or "").partition("/")
    return kind == "extraction" and any(each.slug == slug for each in engine.store.all(ExtractionRecord, sae=sae))


@handles(DeleteSAE)
def delete_sae(operation: DeleteSAE, engine: Engine) -> Deleted:
    record = engine.store.get(SAERecord, operation.sae)
    busy = [job.ref for job in engine.jobs.active() if _uses(engine, job, record.slug)]
    if busy:
        raise Conflict(f"{record.ref} is being used by {', '.join(busy)}.", fix="Cancel that first.")
    if any(each.key == record.ref for each in engine.memory.loaded()):
        engine.compute.run(partial(engine.memory.unload, record.ref))
    extractions = engine.store.all(ExtractionRecord, sae=record.slug)
    with engine.store.transaction():
        for each in extractions:
            engine.store.delete(ExtractionRecord, each.slug)
        engine.store.delete_labels(record.slug)
        engine.store.delete(SAERecord, record.slug)
    drop_features(engine, record.slug)
    forget_directions(engine, record.slug)
    freed = sum(remove_folder(engine, each.folder) for each in extractions) + remove_folder(engine, record.folder)
    return Deleted(ref=record.ref, freed_bytes=freed, also=[each.ref for each in extractions])


@handles(ConvertSAE)
def convert_sae(operation: ConvertSAE, engine: Engine) -> SAERecord:
    record = engine.store.get(SAERecord, operation.sae)
    form = FORMATS[operation.format]
    stem = operation.name or f"{record.slug}-{operation.format}"
    slug = free_slug(engine, stem, SAERecord, TrainingRecord, exact=operation.name is not None)
    folder = engine.home / "saes" / slug
    save_sae(load_sae(engine.home / record.folder), folder, format=form, replace=True)  # which needs no device
    changes = {
        "slug": slug,
        "created_at": 0.0,
        "format": form,
        "folder": str(folder.relative_to(engine.home)),
        "sha256": sha256_folder(folder),
        "extraction": None,
        "n_labelled": 0,
    }
    return engine.store.insert(record.model_copy(update=changes))


@plans(EvalSAE)
def plan_eval_sae(operation: EvalSAE, engine: Engine) -> Planned:
    record = engine.store.get(SAERecord, operation.sae)
    model = fitting_model(engine, record)
    tokens = tokens_of(engine, operation.dataset, record)
    if tokens.model != model.slug:
        raise BadInput(
            f"{tokens.ref} was made for model/{tokens.model} and {record.ref} reads {model.ref}.",
            fix="Give a dataset that was tokenised for the SAE's own model.",
        )
    plan = Plan(
        summary=f"Evaluate {record.ref} on {operation.n_tokens:,} tokens of {tokens.ref}.", memory_bytes=model.n_bytes
    )
    return Planned(plan, subject=record.ref)


@runs(EvalSAE, lane="compute", resumes="start")
def run_eval_sae(operation: EvalSAE, engine: Engine, context: JobContext) -> Generator[Progress, Signal, Evaluation]:
    record = engine.store.get(SAERecord, operation.sae)
    model = fitting_model(engine, record)
    tokens = tokens_of(engine, operation.dataset, record)
    with language_model(engine, model.slug) as lm, sparse_autoencoder(engine, record.slug) as sae:
        measured = yield from evaluate(
            lm, sae, open_tokens(engine, tokens), hook_name=record.hook_name, n_tokens=operation.n_tokens
        )
    evaluation = measured.model_copy(update={"tokens": tokens.slug})
    if not engine.store.exists(SAERecord, record.slug):
        raise NotFound.of("sae", record.slug)
    engine.store.update(SAERecord, record.slug, evaluation=evaluation)
    return evaluation
