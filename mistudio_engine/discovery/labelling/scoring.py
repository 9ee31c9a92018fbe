"""How well a label foretells where its feature fires: detection and fuzzing against two baselines.

After Paulo et al. 2024 (Automatically Interpreting Millions of Features in LLMs, sections 3.2.1 and 3.2.2):

- *detection*: passages with and without the feature are shown; in which does it fire?
- *fuzzing*: passages with the feature are shown, in half of them the tokens on which it fires are marked, in the other
  half as many on which it is silent; which are marked rightly? Every passage is shown both ways, never both in one
  question.

Passages are held out: no label was made from their contexts. The same items are judged by another feature's label and
by the feature's top token; a label that is not above both says nothing of its own. A lead is of the items for which
both were answered. Here items are made and answers counted; who answers is a judge's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.api.scores import BaselineScore, MethodScore, ScoringMethod
from mistudio_engine.discovery.labelling.bootstrap import Interval, balanced_accuracies
from mistudio_engine.discovery.labelling.passages import Passage
from mistudio_engine.discovery.labelling.rules import Rule
from mistudio_engine.discovery.scores import confusion

__all__ = [
    "LABEL",
    "MIN_ITEMS",
    "OTHER_LABEL",
    "TOP_TOKEN",
    "Case",
    "Claim",
    "Judge",
    "Judged",
    "Trial",
    "Verdicts",
    "enough",
    "method_score",
    "trials",
    "why_unscored",
]

LABEL, OTHER_LABEL, TOP_TOKEN = "label", "other_label", "top_token"
"""Names of the claims of a case: the label's own, and the two baselines."""

_MARKED_AT = 0.3
"""Share of a passage's strongest activation from which a token is marked: weak ones at its side are no clear cases."""

MIN_ITEMS = 4
"""Answered items that each class must have for a score."""


class Claim(NamedTuple):
    """What is said of a feature, to be judged."""

    text: str
    rule: Rule | None = None
    """The same as a rule, where it is one."""

    feature: int | None = None
    """Whose label it is."""


class Trial(NamedTuple):
    """One item that a judge says yes or no to."""

    passage: Passage
    marked: NDArray[np.int64] | None
    """Places of the marked tokens in the passage; None in detection."""

    truth: bool


@dataclass(frozen=True)
class Case:
    """A feature with its claims and items."""

    feature: int
    version: int
    """Of the label."""

    claims: Mapping[str, Claim]
    """The label's own under `LABEL`, and the baselines."""

    rounds: Mapping[ScoringMethod, Sequence[Sequence[Trial]]]
    """Items by method, in rounds: what is in one round may be asked in one question."""

    left_out: Mapping[ScoringMethod, tuple[str, str]] = field(default_factory=dict)
    """Methods for which there are too few items: the reason, and a sentence on it."""


@dataclass
class Verdicts:
    """What a judge said of all items of one method, for one claim."""

    answers: list[bool | None] = field(default_factory=list)
    """By item, the rounds one after another; None where no answer could be read."""

    n_questions: int = 0
    n_unparsed: int = 0
    n_unanswered: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    """Why questions were unparsed or unanswered, in a word or two."""

    n_prompt_tokens: int = 0
    n_completion_tokens: int = 0


class Judged(NamedTuple):
    """A case with everything that was said of it."""

    case: Case
    verdicts: Mapping[tuple[ScoringMethod, str], Verdicts]
    """By method and name of the claim."""


class Judge(Protocol):
    """Says of each item of a case whether the feature fires, knowing nothing but a claim."""

    @property
    def id(self) -> str:
        """Who judges."""
        ...

    def judge_all(self, cases: Iterable[Case | None]) -> Iterator[Judged | None]:
        """Each case as it is ready, in any order; None now and then while there is none.

        Cases are drawn when there is use for them; None in the place of one says only that it is being looked for.
        Closing the iterator stops the work.
        """
        ...


def trials(
    method: ScoringMethod,
    positives: Sequence[Passage],
    negatives: Sequence[Passage],
    *,
    special_ids: Collection[int] = (),
    seed: int = 0,
) -> list[list[Trial]]:
    """The items of a method in rounds, shuffled.

    Args:
        positives: passages in which the feature fires.
        negatives: as many in which it does not; fuzzing has no use for them.
        special_ids: ids that stand for no text: they are never marked.
    """
    generator = np.random.default_rng([seed, *(passage.context for passage in positives)])
    if method == "detection":
        rounds = [[Trial(passage, None, passage.fires) for passage in (*positives, *negatives)]]
    else:
        special = np.array(sorted(special_ids), dtype=np.int64)
        rounds = [[], []]
        for number, passage in enumerate(positives):
            right, wrong = _marks(passage, special, generator)
            if len(right):
                rounds[number % 2].append(Trial(passage, right, True))
            if len(wrong):
                rounds[1 - number % 2].append(Trial(passage, wrong, False))
    return [[items[i] for i in generator.permutation(len(items))] for items in rounds]


def _marks(
    passage: Passage, special: NDArray[np.int64], generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places that fire, and as many that are silent (or fewer, where there are fewer)."""
    is_text = ~np.isin(passage.token_ids, special)
    strongest = passage.values[is_text].max(initial=0)
    right = np.flatnonzero(is_text & (passage.values > 0) & (passage.values >= _MARKED_AT * strongest))
    counted = is_text if passage.counted is None else is_text & passage.counted
    silent = np.flatnonzero(counted & (passage.values == 0))
    return right, np.sort(generator.permutation(silent)[: len(right)])


def enough(rounds: Sequence[Sequence[Trial]]) -> bool:
    """Whether there are as many items of each class as a score needs."""
    truth = [trial.truth for part in rounds for trial in part]
    return min(sum(truth), len(truth) - sum(truth)) >= MIN_ITEMS


def why_unscored(judged: Judged, method: ScoringMethod) -> str:
    """What there was instead of answers, in a sentence: for where `method_score` gives none."""
    own, items = judged.verdicts[method, LABEL], [trial for part in judged.case.rounds[method] for trial in part]
    n_known = Counter(trial.truth for trial, answer in zip(items, own.answers, strict=True) if answer is not None)
    n_all = Counter(trial.truth for trial in items)
    troubles = ", ".join(f"{n} × {what}" for what, n in own.troubles.most_common())
    answered = " and ".join(
        f"{n_known[truth]} of {n_all[truth]} items {side} it" for truth, side in ((True, "with"), (False, "without"))
    )
    return (
        f"Of {own.n_questions} questions {own.n_unparsed} were answered unreadably and {own.n_unanswered} not at all"
        + (f" ({troubles})" if troubles else "")
        + f": {answered} have an answer, and {MIN_ITEMS} of each are needed."
    )


def method_score(
    judged: Judged, method: ScoringMethod, *, scorer: str, job: str, extraction: str, similar_by: str | None, seed: int
) -> MethodScore | None:
    """The score of a case's label by one method; None where too few items were answered on a side."""
    case = judged.case
    items = [trial for part in case.rounds[method] for trial in part]
    names = [LABEL, *(name for name in case.claims if name != LABEL)]
    said = [judged.verdicts[method, name] for name in names]
    truth = np.array([trial.truth for trial in items], dtype=bool)
    context = np.array([trial.passage.context for trial in items], dtype=np.int64)
    answers = np.array([[bool(answer) for answer in each.answers] for each in said])
    known = np.array([[answer is not None for answer in each.answers] for each in said])
    if not _are_enough(known[0], truth):
        return None
    accuracies, leads = balanced_accuracies(answers, known, truth, context, seed=seed)
    own, found = said[0], confusion(answers[0][known[0]], truth[known[0]])
    baselines = {
        name: _baseline(
            case.claims[name],
            accuracy if _are_enough(answered, truth) else None,
            lead if _are_enough(answered & known[0], truth) else None,
            int((answered & known[0]).sum()),
        )
        for name, answered, accuracy, lead in zip(names[1:], known[1:], accuracies[1:], leads, strict=True)
    }
    beats, verdict = _verdict(baselines)
    n_answered = own.n_questions - own.n_unanswered
    return MethodScore(
        method=method,
        balanced_accuracy=accuracies[0].value,
        low=accuracies[0].low,
        high=accuracies[0].high,
        recall=found.recall,
        specificity=found.specificity,
        n_positive=int((known[0] & truth).sum()),
        n_negative=int((known[0] & ~truth).sum()),
        n_contexts=len(np.unique(context[known[0]])),
        negatives=dict(Counter(trial.passage.kind or "wrong_tokens" for trial in items if not trial.truth)),
        similar_by=similar_by if method == "detection" else None,
        scorer=scorer,
        n_questions=own.n_questions,
        n_unparsed=own.n_unparsed,
        n_unanswered=own.n_unanswered,
        n_prompt_tokens=sum(each.n_prompt_tokens for each in said),
        n_completion_tokens=sum(each.n_completion_tokens for each in said),
        parse_failure_rate=own.n_unparsed / n_answered if n_answered else 0.0,
        baselines=baselines,
        beats_baselines=beats,
        verdict=verdict,
        job=job,
        extraction=extraction,
        seed=seed,
    )


def _are_enough(known: NDArray[np.bool_], truth: NDArray[np.bool_]) -> bool:
    return min((known & truth).sum(), (known & ~truth).sum()) >= MIN_ITEMS


def _baseline(claim: Claim, accuracy: Interval | None, lead: Interval | None, n_paired: int) -> BaselineScore:
    """None for what too few answers tell of."""
    value, low, high = accuracy or (None, None, None)
    lead_value, lead_low, lead_high = lead or (None, None, None)
    return BaselineScore(
        text=claim.text,
        feature=claim.feature,
        balanced_accuracy=value,
        low=low,
        high=high,
        n_paired=n_paired,
        lead=lead_value,
        lead_low=lead_low,
        lead_high=lead_high,
    )


_BASELINES = {OTHER_LABEL: "another feature's label", TOP_TOKEN: "its top token alone"}


def _verdict(baselines: Mapping[str, BaselineScore]) -> tuple[bool | None, str]:
    """Whether the label is above all baselines, and that in a sentence or two."""
    leads = {words: baselines[name].lead if name in baselines else None for name, words in _BASELINES.items()}
    missing = [words for words, lead in leads.items() if lead is None]
    behind = [
        f"{'worse' if lead < 0 else 'no better'} than {words}"
        for words, lead in leads.items()
        if lead is not None and lead <= 0
    ]
    if behind:
        return False, f"The label is {' and '.join(behind)}."
    if missing:
        return None, f"It could not be compared with {' and '.join(missing)}."
    by_chance = [words for name, words in _BASELINES.items() if (baselines[name].lead_low or 0) <= 0]
    verdict = f"The label is better than {' and than '.join(leads)}."
    if by_chance:
        verdict += f" The lead over {' and over '.join(by_chance)} may be chance."
    return True, verdict
