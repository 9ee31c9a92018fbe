"""Handlers of api/operations/labels.py: features are labelled by a job, by people and by agents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

from mistudio_engine.api.errors import BadInput, Conflict
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.features import LabellingReport
from mistudio_engine.api.operations.labels import LabelFeatures, LabelHistory, SetLabel
from mistudio_engine.api.records import LabelRecord, Page, Plan, SAERecord
from mistudio_engine.api.refs import feature_of
from mistudio_engine.discovery.labelling.labeller import Evidence, Label, LabelFailure, Labeller, gather_evidence
from mistudio_engine.discovery.labelling.token_pattern import TokenPatternLabeller
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.search_index import update_rows
from mistudio_engine.models.vocabulary import special_ids
from mistudio_engine.runtime.engine import Engine, caller
from mistudio_engine.runtime.jobs import JobContext

LABELLED_AT_ONCE = 64
"""Labels to one update of the search index."""

SAMPLES_SHOWN = 8


@plans(LabelFeatures)
def plan_label_features(operation: LabelFeatures, engine: Engine) -> Planned:
    with Knowledge.of(engine, operation.sae) as known:
        covered = set(known.extraction.indices.tolist()) if operation.features else set()
        for index in operation.features or []:
            known.check_index(index)
            if index not in covered:
                known.extraction.feature(index)  # which says that the extraction was of other features
        n = len(operation.features) if operation.features is not None else known.record.n_alive
        plan = Plan(
            summary=f"Label {n:,} features of {known.sae.ref} by their token patterns.", details={"n_features": n}
        )
        return Planned(plan, subject=known.sae.ref)


@runs(LabelFeatures, lane="io", resumes="start")
def run_label_features(
    operation: LabelFeatures, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, LabellingReport]:
    with Knowledge.of(engine, operation.sae) as known:
        indices = list(dict.fromkeys(operation.features if operation.features is not None else known.alive()))
        # A person's or an agent's label stays: looking for another would be for nothing.
        kept = {index for index in indices if _is_foreign(known.labels.get(index))}
        ours = {index for index in indices if _author(known.labels.get(index)) == f"job:{context.job.slug}"}
        wanted = [index for index in indices if index not in kept | ours]
        labeller = _labeller(known)
        failures: Counter[str] = Counter()
        samples: list[dict[str, Any]] = []
        changed: list[int] = []
        n_labelled = len(ours)  # by this job before the engine was killed
        found = labeller.label_all(_evidence(known, wanted))
        try:
            for n_done, outcome in enumerate(found, start=1):
                if isinstance(outcome, LabelFailure):
                    failures[outcome.reason] += 1
                elif _write(engine, operation.sae, outcome, context) is None:
                    kept.add(outcome.feature)  # somebody labelled it meanwhile
                else:
                    n_labelled += 1
                    changed.append(outcome.feature)
                    samples = _best([*samples, _sample(outcome)])
                if len(changed) >= LABELLED_AT_ONCE:
                    update_rows(engine, operation.sae, changed)
                    changed = []
                yield Progress(stage="labelling", fraction=n_done / len(wanted), unit="features")
        finally:  # cancelled or not: what is labelled is found
            update_rows(engine, operation.sae, changed)
            engine.store.update(SAERecord, operation.sae, n_labelled=len(engine.store.labels(operation.sae)))
    return LabellingReport(
        sae=operation.sae,
        n_labelled=n_labelled,
        n_kept=len(kept),
        n_failed=sum(failures.values()),
        failures=dict(failures),
        samples=samples,
    )


def _author(label: LabelRecord | None) -> str:
    return label.author if label is not None else ""


def _is_foreign(label: LabelRecord | None) -> bool:
    return label is not None and not label.author.startswith("job:")


def _labeller(known: Knowledge) -> Labeller:
    vocabulary = known.tokenizer.get_vocab()
    strings = known.strings(range(1 + max(vocabulary.values())))
    return TokenPatternLabeller(strings, special_ids(known.tokenizer))


def _evidence(known: Knowledge, indices: list[int]) -> Iterator[Evidence]:
    return (gather_evidence(known.extraction, index) for index in indices)


def _write(engine: Engine, sae: str, label: Label, context: JobContext) -> LabelRecord | None:
    return engine.store.add_label(
        LabelRecord(
            sae=sae,
            index=label.feature,
            label=label.label,
            category=label.category,
            author=f"job:{context.job.slug}",
            method=label.method,
            confidence=label.confidence,
            evidence=label.evidence,
        )
    )


def _sample(label: Label) -> dict[str, Any]:
    return {"feature": label.feature, "label": label.label, "category": label.category, "confidence": label.confidence}


def _best(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: -sample["confidence"])[:SAMPLES_SHOWN]


@handles(SetLabel)
def set_label(operation: SetLabel, engine: Engine) -> LabelRecord:
    key = feature_of(operation.feature)
    sae = engine.store.get(SAERecord, key.sae)
    if key.index >= sae.d_sae:
        raise BadInput(
            f"{sae.ref} has no feature {key.index}.",
            why=f"Its features are 0 to {sae.d_sae - 1}.",
            fix="Use one of them.",
        )
    written = engine.store.add_label(
        LabelRecord(
            sae=key.sae,
            index=key.index,
            label=operation.label,
            category=operation.category,
            author=caller(),
            evidence=operation.evidence,
        )
    )
    if written is None:
        raise Conflict(f"{key.ref} has a label that {caller()} may not replace.", fix="Ask a person to change it.")
    engine.store.update(SAERecord, key.sae, n_labelled=len(engine.store.labels(key.sae)))
    engine.bus.publish(f"saes/{key.sae}", "label", written.model_dump(mode="json"))
    update_rows(engine, key.sae, [key.index])
    return written


@handles(LabelHistory)
def label_history(operation: LabelHistory, engine: Engine) -> Page[LabelRecord]:
    with Knowledge.of(engine, operation.sae) as known:
        known.check_index(operation.index)
    rows = engine.store.label_history(operation.sae, operation.index)
    return Page[LabelRecord](rows=rows, total=len(rows), shown=len(rows))
