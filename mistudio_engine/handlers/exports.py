"""Handlers of api/operations/exports.py: files are written from what is known, on the I/O lane."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from mistudio_engine import __version__
from mistudio_engine.api.errors import BadInput, Conflict, NotFound
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.exports import Download
from mistudio_engine.api.operations.exports import CancelExport, DownloadExport, Export, ListExports, ShowExport
from mistudio_engine.api.records import ExportRecord, Job, Page, Plan, SAERecord, TokensRecord
from mistudio_engine.api.refs import FeatureKey
from mistudio_engine.export import feature_json
from mistudio_engine.export.feature_json import ExportOptions, FeatureExport
from mistudio_engine.export.features_json import (
    ExportedExample,
    ExportedFeature,
    estimate_features_bytes,
    write_features,
)
from mistudio_engine.export.studio_zip import ExportProgress, SAEFacts, estimate_bytes, write_zip
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.relay import relay
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import require_free
from mistudio_engine.runtime.jobs import JobContext
from mistudio_engine.saes import save_sae

MEDIA_TYPES = {"zip": "application/zip", "json": "application/json", "json.gz": "application/gzip"}
"""By format, which is the file's ending, too."""

DOCUMENTS_STATES = {"queued": "pending", "running": "computing", "interrupted": "pending", "pausing": "computing"}


@plans(Export)
def plan_export(operation: Export, engine: Engine) -> Planned:
    with Knowledge.of(engine, operation.sae) as known:
        indices = selected(operation, known)
        options = _options(operation)
        size = _size(engine, known, operation, len(indices))
        require_free(engine.home, size, "This export")
        slug = engine.store.new_slug(ExportRecord, f"{operation.sae}-{operation.format}")
        plan = Plan(
            summary=f"Export {len(indices):,} features of {known.sae.ref} as a {operation.format}.",
            disk_bytes=size,
            details={"feature_count": len(indices), "includes": options.model_dump()},
        )
        record = ExportRecord(
            slug=slug,
            sae=operation.sae,
            format=operation.format + (".gz" if operation.compress else ""),
            feature_count=len(indices),
            config=operation.model_dump(mode="json", exclude={"dry_run", "idempotency_key", "wait_s"}),
        )
    return Planned(plan, subject=f"export/{slug}", open=lambda: engine.store.insert(record))


def selected(operation: Export, known: Knowledge) -> list[int]:
    """The indices that an export is asked for, in order.

    Raises:
        BadInput: one lies outside the SAE, or none is left.
    """
    match operation.feature_selection:
        case "all":
            return list(range(known.sae.d_sae))
        case "extracted":
            return sorted(known.alive())
    chosen = set(operation.indices or [])
    if operation.range_start is not None and operation.range_end is not None:
        chosen |= set(range(operation.range_start, operation.range_end + 1))
    beyond = [index for index in sorted(chosen) if index >= known.sae.d_sae]
    if beyond:
        raise BadInput(
            f"{known.sae.ref} has no feature {beyond[0]}.",
            why=f"Its features are 0 to {known.sae.d_sae - 1}.",
            fix="Choose a range within that.",
        )
    return sorted(chosen)


def _options(operation: Export) -> ExportOptions:
    options = {name: getattr(operation, name) for name in ExportOptions.model_fields}
    return ExportOptions(**options | ({"include_saelens_weights": False} if operation.format == "json" else {}))


def _size(engine: Engine, known: Knowledge, operation: Export, n_features: int) -> int:
    """About how many bytes the file will have."""
    if operation.format == "json":
        n_examples = 0
        if known.sae.extraction is not None:  # which kept so many of each kind, at most
            kept = Counter(known.extraction.info.settings)
            of_kinds = (
                kept["n_examples"],
                kept["n_quantiles"] * kept["n_per_quantile"],
                kept["n_random"],
                kept["n_zero"],
            )
            n_examples = sum(min(operation.n_examples, n) for n in of_kinds)
        return estimate_features_bytes(n_features, n_examples=n_examples, window=operation.window)
    return estimate_bytes(
        n_features,
        _options(operation),
        n_examples=operation.n_examples,
        window_tokens=max(1, 2 * operation.window),
        weight_bytes=_weight_bytes(engine, known.sae, operation),
    )


def _weight_bytes(engine: Engine, sae: SAERecord, operation: Export) -> int:
    if not operation.include_saelens_weights:
        return 0
    return sum(file.stat().st_size for file in (engine.home / sae.folder).glob("*.safetensors"))


@runs(Export, lane="io", resumes="start")
def run_export(operation: Export, engine: Engine, context: JobContext) -> Generator[Progress, Signal, ExportRecord]:
    assert context.job.subject
    slug = context.job.subject.partition("/")[2]
    path = _path(engine, engine.store.get(ExportRecord, slug))
    with Knowledge.of(engine, operation.sae) as known:
        indices = selected(operation, known)
        if operation.format == "json":
            head, features = _head(engine, known, operation), _exported(known, indices, operation)
            work = write_features(path, head, features, n_features=len(indices), compress=operation.compress)
        else:
            saelens_folder = engine.home / known.sae.folder
            if operation.include_saelens_weights and known.sae.format != "saelens":
                saelens_folder = yield from _as_saelens(engine, known.sae, context)
            work = write_zip(
                path,
                _facts(engine, known),
                _features(known, indices, operation),
                n_features=len(indices),
                options=_options(operation),
                saelens_folder=saelens_folder if operation.include_saelens_weights else None,
            )
        written = yield from relay(work, partial(_progress, engine, slug, len(indices)))
    return engine.store.update(
        ExportRecord,
        slug,
        status="completed",
        progress=100.0,
        current_stage="Completed",
        output_path=str(written.path),
        file_size_bytes=written.n_bytes,
        sha256=written.sha256,
        feature_count=written.n_features,
        completed_at=time.time(),
    )


def _progress(engine: Engine, slug: str, n_features: int, step: ExportProgress) -> Progress:
    """Of one step; once features are written the record says `packaging`, as the documents have it."""
    if step.n_features == n_features and engine.store.get(ExportRecord, slug).status == "computing":
        engine.store.update(ExportRecord, slug, status="packaging")
    return Progress(stage=step.stage, fraction=step.fraction)


def _path(engine: Engine, record: ExportRecord) -> Path:
    return engine.home / "exports" / f"{record.slug}.{record.format}"


def _as_saelens(engine: Engine, sae: SAERecord, context: JobContext):
    """A SAELens copy of an SAE that is kept in another format."""
    from mistudio_engine.saes import load_sae

    yield Progress(stage="Converting weights", fraction=0.0)
    folder = context.folder / "saelens"
    return save_sae(load_sae(engine.home / sae.folder), folder, replace=True)


def _facts(engine: Engine, known: Knowledge) -> SAEFacts:
    sae = known.sae
    when, provenance = sae.created_at, {"mistudio": __version__, "sae_sha256": sae.sha256}
    if sae.extraction is not None:
        info = known.extraction.info
        when = info.created_at
        provenance |= {"extraction": info.provenance, "settings": info.settings, "n_tokens": info.n_tokens}
    if sae.tokens is not None and engine.store.exists(TokensRecord, sae.tokens):
        provenance["bos_policy"] = engine.store.get(TokensRecord, sae.tokens).bos_policy
    return SAEFacts(
        sae_id=sae.slug,
        sae_name=sae.slug,
        model_name=sae.model or "",
        layer=sae.layer,
        d_in=sae.d_in,
        d_sae=sae.d_sae,
        architecture=sae.architecture,
        export_date=datetime.fromtimestamp(int(when), UTC),
        provenance=provenance,
    )


def _features(known: Knowledge, indices: list[int], operation: Export) -> Iterator[FeatureExport]:
    covered = set(known.extraction.indices.tolist()) if known.sae.extraction is not None else set()
    for index in indices:
        label = known.labels.get(index)
        labelled: dict[str, Any] = {
            "label": label.label if label else None,
            "category": label.category or None if label else None,
        }
        if index in covered:
            yield _extracted(known, index, operation, labelled)
        else:
            yield FeatureExport(index, **labelled)


def _extracted(known: Knowledge, index: int, operation: Export, labelled: dict[str, Any]) -> FeatureExport:
    stats = known.extraction.feature(index)
    logits = known.logit_tokens(index, operation.logit_lens_k) if operation.include_logit_lens else None
    examples = [] if stats.dead else known.examples(index, "top", operation.n_examples, operation.window)
    return FeatureExport(
        index,
        **labelled,
        activation_frequency=stats.frequency,
        max_activation=stats.max,
        mean_activation=stats.mean,
        top_positive=_values(logits[0]) if logits else None,
        top_negative=_values(logits[1]) if logits else None,
        histogram=_histogram(known, index, operation) if operation.include_histograms and not stats.dead else None,
        top_tokens=[
            feature_json.TopToken(each.token, each.token_id, each.count, each.mean_activation, each.max_activation)
            for each in (known.top_tokens(index, operation.top_tokens_k) if operation.include_top_tokens else [])
        ],
        activations=[feature_json.Activation(each.tokens, each.values, each.position) for each in examples],
    )


def _values(tokens):
    return [feature_json.TokenValue(each.token, each.token_id, each.value) for each in tokens]


def _histogram(known: Knowledge, index: int, operation: Export) -> feature_json.Histogram:
    stats = known.extraction.feature(index)
    bins = known.histogram(index, operation.histogram_bins)
    return feature_json.Histogram(
        bins.bin_edges, bins.counts, n_tokens=known.record.n_tokens, max=stats.max, mean=stats.mean
    )


def _head(engine: Engine, known: Knowledge, operation: Export) -> dict[str, Any]:
    """What a JSON document says before its features; nothing of today, so that the same is the same bytes."""
    of_sae = ("slug", "model", "hook_name", "layer", "architecture", "d_in", "d_sae", "source", "origin", "sha256")
    of_extraction = ("slug", "model", "tokens", "hook_name", "n_tokens", "n_features", "n_alive", "n_dense", "settings")
    options = operation.model_dump(mode="json", exclude={"dry_run", "idempotency_key", "wait_s", "sae", "compress"})
    options["include_saelens_weights"] = False
    return {
        "sae": {name: getattr(known.sae, name) for name in of_sae},
        "extraction": {name: getattr(known.record, name) for name in of_extraction} if known.sae.extraction else None,
        "options": options,
        "provenance": dict(_facts(engine, known).provenance),
    }


def _exported(known: Knowledge, indices: list[int], operation: Export) -> Iterator[dict[str, Any]]:
    """Each feature as the JSON document has it."""
    covered = set(known.extraction.indices.tolist()) if known.sae.extraction is not None else set()
    left_out = {
        name
        for included, names in (
            (operation.include_explanations, ("label", "category", "confidence", "labels")),
            (operation.include_histograms, ("histogram", "logit_histogram")),
            (operation.include_logit_lens, ("promoted", "suppressed", "logit_histogram")),
            (operation.include_top_tokens, ("top_tokens",)),
        )
        if not included
        for name in names
    }
    for index in indices:
        card = _card(known, index, operation, index in covered)
        yield card.model_dump(mode="json") | dict.fromkeys(left_out)


def _card(known: Knowledge, index: int, operation: Export, extracted: bool) -> ExportedFeature:
    if not extracted:
        key, label = FeatureKey(known.sae.slug, index), known.labels.get(index)
        return ExportedFeature(
            ref=key.ref,
            id=key.id,
            sae=key.sae,
            index=index,
            label=label.label if label else None,
            category=label.category if label else None,
            confidence=label.confidence if label else None,
            labels=known.engine.store.label_history(key.sae, index),
        )
    card = known.card(index, n=0, sampling="all", window=operation.window, bins=operation.histogram_bins)
    logits = known.logit_tokens(index, operation.logit_lens_k)
    return ExportedFeature(
        **card.model_dump(exclude={"top_tokens", "promoted", "suppressed", "examples"}),
        top_tokens=known.top_tokens(index, operation.top_tokens_k),
        promoted=logits[0] if logits else None,
        suppressed=logits[1] if logits else None,
        examples=_examples(known, index, operation),
    )


def _examples(known: Knowledge, index: int, operation: Export) -> list[ExportedExample]:
    """At most n of each kind, as get_feature shows them, with the ids of their tokens."""
    seen: Counter[str] = Counter()
    kept = []
    for each in known.extraction.examples(index, window=operation.window):
        seen[each.group] += 1
        if seen[each.group] <= operation.n_examples:
            kept.append(each)
    shown = known.examples(index, None, operation.n_examples, operation.window)
    return [
        ExportedExample(**one.model_dump(), token_ids=each.token_ids.tolist(), quantile=each.quantile)
        for one, each in zip(shown, kept, strict=True)
    ]


def follow_exports(engine: Engine) -> None:
    """Keep each export's record in step with its job."""

    def changed(job: Job) -> None:
        if job.operation != "export" or not job.subject:
            return
        slug = job.subject.partition("/")[2]
        if engine.store.exists(ExportRecord, slug) and job.state != "completed":
            changes: dict[str, Any] = {"status": DOCUMENTS_STATES.get(job.state, job.state), "job": job.slug}
            changes["error_message"] = str(job.error.what) if job.error else None
            engine.store.update(ExportRecord, slug, **changes)

    engine.jobs.on_change(changed)


def _with_job(engine: Engine, record: ExportRecord) -> ExportRecord:
    """The record with its job's latest stage."""
    if record.job is None or record.status not in ("pending", "computing", "packaging"):
        return record
    job = engine.jobs.get(record.job)
    return record.model_copy(update={"progress": 100 * (job.progress or 0.0), "current_stage": job.stage})


@handles(ShowExport)
def show_export(operation: ShowExport, engine: Engine) -> ExportRecord:
    return _with_job(engine, engine.store.get(ExportRecord, operation.export.removeprefix("export/")))


@handles(DownloadExport)
def download_export(operation: DownloadExport, engine: Engine) -> Download:
    record = engine.store.get(ExportRecord, operation.export.removeprefix("export/"))
    if record.status != "completed" or record.output_path is None:
        raise Conflict(
            f"{record.ref} is {record.status}.",
            fix="Wait until it is completed.",
            next_call=("job", {"id": record.job}),
        )
    path = _path(engine, record)
    if not path.exists():
        raise NotFound(f"The file of {record.ref} is no longer there.", fix="Export again.")
    return Download(
        path=str(path),
        filename=path.name,
        media_type=MEDIA_TYPES[record.format],
        n_bytes=record.file_size_bytes or path.stat().st_size,
        sha256=record.sha256 or "",
    )


@handles(CancelExport)
def cancel_export(operation: CancelExport, engine: Engine) -> Job:
    record = engine.store.get(ExportRecord, operation.export.removeprefix("export/"))
    if record.job is None:
        raise Conflict(f"{record.ref} was never started.", fix="There is nothing to cancel.")
    return engine.jobs.control(record.job, "cancel")


@handles(ListExports)
def list_exports(operation: ListExports, engine: Engine) -> Page[ExportRecord]:
    where = {name: value for name in ("sae", "status") if (value := getattr(operation, name)) is not None}
    page = engine.store.page(ExportRecord, where=where, limit=operation.limit, cursor=operation.cursor)
    return page.model_copy(update={"rows": [_with_job(engine, record) for record in page.rows]})
