"""Handlers of api/operations/system.py: how the engine is, what there is, and what one thing is made of."""

from __future__ import annotations

import shutil
import time

import psutil

from mistudio_engine import __version__
from mistudio_engine.api.errors import NextCall, human_bytes
from mistudio_engine.api.operations.system import (
    Describe,
    Description,
    Find,
    Found,
    Metrics,
    MetricsHistory,
    Resident,
    ShowSystemHistory,
    ShowSystemMetrics,
    Status,
    SystemStatus,
)
from mistudio_engine.api.records import (
    RECORDS,
    DatasetRecord,
    ExportRecord,
    ExtractionRecord,
    Job,
    ModelRecord,
    Page,
    Record,
    SAERecord,
    TemplateRecord,
    TokensRecord,
    TrainingRecord,
)
from mistudio_engine.handlers.jobs import training_now
from mistudio_engine.handlers.registry import handles
from mistudio_engine.handlers.templates import next_calls as calls_of_template
from mistudio_engine.runtime.engine import Engine


@handles(Status)
def status(_: Status, engine: Engine) -> SystemStatus:
    memory = psutil.virtual_memory()
    counts = {kind: engine.store.count(record) for kind, record in RECORDS.items() if kind != "job"}
    return SystemStatus(
        state=engine.state,  # type: ignore[arg-type]
        version=__version__,
        home=str(engine.home),
        device=engine.device,
        memory_free=memory.available,
        memory_total=memory.total,
        disk_free=shutil.disk_usage(engine.home).free,
        offline=engine.offline,
        embedder=engine.embedder.id if engine.embedder else None,
        loaded=[Resident(key=each.key, n_bytes=each.n_bytes, in_use=each.in_use) for each in engine.memory.loaded()],
        jobs_running=[job.slug for job in engine.store.all(Job, state="running")],
        jobs_queued=len(engine.store.all(Job, state="queued")),
        counts=counts,
        uptime_seconds=time.time() - engine.started_at,
        next_call=_first_step(counts, engine),
    )


def _first_step(counts: dict[str, int], engine: Engine) -> NextCall:
    """What somebody with nothing but this answer should do: the first step of the path that is missing."""
    if engine.state == "starting":
        return NextCall(tool="status")
    if not counts["model"]:
        return NextCall(tool="get_model", arguments={"source": "embedded"})
    if not counts["dataset"]:
        model = engine.store.page(ModelRecord, limit=1).rows[0].slug
        return NextCall(tool="get_dataset", arguments={"source": "embedded", "model": model})
    if not counts["sae"]:
        return NextCall(tool="find", arguments={"kind": "dataset"})
    if not counts["extraction"]:
        return NextCall(tool="extract", arguments={"sae": engine.store.page(SAERecord, limit=1).rows[0].slug})
    return NextCall(tool="find", arguments={"kind": "sae"})


@handles(ShowSystemMetrics)
def show_system_metrics(_: ShowSystemMetrics, engine: Engine) -> Metrics:
    return Metrics.model_validate(engine.monitor.latest())


@handles(ShowSystemHistory)
def show_system_history(operation: ShowSystemHistory, engine: Engine) -> MetricsHistory:
    samples = engine.monitor.history(operation.seconds)
    stride = max(1, -(-len(samples) // operation.limit))
    kept = samples[::-1][::stride][::-1]  # the newest is always among them
    return MetricsHistory(
        interval_seconds=engine.monitor.interval_seconds * stride,
        samples=[Metrics.model_validate(sample) for sample in kept],
    )


@handles(Find)
def find(operation: Find, engine: Engine) -> Page[Found]:
    page = engine.store.page(
        RECORDS[operation.kind], query=operation.query, limit=operation.limit, cursor=operation.cursor
    )
    rows = [_found(_now(engine, record)) for record in page.rows]
    return Page[Found](rows=rows, total=page.total, shown=len(rows), next_cursor=page.next_cursor)


def _now(engine: Engine, record: Record) -> Record:
    return training_now(engine, record) if isinstance(record, TrainingRecord) else record


def _found(record: Record) -> Found:
    return Found(
        ref=record.ref,
        line=one_line(record),
        n_bytes=getattr(record, "n_bytes", None) or getattr(record, "file_size_bytes", None),
        ready=getattr(record, "state", getattr(record, "status", "completed")) == "completed",
    )


def one_line(record: Record) -> str:
    """What a record is, in a line that a person and an agent read alike."""
    match record:
        case ModelRecord():
            return f"{record.family}, {record.n_layers} layers, d_model {record.d_model}, {human_bytes(record.n_bytes)}"
        case DatasetRecord():
            return (
                f"{record.n_documents:,} documents from {record.source}; tokens: {', '.join(record.tokens) or 'none'}"
            )
        case TokensRecord():
            return (
                f"{record.n_tokens:,} tokens of {record.dataset} for {record.model}, contexts of {record.context_size}"
            )
        case TrainingRecord():
            return (
                f"{record.architecture} on {record.model} {record.hook_name}: {record.status}, {record.progress:.0f} %"
            )
        case SAERecord():
            quality = f", FVU {record.evaluation.fvu:.3g}" if record.evaluation else ""
            return (
                f"{record.architecture} {record.d_in} → {record.d_sae} on {record.model} {record.hook_name}"
                f"{quality}{', extracted' if record.extraction else ''}"
            )
        case ExtractionRecord():
            counts = f"{record.n_features:,} features, {record.n_alive:,} alive"
            return f"{counts}, of {record.sae} over {record.n_tokens:,} tokens"
        case ExportRecord():
            return f"{record.format} of {record.sae}: {record.status}"
        case TemplateRecord():
            star = ", favourite" if record.favourite else ""
            about = f": {record.description}" if record.description else ""
            return f"for {record.operation}, {len(record.arguments)} arguments, used {record.n_used}×{star}{about}"
        case Job():
            done = f", {record.progress:.0%}" if record.progress is not None else ""
            return f"{record.operation} {record.state}{done}{': ' + record.subject if record.subject else ''}"
        case _:
            return record.slug


@handles(Describe)
def describe(operation: Describe, engine: Engine) -> Description:
    record = _now(engine, engine.store.get(RECORDS[operation.kind], operation.slug))
    return Description(
        ref=record.ref,
        record=record.model_dump(mode="json"),
        lineage=_lineage(record),
        health=_health(record),
        next_calls=_next_calls(record, engine),
    )


def _lineage(record: Record) -> dict[str, str]:
    """Refs in a record, by the role they play."""
    return {
        kind: f"{kind}/{value}"
        for kind in ("model", "dataset", "tokens", "training", "sae", "extraction")
        if kind != record.kind and isinstance(value := getattr(record, kind, None), str)
    }


def _health(record: Record) -> list[str]:
    """What is worth knowing before trusting it."""
    findings: list[str] = []
    if isinstance(record, SAERecord):
        if record.evaluation is None:
            findings.append("It has not been evaluated: eval_sae says how well it reconstructs.")
        else:
            quality = record.evaluation
            if quality.fvu > 0.5:
                findings.append(
                    f"It leaves {quality.fvu:.0%} of the variance unexplained: is it the right hook and model?"
                )
            if quality.ce_loss_score < 0.8:
                findings.append(f"Its CE-loss score is {quality.ce_loss_score:.2f}: the model notices the difference.")
            if quality.dead_fraction > 0.2:
                findings.append(f"{quality.dead_fraction:.0%} of its features never fired.")
        if record.extraction is None:
            findings.append("Its features have not been extracted: nothing is known of them yet.")
    if isinstance(record, Job) and record.error is not None:
        findings.append(f"It failed: {record.error.what}")
    return findings


def _next_calls(record: Record, engine: Engine) -> list[NextCall]:
    calls: list[NextCall] = []
    match record:
        case SAERecord():
            if record.evaluation is None:
                calls.append(NextCall(tool="eval_sae", arguments={"sae": record.slug}))
            if record.extraction is None:
                calls.append(NextCall(tool="extract", arguments={"sae": record.slug}))
            elif record.n_labelled == 0:
                calls.append(NextCall(tool="label_features", arguments={"sae": record.slug}))
            else:
                calls.append(NextCall(tool="search_features", arguments={"sae": record.slug}))
        case ModelRecord():
            source = "embedded" if record.source == "embedded" else "PATH_OR_HUB_ID"
            calls.append(NextCall(tool="get_dataset", arguments={"source": source, "model": record.slug}))
        case DatasetRecord() if record.tokens:
            tokens = engine.store.get(TokensRecord, record.tokens[-1])
            model = engine.store.get(ModelRecord, tokens.model)
            hook_name = f"blocks.{model.n_layers // 2}.hook_resid_post"
            arguments = {"model": model.slug, "dataset": record.slug, "hook_name": hook_name, "dry_run": True}
            calls.append(NextCall(tool="train_sae", arguments=arguments))
        case ExtractionRecord():
            calls.append(NextCall(tool="label_features", arguments={"sae": record.sae}))
        case TemplateRecord():
            calls += calls_of_template(record)
        case Job() if not record.finished:
            calls.append(NextCall(tool="job", arguments={"id": record.slug, "wait_s": 20}))
        case _:
            pass
    return calls
