"""Handlers of api/operations/datasets.py: text comes in, is tokenised and looked at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mistudio_engine.api.errors import BadInput, Conflict, NotFound
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.datasets import (
    DatasetSamples,
    DatasetStatistics,
    Deleted,
    DeleteDataset,
    DownloadDataset,
    GetDataset,
    ListDatasets,
    Sample,
    SamplePage,
    ShowDataset,
    TokenizeDataset,
    TokenStatistics,
)
from mistudio_engine.api.records import DatasetRecord, ModelRecord, Page, Plan, TokensRecord, TrainingRecord
from mistudio_engine.demo.embedded import SAE_SEED, corpus
from mistudio_engine.handlers.models import remove_folder
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.relay import relay
from mistudio_engine.handlers.resources import EMBEDDED, free_slug, one_at_a_time, open_tokens, read_source
from mistudio_engine.models import datasets
from mistudio_engine.models.checkpoint import load_tokenizer
from mistudio_engine.models.tokens import PackProgress, pack, tokens_key
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import atomic_folder, slugify
from mistudio_engine.runtime.jobs import JobContext

EMBEDDED_DOCUMENTS = 2000
"""Documents of the embedded corpus; about 400,000 tokens."""

SAMPLE_CHARACTERS = 4000
"""More of one document is cut in a sample, and the answer says so."""


@plans(GetDataset)
def plan_get_dataset(operation: GetDataset, engine: Engine) -> Planned:
    source = read_source(operation.source, "dataset")
    slug = operation.name or slugify(Path(operation.source).stem)
    details: dict[str, Any] = {}
    if operation.model is not None:
        _check_context(engine.store.get(ModelRecord, operation.model), operation.context_size)
    if source.path is not None:
        field = datasets.find_text_field(source.path, **_which(operation))
        details = {"text_field": field, "n_bytes": _size(source.path)}
    elif source.hub_id is not None and operation.dry_run:
        details = {"n_bytes": engine.hub.size("dataset", source.hub_id, operation.revision)}
    disk = details.get("n_bytes", 0) if source.kind == "hub" else 0
    summary = f"Bring in {operation.source} as dataset/{slug}"
    summary += f" and tokenise it for model/{operation.model}." if operation.model else "."
    return Planned(Plan(summary=summary, disk_bytes=disk, details=details), subject=f"dataset/{slug}")


def _which(operation: GetDataset) -> dict[str, Any]:
    return {"text_field": operation.text_field, "split": operation.split, "config": operation.config}


def _size(path: Path) -> int:
    return sum(n_bytes for _, n_bytes, _ in datasets.stamp(path))


def _check_context(model: ModelRecord, context_size: int) -> None:
    if model.n_ctx and context_size > model.n_ctx:
        raise BadInput(
            f"context_size {context_size} is longer than the {model.n_ctx} tokens that {model.ref} can read.",
            fix=f"Use at most {model.n_ctx}.",
        )


@runs(GetDataset, lane="io")
def run_get_dataset(
    operation: GetDataset, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, DatasetRecord]:
    assert context.job.subject
    slug = context.job.subject.partition("/")[2]
    record = yield from one_at_a_time(engine, context.job.subject, lambda: _bring_in(operation, engine, slug))
    if operation.model is not None:
        settings = TokenizeDataset(
            dataset=slug,
            model=operation.model,
            context_size=operation.context_size,
            bos_policy=operation.bos_policy,
            n_tokens=operation.n_tokens,
        )
        yield from tokenize(settings, engine)
        record = engine.store.get(DatasetRecord, slug)
    return record


def _same_dataset(record: DatasetRecord, operation: GetDataset) -> DatasetRecord:
    asked = {"source": _source(operation), "config": operation.config, "revision": operation.revision}
    if record.split is not None:
        asked["split"] = operation.split
    if operation.text_field is not None:
        asked["text_field"] = operation.text_field
    other = [f"{name} {getattr(record, name)!r}" for name, value in asked.items() if getattr(record, name) != value]
    if other:
        raise Conflict(
            f"{record.ref} exists already, with {' and '.join(other)}.",
            fix="Give the new one another name, or delete the old one.",
            next_call=("get_dataset", {"source": operation.source, "name": f"{record.slug}-2"}),
        )
    return record


def _source(operation: GetDataset) -> str:
    """Where its text is, wherever a later engine is started."""
    return str(read_source(operation.source, "dataset").path or operation.source)


def _bring_in(operation: GetDataset, engine: Engine, slug: str) -> Generator[Progress, Signal, DatasetRecord]:
    source = read_source(operation.source, "dataset")
    if engine.store.exists(DatasetRecord, slug):
        record = _same_dataset(engine.store.get(DatasetRecord, slug), operation)
        if source.kind == "local":
            yield from check_unchanged(engine, record)
        return record
    has_splits = source.kind == "hub" or (source.path is not None and source.path.is_dir())
    record = DatasetRecord(
        slug=slug,
        source=_source(operation),
        config=operation.config,
        split=operation.split if has_splits else None,
        revision=operation.revision,
    )
    path = source.path
    if source.kind == "embedded":
        path = yield from _written_corpus(engine.home / "datasets" / slug)
        record.folder = str(path.relative_to(engine.home))
    if source.hub_id is not None:
        target = engine.home / "datasets" / slug
        shutil.rmtree(target, ignore_errors=True)  # of an engine that died between the download and its record
        path = yield from engine.hub.download("dataset", source.hub_id, target, revision=operation.revision)
        record.folder = str(path.relative_to(engine.home))
    assert path is not None
    try:
        yield Progress(stage="reading documents")
        record.text_field = datasets.find_text_field(path, **_which(operation))
        record.n_documents = yield from _count(datasets.read_documents(path, **_which(operation)))
        record.n_bytes, record.sha256 = _size(path), (yield from hashed(path))
    except Exception:
        if source.kind != "local":  # what cannot be read is not kept
            shutil.rmtree(path, ignore_errors=True)
        raise
    return engine.store.insert(record)


def _written_corpus(folder: Path) -> Generator[Progress, Signal, Path]:
    """The embedded corpus as a file, generated from its seed."""
    yield Progress(stage="writing the corpus")
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as part, (part / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for document in corpus(EMBEDDED_DOCUMENTS, SAE_SEED):
            file.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
    return folder


def _count(documents: Iterable[str]) -> Generator[Progress, Signal, int]:
    n_documents = 0
    for n_documents, _ in enumerate(documents, start=1):
        if n_documents % 10_000 == 0:
            yield Progress(stage=f"reading documents: {n_documents:,}")
    return n_documents


@plans(TokenizeDataset)
def plan_tokenize(operation: TokenizeDataset, engine: Engine) -> Planned:
    dataset = engine.store.get(DatasetRecord, operation.dataset)
    model = engine.store.get(ModelRecord, operation.model)
    _check_context(model, operation.context_size)
    n_tokens = operation.n_tokens or dataset.n_bytes // 3
    plan = Plan(
        summary=f"Tokenise {dataset.ref} for {model.ref} in contexts of {operation.context_size}.",
        disk_bytes=4 * n_tokens,
    )
    return Planned(plan, subject=dataset.ref)


@runs(TokenizeDataset, lane="io")
def run_tokenize(
    operation: TokenizeDataset, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, TokensRecord]:
    return (yield from tokenize(operation, engine))


def tokenize(operation: TokenizeDataset, engine: Engine) -> Generator[Progress, Signal, TokensRecord]:
    """Pack a dataset for a model, or answer the tokenisation with these settings that is there already."""
    dataset = engine.store.get(DatasetRecord, operation.dataset)
    model = engine.store.get(ModelRecord, operation.model)
    tokenizer = load_tokenizer(engine.home / model.folder)
    settings = {
        "context_size": operation.context_size,
        "bos_policy": operation.bos_policy,
        "n_tokens": operation.n_tokens,
        "text_field": dataset.text_field,
    }
    key = tokens_key(f"{dataset.source}@{dataset.revision}:{dataset.sha256}", tokenizer, settings)
    slug = f"{dataset.slug[:60]}-{model.slug[:40]}-{key[:8]}"
    work = partial(_packed, operation, engine, slug, tokenizer)
    return (yield from one_at_a_time(engine, f"tokens/{slug}", work))


def _packed(
    operation: TokenizeDataset, engine: Engine, slug: str, tokenizer: Any
) -> Generator[Progress, Signal, TokensRecord]:
    dataset = engine.store.get(DatasetRecord, operation.dataset)
    model = engine.store.get(ModelRecord, operation.model)
    if engine.store.exists(TokensRecord, slug):
        return engine.store.get(TokensRecord, slug)
    path = _path(engine, dataset)
    before = datasets.stamp(path)
    yield from check_unchanged(engine, dataset)
    folder = engine.home / "datasets" / "tokens" / slug
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # of an engine that died between writing it and its record
    packing = pack(
        documents_of(engine, dataset),
        tokenizer,
        folder,
        context_size=operation.context_size,
        bos_policy=operation.bos_policy,
        n_tokens=operation.n_tokens,
        n_ctx=model.n_ctx or None,
    )
    info = yield from relay(packing, partial(_progress, dataset))
    if datasets.stamp(path) != before:
        shutil.rmtree(folder)
        raise _changed(engine, dataset)
    digest = yield from hashed(folder / "tokens.safetensors")
    record = TokensRecord(
        slug=slug,
        dataset=dataset.slug,
        model=model.slug,
        context_size=info.context_size,
        bos_policy=info.bos_policy,
        n_tokens=info.n_tokens,
        n_contexts=info.n_contexts,
        n_documents=info.n_documents,
        folder=str(folder.relative_to(engine.home)),
        sha256=digest,
    )
    with engine.store.transaction():
        engine.store.insert(record)
        others = engine.store.get(DatasetRecord, dataset.slug).tokens  # more may have come while this one was made
        engine.store.update(DatasetRecord, dataset.slug, tokens=[*others, slug])
    return record


def _progress(dataset: DatasetRecord, step: PackProgress) -> Progress:
    fraction = step.fraction
    if fraction is None and dataset.n_documents:
        fraction = min(1.0, step.n_documents / dataset.n_documents)
    return Progress(stage="tokenising", fraction=fraction, metrics=None)


def check_unchanged(engine: Engine, dataset: DatasetRecord) -> Generator[Progress, Signal, None]:
    """Refuse text that is no longer what the record says: its tokens would go under the hash of another text.

    Raises:
        Conflict: it has changed.
    """
    if (yield from hashed(_path(engine, dataset))) != dataset.sha256:
        raise _changed(engine, dataset)


def hashed(path: Path) -> Generator[Progress, Signal, str]:
    """The hash of a file or folder."""
    return (yield from relay(datasets.hashing(path), lambda share: Progress(stage=f"hashing: {share:.0%}")))


def _changed(engine: Engine, dataset: DatasetRecord) -> Conflict:
    name = free_slug(engine, dataset.slug, DatasetRecord)
    return Conflict(
        f"The text of {dataset.ref} has changed since it was brought in.",
        why=f"What is at {_path(engine, dataset)} now does not have the recorded SHA-256, {dataset.sha256}.",
        fix="Bring it in under a new name, or delete the dataset first; what was made of the old text stays as it is.",
        next_call=("get_dataset", {"source": dataset.source, "name": name}),
    )


def documents_of(engine: Engine, dataset: DatasetRecord) -> Iterator[str]:
    """The documents of a dataset, wherever they come from."""
    path = _path(engine, dataset)
    return datasets.read_documents(path, text_field=dataset.text_field, split=dataset.split, config=dataset.config)


def _path(engine: Engine, dataset: DatasetRecord) -> Path:
    path = engine.home / dataset.folder if dataset.folder else Path(dataset.source).expanduser()
    if not path.exists():
        raise NotFound(
            f"The text of {dataset.ref} is no longer at {path}.",
            fix="Put it back, or delete the dataset and bring it in anew.",
        )
    return path


@plans(DownloadDataset)
def plan_download_dataset(operation: DownloadDataset, engine: Engine) -> Planned:
    record = engine.store.get(DatasetRecord, operation.dataset)
    if not record.folder or record.source == EMBEDDED:
        raise BadInput(
            f"{record.ref} was not downloaded: its source is {record.source}.", fix="There is nothing to fetch again."
        )
    return Planned(Plan(summary=f"Fetch {record.source} again."), subject=record.ref)


@runs(DownloadDataset, lane="io")
def run_download_dataset(
    operation: DownloadDataset, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, DatasetRecord]:
    record = engine.store.get(DatasetRecord, operation.dataset)
    target = engine.home / record.folder
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    yield from engine.hub.download("dataset", record.source, fresh, revision=record.revision)
    which = {"text_field": record.text_field, "split": record.split, "config": record.config}
    n_documents = yield from _count(datasets.read_documents(fresh, **which))
    n_bytes, digest = _size(fresh), (yield from hashed(fresh))
    # Last and in one step: whoever ends it before leaves the text that the record describes.
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return engine.store.update(DatasetRecord, record.slug, n_documents=n_documents, n_bytes=n_bytes, sha256=digest)


@handles(ListDatasets)
def list_datasets(operation: ListDatasets, engine: Engine) -> Page[DatasetRecord]:
    return engine.store.page(DatasetRecord, query=operation.query, limit=operation.limit, cursor=operation.cursor)


@handles(ShowDataset)
def show_dataset(operation: ShowDataset, engine: Engine) -> DatasetRecord:
    return engine.store.get(DatasetRecord, operation.dataset)


@handles(DeleteDataset)
def delete_dataset(operation: DeleteDataset, engine: Engine) -> Deleted:
    record = engine.store.get(DatasetRecord, operation.dataset)
    tokens = [engine.store.get(TokensRecord, slug) for slug in record.tokens]
    users = [
        each.ref
        for one in tokens
        for each in engine.store.all(TrainingRecord, tokens=one.slug)
        if each.status in ("pending", "running", "paused")
    ]
    if users:
        raise Conflict(f"{record.ref} is being used by {', '.join(users)}.", fix="Stop that first.")
    with engine.store.transaction():
        for each in tokens:
            engine.store.delete(TokensRecord, each.slug)
        engine.store.delete(DatasetRecord, record.slug)
    folders = [record.folder, *(each.folder for each in tokens), *(f"activations/{each.slug}" for each in tokens)]
    freed = sum(remove_folder(engine, folder) for folder in folders)
    return Deleted(ref=record.ref, freed_bytes=freed, also=[each.ref for each in tokens])


@handles(DatasetStatistics)
def dataset_statistics(operation: DatasetStatistics, engine: Engine) -> TokenStatistics:
    dataset = engine.store.get(DatasetRecord, operation.dataset)
    if not dataset.tokens:
        raise NotFound(
            f"{dataset.ref} has not been tokenised, so there are no tokens to count.",
            fix="Tokenise it for a model first.",
            next_call=("get_dataset", {"source": dataset.source, "name": dataset.slug, "model": "MODEL"}),
        )
    if operation.tokens is not None and operation.tokens not in dataset.tokens:
        raise NotFound.of("tokens", operation.tokens, dataset.tokens)
    record = engine.store.get(TokensRecord, operation.tokens or dataset.tokens[-1])
    tokenizer = load_tokenizer(engine.home / engine.store.get(ModelRecord, record.model).folder)
    return TokenStatistics(
        tokens=record.slug,
        n_tokens=record.n_tokens,
        n_contexts=record.n_contexts,
        n_documents=record.n_documents,
        context_size=record.context_size,
        bos_policy=record.bos_policy,
        statistics=datasets.statistics(open_tokens(engine, record), tokenizer),
    )


@handles(DatasetSamples)
def dataset_samples(operation: DatasetSamples, engine: Engine) -> SamplePage:
    record = engine.store.get(DatasetRecord, operation.dataset)
    texts: list[str] = []
    for index, text in enumerate(documents_of(engine, record)):
        if index >= operation.offset + operation.limit:
            break
        if index >= operation.offset:
            texts.append(text)
    rows = [
        Sample(index=operation.offset + n, text=text[:SAMPLE_CHARACTERS], truncated=len(text) > SAMPLE_CHARACTERS)
        for n, text in enumerate(texts)
    ]
    more = operation.offset + len(rows) < record.n_documents
    return SamplePage(
        rows=rows,
        total=record.n_documents,
        shown=len(rows),
        next_cursor=str(operation.offset + len(rows)) if more else None,
    )
