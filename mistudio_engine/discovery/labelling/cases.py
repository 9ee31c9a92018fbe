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
from mistudio_engine.discovery.labelling.labeller import gather_evidence
from mistudio_engine.discovery.labelling.lexicon import TokenLexicon
from mistudio_engine.discovery.labelling.negatives import Pool, negatives
from mistudio_engine.discovery.labelling.passages import NegativeKind, Passage, positives
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
    trials,
)

__all__ = ["CaseMaker", "Labelled", "Unscorable", "UnscorableReason"]

UnscorableReason = Literal["too_few_examples", "too_few_negatives", "rule_not_derivable"]

_ALIKE = 16
"""Features of the likest frequency among which the other label's is drawn."""


class Labelled(NamedTuple):
    """A feature's label that is to be scored, or to serve as a baseline."""

    text: str
    version: int = 1
    is_rule: bool = False
    """It was made as a rule on tokens, which can be derived again."""


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
        likeness: gives (len(pool),) how like each passage of the pool is to these; NaN where that is not known.
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
        likeness: Callable[[Sequence[Passage]], NDArray[np.float32]] | None = None,
        by_rule: bool = False,
        seed: int = 0,
    ) -> None:
        self._store, self._labels, self._pool, self._lexicon = store, labels, pool, lexicon
        self._methods, self._n, self._kinds, self._special_ids = methods, n, kinds, special_ids
        self._neighbours, self._likeness, self._by_rule, self._seed = neighbours or {}, likeness, by_rule, seed
        self._rules: dict[int, Rule | None] = {}
        usable = sorted(index for index, label in labels.items() if label.is_rule or not by_rule)
        self._others = np.array(usable, dtype=np.int64)
        self._frequency = np.log(np.maximum(store.frequency[np.searchsorted(store.indices, self._others)], 1e-12))

    def case(self, index: int) -> Case | Unscorable:
        """The case of one labelled feature, or why there is none.

        A feature that is hardly ever silent has no items for detection, and is judged by fuzzing alone.
        """
        label = self._labels[index]
        shown = positives(gather_evidence(self._store, index).score, self._n, self._pool.window, self._seed)
        if len(shown) < MIN_ITEMS:
            detail = f"It fires in {len(shown)} held-out examples, and {MIN_ITEMS} are needed."
            return Unscorable(index, "too_few_examples", detail)
        if self._by_rule and self._rule(index) is None:
            detail = f"The rule that “{label.text}” was made from does not come out of this extraction any more."
            return Unscorable(index, "rule_not_derivable", detail)
        rounds: dict[ScoringMethod, list[list[Trial]]] = {}
        silent = self._negatives(index, shown) if "detection" in self._methods else []
        if len(silent) >= MIN_ITEMS:
            rounds["detection"] = trials("detection", shown[: len(silent)], silent, seed=self._seed)
        if "fuzzing" in self._methods:
            rounds["fuzzing"] = trials("fuzzing", shown, [], special_ids=self._special_ids, seed=self._seed)
        if not rounds:
            detail = f"It is silent in {len(silent)} of the {len(self._pool)} texts, and {MIN_ITEMS} are needed."
            return Unscorable(index, "too_few_negatives", detail)
        return Case(index, label.version, self._claims(index), rounds)

    def _negatives(self, index: int, shown: Sequence[Passage]) -> list[Passage]:
        likeness = self._likeness(shown) if self._likeness is not None else None
        neighbours = self._neighbours.get(index, ())
        return negatives(
            self._pool,
            index,
            shown,
            len(shown),
            self._kinds,
            neighbours=neighbours,
            likeness=likeness,
            seed=self._seed,
        )

    def _claims(self, index: int) -> dict[str, Claim]:
        claims = {LABEL: self._claim(index)}
        if (other := self._other(index)) is not None:
            claims[OTHER_LABEL] = self._claim(other)
        if (top := self._top_token(index)) is not None:
            claims[TOP_TOKEN] = top
        return claims

    def _claim(self, index: int) -> Claim:
        return Claim(self._labels[index].text, self._rule(index) if self._by_rule else None, index)

    def _rule(self, index: int) -> Rule | None:
        if index not in self._rules:
            label = self._labels[index]
            evidence = gather_evidence(self._store, index)
            self._rules[index] = derived_rule(evidence, label.text, self._lexicon) if label.is_rule else None
        return self._rules[index]

    def _other(self, index: int) -> int | None:
        """A labelled feature that fires about as often and is labelled otherwise."""
        own = self._labels[index].text
        at = int(np.searchsorted(self._store.indices, index))
        distance = np.abs(self._frequency - np.log(max(self._store.frequency[at], 1e-12)))
        ranked = [other for other in self._others[np.argsort(distance, kind="stable")].tolist() if other != index]
        generator = np.random.default_rng([self._seed, index, 2])
        likest = [other for other in ranked[: 2 * _ALIKE] if self._labels[other].text != own][:_ALIKE]
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
