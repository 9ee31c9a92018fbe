"""A judge without a language model: the label's own rule, applied to the items.

For labels that are rules in words (token patterns). In detection a rule says yes where it holds on a token of the
passage, in fuzzing where it holds on at least half of the marked ones. A rule looks at a context from its beginning,
so what stands before the passage counts. A label keeps only its words: `derived_rule` finds the rule again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.discovery.extraction_store import Example
from mistudio_engine.discovery.labelling.labeller import Evidence
from mistudio_engine.discovery.labelling.lexicon import TokenLexicon
from mistudio_engine.discovery.labelling.rules import Contexts, Rule
from mistudio_engine.discovery.labelling.scoring import Case, Claim, Judged, Trial, Verdicts
from mistudio_engine.discovery.labelling.token_pattern import rule_for

__all__ = ["RuleJudge", "derived_rule"]

_HOLDS_ON = 0.5
"""Share of the marked tokens on which a rule has to hold to call the marks right."""


def derived_rule(evidence: Evidence, label: str, lexicon: TokenLexicon) -> Rule | None:
    """The rule that a token-pattern label says in words, derived from the evidence as it was for the label.

    None where it comes out otherwise: the extraction or the way of looking for rules is another one by now.
    """
    rule = rule_for(evidence, lexicon)
    return rule if rule is not None and rule.label(lexicon) == label else None


class RuleJudge:
    """Judges claims that are rules.

    Args:
        lexicon: of the vocabulary that the passages' ids are from.
    """

    id = "token_pattern"

    def __init__(self, lexicon: TokenLexicon) -> None:
        self._lexicon = lexicon

    def judge_all(self, cases: Iterable[Case | None]) -> Iterator[Judged | None]:
        """Each case, in order; every claim must have a rule."""
        for case in cases:
            if case is None:
                yield None
                continue
            verdicts = {}
            for method, rounds in case.rounds.items():
                items = [trial for part in rounds for trial in part]
                contexts = Contexts([_as_example(trial) for trial in items], self._lexicon)
                for name, claim in case.claims.items():
                    verdicts[method, name] = Verdicts(self._answers(claim, items, contexts))
            yield Judged(case, verdicts)

    def _answers(self, claim: Claim, items: list[Trial], contexts: Contexts) -> list[bool | None]:
        if claim.rule is None:
            raise ValueError(f"{claim.text!r} has no rule; only a language model can judge it")
        masks = claim.rule.mask(contexts)  # (n, width)
        return [_says_yes(mask, trial) for mask, trial in zip(masks, items, strict=True)]


def _says_yes(mask: NDArray[np.bool_], trial: Trial) -> bool:
    shown = mask[trial.passage.start : len(trial.passage.context_ids)]
    if trial.marked is None:
        return bool(shown.any())
    return bool(shown[trial.marked].mean() >= _HOLDS_ON)


def _as_example(trial: Trial) -> Example:
    """The context up to the passage's end; rules look at ids only."""
    ids = trial.passage.context_ids
    values = np.zeros(len(ids), dtype=np.float32)
    return Example(-1, "random", trial.passage.context, 0, 0.0, None, 0, ids, values)
