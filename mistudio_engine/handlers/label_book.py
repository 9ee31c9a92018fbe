"""The book of a labelling job: what it still has to do, and what it has found, written down as it comes.

A label, or the event that there is none (`not_labelled`, with the features by reason), and what was asked for it are
one transaction, so a job whose engine was killed finds what it has done: it asks again neither for what it labelled nor
for what it failed at. It does not know how labels are found.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Any

from mistudio_engine.api.events import Progress
from mistudio_engine.api.features import LabellingReport
from mistudio_engine.api.operations.labels import LabelFeatures
from mistudio_engine.api.records import Finding, LabelRecord, SAERecord
from mistudio_engine.discovery.labelling.labeller import Label, LabelFailure
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.search_index import update_rows
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext

__all__ = ["LabelBook", "asked_for", "stays"]

INDEXED_AT_ONCE, INDEX_SECONDS = 64, 5.0
"""Labels to one update of the search index, and how long a label waits for it at most."""

KEEP_SECONDS = 0.5
"""How long an outcome waits until it is written down: what a kill loses."""

SAMPLES_SHOWN = 8


def asked_for(operation: LabelFeatures, known: Knowledge) -> list[int]:
    """The features that a call asks for, each once."""
    return list(dict.fromkeys(operation.features if operation.features is not None else known.alive()))


def stays(operation: LabelFeatures, label: LabelRecord | None) -> bool:
    """A person's or an agent's label stays: looking for another would be for nothing."""
    return label is not None and (not operation.relabel or not label.author.startswith("job:"))


class LabelBook:
    """What one job does to the labels of one SAE.

    Attributes:
        wanted: features that are to be labelled yet.
        n_labelled, n_kept, failures: as in the report, of earlier attempts of this job too.
    """

    def __init__(self, operation: LabelFeatures, engine: Engine, context: JobContext, known: Knowledge) -> None:
        self._engine, self._sae, self._author = engine, operation.sae, f"job:{context.job.slug}"
        self._publish, self._channel = context.publish, f"jobs/{context.job.slug}"
        self._extraction = known.record.slug
        self.failures: Counter[str] = Counter()
        self._samples: list[dict[str, Any]] = []
        self.n_labelled = self.n_kept = 0
        self.wanted: list[int] = []
        reasons = self._failed_before()
        for index in asked_for(operation, known):
            label = known.labels.get(index)
            if label is not None and label.author == self._author and label.extraction == self._extraction:
                self.n_labelled += 1  # by this job before the engine was killed
                self._samples = _best([*self._samples, _sample(label)])
            elif label is not None and label.author != self._author and stays(operation, label):
                self.n_kept += 1
            elif index in reasons:
                self.failures[reasons[index]] += 1
            else:
                self.wanted.append(index)
        self._n_done, self._began_at = 0, time.monotonic()
        self._new: list[Label | LabelFailure] = []
        self._unindexed: list[int] = []
        self._kept_at = self._indexed_at = self._began_at

    def _failed_before(self) -> dict[int, str]:
        """The features that this job failed at before the engine was killed, from this extraction, and why."""
        found: dict[int, str] = {}
        seq = 0
        while events := self._engine.store.events_after(seq, [self._channel], names=["not_labelled"]):
            for event in events:
                if event.data["extraction"] == self._extraction:
                    found |= {index: reason for reason, some in event.data["features"].items() for index in some}
            seq = events[-1].seq
        return found

    def enter(self, outcome: Label | LabelFailure) -> None:
        """Take note of an outcome; it is written with the next ones."""
        self._new.append(outcome)
        self._n_done += 1

    def keep(self, *, now: bool = False) -> None:
        """Write down what has waited long enough."""
        at = time.monotonic()
        if self._new and (now or at - self._kept_at >= KEEP_SECONDS or len(self._new) >= INDEXED_AT_ONCE):
            self._write()
            self._kept_at = at
        waited = at - self._indexed_at >= INDEX_SECONDS or len(self._unindexed) >= INDEXED_AT_ONCE
        if self._unindexed and (now or waited):
            update_rows(self._engine, self._sae, self._unindexed)
            self._unindexed, self._indexed_at = [], at

    def _write(self) -> None:
        new, self._new = self._new, []
        failed: dict[str, list[int]] = defaultdict(list)
        with self._engine.store.transaction():
            for outcome in new:
                if isinstance(outcome, LabelFailure):
                    self.failures[outcome.reason] += 1
                    failed[outcome.reason].append(outcome.feature)
                elif (written := self._engine.store.add_label(self._record(outcome))) is None:
                    self.n_kept += 1  # somebody labelled it meanwhile
                else:
                    self.n_labelled += 1
                    self._unindexed.append(outcome.feature)
                    self._samples = _best([*self._samples, _sample(written)])
            self._engine.store.add_findings([self._finding(outcome) for outcome in new])
            if failed:
                self._publish(self._channel, "not_labelled", {"features": failed, "extraction": self._extraction})

    def _record(self, label: Label) -> LabelRecord:
        return LabelRecord(
            sae=self._sae,
            index=label.feature,
            label=label.label,
            category=label.category,
            author=self._author,
            method=label.method,
            confidence=label.confidence,
            evidence=label.evidence,
            extraction=self._extraction,
        )

    def _finding(self, outcome: Label | LabelFailure) -> Finding:
        body: dict[str, Any] = {"method": outcome.method, **outcome.attempt}
        if isinstance(outcome, LabelFailure):
            body |= {"reason": outcome.reason, "detail": outcome.detail}
        else:
            body |= {"label": outcome.label, "category": outcome.category, "numbers": outcome.numbers}
        return Finding(sae=self._sae, index=outcome.feature, kind="attempt", author=self._author, body=body)

    def progress(self) -> Progress:
        """How far it is, of what was left to do."""
        seconds = time.monotonic() - self._began_at
        fraction = self._n_done / len(self.wanted) if self.wanted else 1.0
        rate = self._n_done / seconds if seconds > 0 and self._n_done else None
        return Progress(stage="labelling", fraction=fraction, rate=rate, unit="features")

    def close(self) -> None:
        """Write down everything that came."""
        self.keep(now=True)
        with self._engine.store.transaction():  # nobody labels between the count and the record
            n_labelled = self._engine.store.count_labels(self._sae)
            self._engine.store.update(SAERecord, self._sae, n_labelled=n_labelled)

    def report(self, method: str) -> LabellingReport:
        """The end of it."""
        return LabellingReport(
            sae=self._sae,
            method=method,
            n_labelled=self.n_labelled,
            n_kept=self.n_kept,
            n_failed=sum(self.failures.values()),
            failures=dict(self.failures),
            n_left=len(self.wanted) - self._n_done,
            samples=self._samples,
        )


def _sample(label: LabelRecord) -> dict[str, Any]:
    return {"feature": label.index, "label": label.label, "category": label.category, "confidence": label.confidence}


def _best(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(samples, key=lambda sample: -(sample["confidence"] or 0.0))[:SAMPLES_SHOWN]
