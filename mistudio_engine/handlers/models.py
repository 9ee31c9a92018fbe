"""Handlers of api/operations/models.py: language models come in, are looked at, and go."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

from mistudio_engine.api.errors import BadInput, Conflict, OutOfMemory
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.datasets import Deleted
from mistudio_engine.api.operations.models import (
    Architecture,
    DeleteModel,
    DownloadModel,
    GetModel,
    ListModels,
    ModelArchitecture,
    ShowModel,
    Unloaded,
    UnloadModel,
)
from mistudio_engine.api.records import ModelRecord, Page, Plan, SAERecord, TokensRecord
from mistudio_engine.demo.embedded import model_folder
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.resources import EMBEDDED, Source, language_model, one_at_a_time, read_source
from mistudio_engine.models.checkpoint import read_config
from mistudio_engine.models.language_model import LanguageModel, architecture, n_params, weight_bytes
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import sha256_file, slugify
from mistudio_engine.runtime.jobs import JobContext


@plans(GetModel)
def plan_get_model(operation: GetModel, engine: Engine) -> Planned:
    source = read_source(operation.source, "model")
    slug = operation.name or slugify(Path(operation.source).name)
    # Asking the hub takes seconds: only somebody who asked for the plan waits for it.
    asked = source.hub_id if operation.dry_run else None
    config = engine.hub.config("model", asked, operation.revision) if asked else None
    if source.hub_id is None:
        config = read_config(_local_folder(source))
    needed = weight_bytes(config, operation.precision) if config else 0
    if config and needed > engine.memory.capacity(engine.device):
        raise OutOfMemory.of(
            f"{operation.source} in {operation.precision}",
            needed,
            engine.memory.capacity(engine.device),
            "Choose a smaller model, or a smaller precision where the device has one (bf16, int8, nf4).",
        )
    plan = Plan(
        summary=f"Bring in {operation.source} as model/{slug} in {operation.precision}.",
        memory_bytes=needed,
        disk_bytes=engine.hub.size("model", asked, operation.revision) if asked else 0,
        details={"n_params": n_params(config)} if config else {},
    )
    return Planned(plan, subject=f"model/{slug}")


@runs(GetModel, lane="io")
def run_get_model(operation: GetModel, engine: Engine, context: JobContext) -> Generator[Progress, Signal, ModelRecord]:
    assert context.job.subject
    slug = context.job.subject.partition("/")[2]
    return (yield from one_at_a_time(engine, context.job.subject, lambda: _bring_in(operation, engine, slug)))


def _bring_in(operation: GetModel, engine: Engine, slug: str) -> Generator[Progress, Signal, ModelRecord]:
    known = _same_model(engine, slug, operation)
    if known is not None:
        return known
    source = read_source(operation.source, "model")
    folder = yield from _fetch(engine, source, slug, operation.revision)
    try:
        return (yield from _admit(engine, operation, slug, folder))
    except Exception:
        # What cannot be used is not kept; a folder of the user's own is not touched.
        if source.kind == "hub":
            shutil.rmtree(engine.home / "models" / slug, ignore_errors=True)
        raise


def _same_model(engine: Engine, slug: str, operation: GetModel) -> ModelRecord | None:
    if not engine.store.exists(ModelRecord, slug):
        return None
    record = engine.store.get(ModelRecord, slug)
    if (record.source, record.revision, record.precision) == (
        operation.source,
        operation.revision,
        operation.precision,
    ):
        return record
    raise Conflict(
        f"model/{slug} exists already: {record.source} in {record.precision}.",
        fix="Give the new one another name, or delete the old one.",
        next_call=("get_model", {"source": operation.source, "name": f"{slug}-2", "precision": operation.precision}),
    )


def _fetch(engine: Engine, source: Source, slug: str, revision: str | None) -> Generator[Progress, Signal, Path]:
    if source.hub_id is None:
        return _local_folder(source)
    target = engine.home / "models" / slug
    shutil.rmtree(target, ignore_errors=True)  # of an engine that died between the download and its record
    return (yield from engine.hub.download("model", source.hub_id, target, revision=revision))


def _local_folder(source: Source) -> Path:
    if source.path is None:
        return model_folder()
    if not source.path.is_dir():
        raise BadInput(f"{source.path} is a file.", fix="Give the folder that config.json and *.safetensors lie in.")
    return source.path


def _admit(engine: Engine, operation: GetModel, slug: str, folder: Path) -> Generator[Progress, Signal, ModelRecord]:
    """Load the model once, which proves that it works, and write its record."""
    yield Progress(stage="hashing weights")
    weights = sorted(folder.glob("*.safetensors"))
    digest = ",".join(sha256_file(path) for path in weights)
    config = read_config(folder)
    record = ModelRecord(
        slug=slug,
        source=operation.source,
        revision=operation.revision,
        precision=operation.precision,
        n_bytes=weight_bytes(config, operation.precision),
        n_params=n_params(config),
        folder=str(folder.relative_to(engine.home)) if folder.is_relative_to(engine.home) else str(folder),
        sha256=digest,
    )
    yield Progress(stage="loading", fraction=0.9)
    described = engine.compute.run(partial(_described, engine, record, folder))
    return engine.store.insert(described)


def _described(engine: Engine, record: ModelRecord, folder: Path) -> ModelRecord:
    def load() -> LanguageModel:
        return LanguageModel.load(folder, name=record.slug, precision=record.precision, device=engine.device)  # type: ignore[arg-type]

    with engine.memory.resident(record.ref, record.n_bytes, load, device=engine.device) as model:
        return record.model_copy(
            update={
                "family": model.hf.config.model_type,
                "n_layers": model.n_layers,
                "d_model": model.d_model,
                "d_vocab": model.d_vocab,
                "n_ctx": model.n_ctx,
            }
        )


@handles(ListModels)
def list_models(operation: ListModels, engine: Engine) -> Page[ModelRecord]:
    return engine.store.page(ModelRecord, query=operation.query, limit=operation.limit, cursor=operation.cursor)


@handles(ShowModel)
def show_model(operation: ShowModel, engine: Engine) -> ModelRecord:
    return engine.store.get(ModelRecord, operation.model)


@handles(DeleteModel)
def delete_model(operation: DeleteModel, engine: Engine) -> Deleted:
    record = engine.store.get(ModelRecord, operation.model)
    users = [each.ref for each in engine.store.all(SAERecord, model=record.slug)]
    users += [each.ref for each in engine.store.all(TokensRecord, model=record.slug)]
    if users:
        raise Conflict(
            f"{record.ref} is still needed by {', '.join(users[:5])}{', …' if len(users) > 5 else ''}.",
            fix="Delete those first.",
        )
    _let_go(engine, record.ref)
    engine.store.delete(ModelRecord, record.slug)
    # A folder that was brought in stays, even where it lies in the data directory.
    freed = remove_folder(engine, record.folder) if record.folder == f"models/{record.slug}" else 0
    return Deleted(ref=record.ref, freed_bytes=freed)


def _let_go(engine: Engine, ref: str) -> None:
    """Take it out of memory if it is there; Conflict while somebody works with it."""
    if any(each.key == ref for each in engine.memory.loaded()):
        engine.compute.run(partial(engine.memory.unload, ref))


def remove_folder(engine: Engine, folder: str) -> int:
    """Remove a folder of ours and say how many bytes that freed; one outside the data directory stays."""
    path = engine.home / folder
    if not folder or not path.is_relative_to(engine.home) or not path.exists():
        return 0
    n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path, ignore_errors=True)
    return n_bytes


@plans(DownloadModel)
def plan_download_model(operation: DownloadModel, engine: Engine) -> Planned:
    record = engine.store.get(ModelRecord, operation.model)
    _require_hub(record.source, record.ref)
    return Planned(Plan(summary=f"Fetch {record.source} again."), subject=record.ref)


def _require_hub(source: str, ref: str) -> None:
    if source == EMBEDDED or Path(source).expanduser().exists():
        raise BadInput(f"{ref} was not downloaded: its source is {source}.", fix="There is nothing to fetch again.")


@runs(DownloadModel, lane="io")
def run_download_model(
    operation: DownloadModel, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, ModelRecord]:
    record = engine.store.get(ModelRecord, operation.model)
    target = engine.home / "models" / record.slug
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    yield from engine.hub.download("model", record.source, fresh, revision=record.revision)
    _let_go(engine, record.ref)  # what lies in memory are the old weights
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    digest = ",".join(sha256_file(path) for path in sorted(target.glob("*.safetensors")))
    return engine.store.update(ModelRecord, record.slug, sha256=digest)


@handles(ModelArchitecture)
def model_architecture(operation: ModelArchitecture, engine: Engine) -> Architecture:
    def look() -> dict[str, Any]:
        with language_model(engine, operation.model) as model:
            return architecture(model)

    engine.store.get(ModelRecord, operation.model)
    return Architecture(model=operation.model, **engine.compute.run(look))


@handles(UnloadModel)
def unload_model(operation: UnloadModel, engine: Engine) -> Unloaded:
    record = engine.store.get(ModelRecord, operation.model)
    loaded = [each for each in engine.memory.loaded() if each.key == record.ref]
    if loaded:
        engine.compute.run(partial(engine.memory.unload, record.ref))
    return Unloaded(model=record.slug, freed_bytes=sum(each.n_bytes for each in loaded))
