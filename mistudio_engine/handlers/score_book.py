"""The book of a scoring job: what it has scored, what it could not, and the sums that its report is made of.

Scores are written down with their labels as they come, some at a time, so a job whose engine was killed finds them
there. Here only sums stay, and two numbers a score: a dictionary may have a hundred thousand labels. It does not know
how labels are judged.
"""

from __future__ import annotations

import heapq
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mistudio_engine.api.events import Progress
from mistudio_engine.api.operations.scores import ScoreLabels
from mistudio_engine.api.records import LabelRecord
from mistudio_engine.api.scores import Distribution, MethodScore, ScoringMethod, ScoringReport
from mistudio_engine.discovery.labelling.scoring import OTHER_LABEL, TOP_TOKEN, Judged, method_score, why_unscored
from mistudio_engine.handlers.search_index import update_rows
from mistudio_engine.runtime.engine import Engine

__all__ = ["PREPARED", "ScoreBook"]

PREPARED = 0.2
"""Share of the progress that getting ready takes."""

KEPT_AT_ONCE, KEEP_SECONDS = 64, 0.5
"""Scores that are written down together, and how long one waits for it at most: what a kill loses."""

INDEXED_AT_ONCE, INDEX_SECONDS = 256, 5.0
"""Scores to one update of the search index, and how long one waits for it at most."""

SAMPLES_SHOWN = 8


class _Sums:
    """What the scores by one method come to."""

    def __init__(self) -> None:
        self.own = array("d")
        self.baselines = {OTHER_LABEL: array("d"), TOP_TOKEN: array("d")}
        self.n_beat = self.n_level = self.n_questions = self.n_unparsed = self.n_unanswered = 0
        self.negatives: Counter[str] = Counter()

    def add(self, score: MethodScore) -> None:
        self.own.append(score.balanced_accuracy)
        for name, baseline in score.baselines.items():
            if baseline.balanced_accuracy is not None:
                self.baselines[name].append(baseline.balanced_accuracy)
        self.n_beat += score.beats_baselines is True
        top_token = score.baselines.get(TOP_TOKEN)
        self.n_level += top_token is not None and top_token.lead == 0
        self.n_questions += score.n_questions
        self.n_unparsed += score.n_unparsed
        self.n_unanswered += score.n_unanswered
        self.negatives.update(score.negatives)


class ScoreBook:
    """What one job says of the labels of one SAE.

    Args:
        job: its slug.
        extraction: the one that all its items are from.
        scorer: who judges.

    Attributes:
        n_wanted: labels that were to be scored when it began.
        status: as in the report.
        similar_by: what found similar texts.
    """

    def __init__(self, operation: ScoreLabels, engine: Engine, job: str, extraction: str, scorer: str) -> None:
        self._operation, self._engine = operation, engine
        self._job, self._extraction, self._scorer = job, extraction, scorer
        self.n_wanted = self._n_done = self._n_scored = 0
        self.status: Literal["completed", "max_usd_reached", "stopped"] = "completed"
        self.similar_by: str | None = None
        self._sums: dict[ScoringMethod, _Sums] = {method: _Sums() for method in operation.methods}
        self._failures: Counter[str] = Counter()
        self._left_out: dict[str, Counter[str]] = {}
        self._failed: list[dict[str, Any]] = []
        self._best: list[tuple[float, int, str, str]] = []  # a heap, the worst of them first
        self._new: list[tuple[Judged, dict[str, MethodScore], float]] = []
        self._unindexed: list[int] = []
        self._kept_at = self._indexed_at = self._began_at = time.monotonic()

    @property
    def n_left(self) -> int:
        """Labels that are not yet looked at."""
        return self.n_wanted - self._n_done

    def recall(self, label: LabelRecord) -> bool:
        """Whether this job has scored a label before its engine was killed, and then count it.

        What another model said is not counted, nor what was said of another extraction: a retry may have settled them
        anew, and a report is of one of each.
        """
        us = {"job": self._job, "extraction": self._extraction, "scorer": self._scorer}
        ours = {
            name: MethodScore.model_validate(body)
            for name, body in label.scores.items()
            if isinstance(body, dict) and us.items() <= body.items()
        }
        if ours:
            self._count(label.index, label.label, ours, _mean(ours))
        return bool(ours)

    def fail(self, index: int, reason: str, detail: str) -> None:
        """Take note of a label that gets no score."""
        self._failures[reason] += 1
        self._say_why({"feature": index, "reason": reason, "detail": detail})
        self._n_done += 1

    def enter(self, judged: Judged) -> None:
        """Take note of a judge's answers; what they come to is written down with the next ones."""
        case = judged.case
        found = {
            method: method_score(
                judged,
                method,
                scorer=self._scorer,
                job=self._job,
                extraction=self._extraction,
                similar_by=self.similar_by,
                seed=self._operation.seed,
            )
            for method in case.rounds
        }
        scores: dict[str, MethodScore] = {method: score for method, score in found.items() if score is not None}
        reasons = dict(case.left_out)
        reasons |= {
            method: ("too_few_answers", why_unscored(judged, method)) for method in case.rounds if method not in scores
        }
        if scores:
            self._n_done += 1
            self._new.append((judged, scores, _mean(scores)))
            for method, (reason, detail) in reasons.items():
                self._left_out.setdefault(method, Counter())[reason] += 1
                self._say_why({"feature": case.feature, "method": method, "reason": reason, "detail": detail})
        else:
            self.fail(case.feature, "too_few_answers", reasons[next(iter(case.rounds))][1])

    def _say_why(self, what: dict[str, Any]) -> None:
        if len(self._failed) < SAMPLES_SHOWN:
            self._failed.append(what)

    def keep(self, *, now: bool = False) -> None:
        """Write down what has waited long enough, and let searches see it."""
        at = time.monotonic()
        if self._new and (now or len(self._new) >= KEPT_AT_ONCE or at - self._kept_at >= KEEP_SECONDS):
            self._write()
            self._kept_at = at
        late = len(self._unindexed) >= INDEXED_AT_ONCE or at - self._indexed_at >= INDEX_SECONDS
        if self._unindexed and (now or late):
            update_rows(self._engine, self._operation.sae, self._unindexed)
            self._unindexed, self._indexed_at = [], time.monotonic()

    def _write(self) -> None:
        new, self._new = self._new, []
        with self._engine.store.transaction():
            for judged, scores, confidence in new:
                case = judged.case
                bodies = {method: score.model_dump(mode="json") for method, score in scores.items()}
                sae = self._operation.sae
                written = self._engine.store.score_label(sae, case.feature, case.version, bodies, confidence)
                if written is None:
                    self._n_done -= 1
                    self.fail(case.feature, "label_gone", "The label was deleted while it was judged.")
                else:
                    self._unindexed.append(case.feature)
                    self._count(case.feature, written.label, scores, confidence)

    def _count(self, index: int, label: str, scores: Mapping[str, MethodScore], confidence: float) -> None:
        self._n_scored += 1
        for method, sums in self._sums.items():
            if method in scores:
                sums.add(scores[method])
        verdict = next(iter(scores.values())).verdict
        heapq.heappush(self._best, (confidence, -index, label, verdict))
        if len(self._best) > SAMPLES_SHOWN:
            heapq.heappop(self._best)

    def progress(self) -> Progress:
        """How far it is, of what was left to do."""
        seconds = max(time.monotonic() - self._began_at, 1e-9)
        fraction = PREPARED + (1 - PREPARED) * self._n_done / max(1, self.n_wanted)
        return Progress(stage="scoring", fraction=fraction, rate=self._n_done / seconds, unit="labels")

    def report(self, usd: float | None) -> ScoringReport:
        """The end of it."""
        every = list(self._sums.values())
        n_questions, n_unanswered = sum(each.n_questions for each in every), sum(each.n_unanswered for each in every)
        n_answers = n_questions - n_unanswered
        return ScoringReport(
            sae=self._operation.sae,
            status=self.status,
            scorer=self._scorer,
            n_scored=self._n_scored,
            n_left=self.n_left,
            n_failed=sum(self._failures.values()),
            failures=dict(self._failures),
            left_out={method: dict(reasons) for method, reasons in self._left_out.items()},
            failed=self._failed,
            balanced_accuracy={method: _distribution(sums.own) for method, sums in self._sums.items() if sums.own},
            baselines={
                method: {name: _distribution(found) for name, found in sums.baselines.items() if found}
                for method, sums in self._sums.items()
                if sums.own
            },
            n_beat_baselines={method: sums.n_beat for method, sums in self._sums.items()},
            n_level_with_top_token={method: sums.n_level for method, sums in self._sums.items()},
            n_questions=n_questions,
            usd=usd,
            parse_failure_rate=sum(each.n_unparsed for each in every) / n_answers if n_answers else 0.0,
            negatives=dict(sum((each.negatives for each in every), Counter())),
            samples=[
                {"feature": -index, "label": label, "confidence": confidence, "verdict": verdict}
                for confidence, index, label, verdict in sorted(self._best, reverse=True)
            ],
        )


def _mean(scores: Mapping[str, MethodScore]) -> float:
    """What is shown as the label's confidence."""
    return float(np.mean([score.balanced_accuracy for score in scores.values()]))


def _distribution(values: Sequence[float]) -> Distribution:
    low, lower, median, upper, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return Distribution(
        n=len(values),
        mean=float(np.mean(values)),
        minimum=low,
        lower_quartile=lower,
        median=median,
        upper_quartile=upper,
        maximum=high,
        histogram=np.histogram(values, bins=10, range=(0, 1))[0].tolist(),
    )
