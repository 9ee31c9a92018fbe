"""What is put before a judge for each labelled feature: the label, its two baselines, and the items to judge.

It joins what passages.py, negatives.py and scoring.py make. The records of labels, the model and whoever judges are
somebody else's: labels come as texts, and what fires where as a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.api.scores import ScoringMethod
from mistudio_engine.discovery.extraction_store import ExtractionStore
from mistudio_engine.discovery.labelling.labeller import Evidence, gather_evidence
from mistudio_engine.discovery.labelling.lexicon import TokenLexicon
from mistudio_engine.discovery.labelling.negatives import Pool, negatives
from mistudio_engine.discovery.labelling.passages import Copies, NegativeKind, Passage, positives
from mistudio_engine.discovery.labelling.rule_judge import derived_rule
from mistudio_engine.discovery.labelling.rules import Rule, TokenSet
from mistudio_engine.discovery.labelling.scoring import (
    LABEL,
    MIN_ITEMS,
    OTHER_LABEL,
    TOP_TOKEN,
    Case,
    Claim,
    Trial,
    enough,
    trials,
)

__all__ = ["CaseMaker", "Labelled", "Unscorable", "UnscorableReason"]

UnscorableReason = Literal["too_few_examples", "too_few_negatives", "too_few_silent_tokens", "rule_not_derivable"]

_ALIKE = 16
"""Features of the likest frequency among which the other label's is drawn."""

_LEAST_FREQUENCY = 1e-12
"""Taken for that of a feature that never fired."""


class Labelled(NamedTuple):
    """A feature's label that is to be scored, or to serve as a baseline."""

    text: str
    version: int = 1
    is_rule: bool = False
    """It was made as a rule on tokens, which can be derived again."""

    source: ExtractionStore | None = None
    """The extraction that it was made from, where that is another one than its items are from."""


class Unscorable(NamedTuple):
    """A feature without a case, and why."""

    feature: int
    reason: UnscorableReason
    detail: str


class CaseMaker:
    """Makes cases.

    Args:
        store: the extraction.
        labels: of every labelled feature that it covers.
        pool: where negatives come from; its window is the length of all passages.
        lexicon: the vocabulary.
        methods: what to make items for.
        n: passages with the feature at most, and as many without.
        kinds: of negatives.
        special_ids: ids that stand for no text.
        neighbours: by feature, those of like decoder direction, the nearest first.
        likeness: gives (len(pool),) how like each passage of the pool is to those with a feature, of which some are
            handed over; NaN where that is not known.
        by_rule: claims need rules: the judge is no language model.
        seed: of every choice; a feature's case does not depend on which others are made.
    """

    def __init__(
        self,
        store: ExtractionStore,
        labels: Mapping[int, Labelled],
        pool: Pool,
        lexicon: TokenLexicon,
        *,
        methods: Sequence[ScoringMethod] = ("detection", "fuzzing"),
        n: int = 20,
        kinds: Sequence[NegativeKind] = ("random",),
        special_ids: Collection[int] = (),
        neighbours: Mapping[int, Sequence[int]] | None = None,
        likeness: Callable[[int, Sequence[Passage]], NDArray[np.float32]] | None = None,
        by_rule: bool = False,
        seed: int = 0,
    ) -> None:
        self._store, self._labels, self._pool, self._lexicon = store, labels, pool, lexicon
        self._methods, self._n, self._kinds, self._special_ids = methods, n, kinds, special_ids
        self._neighbours, self._likeness, self._by_rule, self._seed = neighbours or {}, likeness, by_rule, seed
        self._rules: dict[int, Rule | None] = {}
        # A baseline's feature may be anywhere: looked up here, it does not make a reader of others read again.
        self._elsewhere = ExtractionStore(store.folder, store.info)
        usable = np.array(sorted(index for index, label in labels.items() if label.is_rule or not by_rule), np.int64)
        frequency = np.log(np.maximum(store.frequency[np.searchsorted(store.indices, usable)], _LEAST_FREQUENCY))
        order = np.argsort(frequency, kind="stable")
        self._others, self._frequency = usable[order], frequency[order]

    def case(self, index: int) -> Case | Unscorable:
        """The case of one labelled feature, or why there is none.

        A method with too few items is left out; the case says so.
        """
        label, evidence = self._labels[index], gather_evidence(self._store, index)
        explained = evidence if label.source is None else _explained(label.source, index)
        copies = Copies(example.token_ids for example in explained.explain) if explained else Copies()
        window, n_held_out = self._pool.window, sum(example.value > 0 for example in evidence.score)
        shown = positives(evidence.score, self._n, window, self._seed, special_ids=self._special_ids, copies=copies)
        if len(shown) < MIN_ITEMS:
            detail = f"It fires in {n_held_out} held-out examples, and {MIN_ITEMS} are needed."
            if n_held_out > len(shown):
                detail += f" {n_held_out - len(shown)} of them are copies of others, or show no text it fires on."
            return Unscorable(index, "too_few_examples", detail)
        if self._by_rule and self._rule(index, evidence) is None:
            detail = f"The rule that “{label.text}” was made from does not come out of this extraction any more."
            return Unscorable(index, "rule_not_derivable", detail)
        rounds: dict[ScoringMethod, list[list[Trial]]] = {}
        left_out: dict[ScoringMethod, tuple[str, str]] = {}
        for method in self._methods:
            items, reason, detail = (
                self._detection(index, shown, copies) if method == "detection" else self._fuzzing(shown)
            )
            if enough(items):
                rounds[method] = items
            else:
                left_out[method] = (reason, detail)
        if not rounds:
            reason, detail = next(iter(left_out.values()))
            return Unscorable(index, reason, detail)  # type: ignore[arg-type]
        return Case(index, label.version, self._claims(index), rounds, left_out)

    def _detection(
        self, index: int, shown: Sequence[Passage], copies: Copies
    ) -> tuple[list[list[Trial]], UnscorableReason, str]:
        """The items, and what to say where they are too few."""
        silent = negatives(
            self._pool,
            index,
            shown,
            len(shown),
            self._kinds,
            neighbours=self._neighbours.get(index, ()),
            likeness=self._likeness(index, shown) if self._likeness is not None else None,
            copies=copies,
            seed=self._seed,
        )
        n_silent = len(self._pool) - len(self._pool.with_feature(index))
        detail = f"It is silent in {n_silent} of the {len(self._pool)} texts, and {MIN_ITEMS} are needed."
        if n_silent >= MIN_ITEMS:
            kinds = " or ".join(self._kinds)
            detail = (
                f"It is silent in {n_silent} of the {len(self._pool)} texts; {len(silent)} of them are {kinds} ones "
                f"that are no copies, and {MIN_ITEMS} are needed."
            )
        return trials("detection", shown[: len(silent)], silent, seed=self._seed), "too_few_negatives", detail

    def _fuzzing(self, shown: Sequence[Passage]) -> tuple[list[list[Trial]], UnscorableReason, str]:
        items = trials("fuzzing", shown, [], special_ids=self._special_ids, seed=self._seed)
        n = sum(not trial.truth for part in items for trial in part)
        detail = f"In {n} of {len(shown)} texts with it there is a token on which it is silent; {MIN_ITEMS} are needed."
        return items, "too_few_silent_tokens", detail

    def _claims(self, index: int) -> dict[str, Claim]:
        claims = {LABEL: self._claim(index)}
        if (other := self._other(index)) is not None:
            claims[OTHER_LABEL] = self._claim(other)
        if (top := self._top_token(index)) is not None:
            claims[TOP_TOKEN] = top
        return claims

    def _claim(self, index: int) -> Claim:
        return Claim(self._labels[index].text, self._rule(index) if self._by_rule else None, index)

    def _rule(self, index: int, evidence: Evidence | None = None) -> Rule | None:
        if index not in self._rules:
            label = self._labels[index]
            found = evidence or gather_evidence(self._elsewhere, index)
            self._rules[index] = derived_rule(found, label.text, self._lexicon) if label.is_rule else None
        return self._rules[index]

    def _other(self, index: int) -> int | None:
        """A labelled feature that fires about as often and is labelled otherwise."""
        own = self._labels[index].text
        frequency = np.log(max(self._store.feature(index).frequency, _LEAST_FREQUENCY))
        # The likest stand side by side: looking further than twice as many as are wanted would be in vain.
        at = int(np.searchsorted(self._frequency, frequency))
        near = slice(max(0, at - 2 * _ALIKE), at + 2 * _ALIKE)
        order = np.argsort(np.abs(self._frequency[near] - frequency), kind="stable")
        ranked = (other for other in self._others[near][order].tolist() if other != index)
        likest = [other for other in ranked if self._labels[other].text != own][:_ALIKE]
        generator = np.random.default_rng([self._seed, index, 2])
        for other in generator.permutation(likest).tolist():
            if not self._by_rule or self._rule(other) is not None:
                return other
        return None

    def _top_token(self, index: int) -> Claim | None:
        """That it fires on the token that carries most of its activation, and on nothing else."""
        tokens = [each for each in self._store.top_tokens(index) if self._lexicon.key[each.token_id] >= 0]
        if not tokens:
            return None
        key = int(self._lexicon.key[max(tokens, key=lambda each: each.count * each.mean).token_id])
        return Claim(f"the token “{self._lexicon.shown_key(key)}”", TokenSet((key,)))


def _explained(source: ExtractionStore, index: int) -> Evidence | None:
    """What another extraction had for a label; None where it was of other features."""
    return gather_evidence(source, index) if index in source.indices else None
