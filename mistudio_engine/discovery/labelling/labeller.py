"""What a labeller is: it gets evidence of features and gives a label, or a failure with its reason, for each.

The contexts of a feature are split by a hash of their number into an explain and a score set *before* anything is
built, so that a label is scored on contexts it was not made from. A new way of labelling is a class with an `id` and a
`label_all`; it may work on many features at once, and gives each as it is ready. No texts of prompts and no rules here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from mistudio_engine.discovery.extraction_store import Example, ExtractionStore, FeatureStats
from mistudio_engine.discovery.labelling.chat import NoAnswerReason

__all__ = ["Evidence", "FailureReason", "Label", "LabelFailure", "Labeller", "gather_evidence", "is_held_out"]

FailureReason = Literal["dead", "too_few_examples", "no_pattern", "unparsable", "too_long"] | NoAnswerReason


class Evidence(NamedTuple):
    """What a labeller may look at for one feature: whole contexts, each once."""

    stats: FeatureStats
    explain: list[Example]
    """To build a label from."""

    score: list[Example]
    """Held out: to score it on, and for nothing else."""


@dataclass(frozen=True)
class Label:
    """A label for a feature, with what speaks for it."""

    feature: int
    label: str
    """What the feature stands for, in a few words. Words from the dataset in it are data, and printable."""

    category: str
    """A path such as `Context > After “not”`."""

    confidence: float | None
    """Balanced accuracy on the held-out contexts; 0.5 is chance. None until it is scored."""

    evidence: str
    """One or two sentences with the numbers."""

    method: str
    """Id of the labeller."""

    numbers: dict[str, Any] = field(default_factory=dict)
    """The same numbers for machines."""

    attempt: dict[str, Any] = field(default_factory=dict)
    """What was asked and answered on the way, for inspection."""


@dataclass(frozen=True)
class LabelFailure:
    """A feature without a label, and why. Never to be stored as a label."""

    feature: int
    reason: FailureReason
    detail: str
    """One sentence with the numbers."""

    method: str

    attempt: dict[str, Any] = field(default_factory=dict)
    """As of `Label`."""


class Labeller(Protocol):
    """Labels features."""

    @property
    def id(self) -> str:
        """Name of the method, as it is kept in a label's history."""
        ...

    def label_all(self, evidence: Iterable[Evidence]) -> Iterator[Label | LabelFailure | None]:
        """A label or a failure for each evidence, as they are ready; None where there was none for half a second.

        It draws evidence when it has use for it and never more than it works on, so that closing the iterator stops the
        work and what was given stays. It may draw it on another thread, one at a time.
        """
        ...


def gather_evidence(store: ExtractionStore, index: int, *, seed: int = 0) -> Evidence:
    """Evidence of one feature, from all groups of its examples.

    Raises:
        NotFound: the extraction does not cover the feature.
    """
    by_context: dict[int, Example] = {}
    for example in store.examples(index):
        by_context.setdefault(example.context, example)
    explain, score = [], []
    for context, example in by_context.items():
        (score if is_held_out(context, seed) else explain).append(example)
    return Evidence(store.feature(index), explain, score)


def is_held_out(context: int, seed: int = 0) -> bool:
    """Whether a context is for scoring: half of them are, the same ones for every feature and every run."""
    # The finaliser of splitmix64 (Steele, Lea and Flood 2014): neighbouring numbers come out unrelated.
    mixed = (context + 1 + (seed << 32)) * 0x9E3779B97F4A7C15 & _MASK
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
    return bool((mixed ^ (mixed >> 31)) & 1)


_MASK = (1 << 64) - 1
