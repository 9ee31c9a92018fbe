"""Labels without a language model: the simplest pattern of tokens that explains where a feature fires.

Rules (rules.py) are proposed from the explain contexts, the one that separates firing tokens from silent ones best
there is taken, and what it is worth is measured on the held-out contexts. A token counts as *firing* at a tenth of the
feature's maximum, as *silent* at 0; what lies between is left out of both. A label says what was seen and nothing more:
“words: cat, dog, horse”, never “animals”.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.discovery.labelling.labeller import Evidence, Label, LabelFailure
from mistudio_engine.discovery.labelling.lexicon import TokenLexicon
from mistudio_engine.discovery.labelling.rules import (
    SCOPE_ENDS,
    Both,
    Contexts,
    Ending,
    Following,
    InQuotes,
    Kind,
    Rule,
    Scope,
    Start,
    TokenSet,
)
from mistudio_engine.discovery.scores import Confusion

__all__ = ["TokenPatternLabeller", "rule_for"]

_FIRES_AT = 0.1
"""Share of the feature's maximum from which a token counts as firing."""

_MIN_CONTEXTS = 2
"""Contexts with firing tokens that each of the two sets must have."""

_MIN_CONFIDENCE = 0.6
"""Below this balanced accuracy a rule is not worth stating."""

_LARGEST_SET = 32
_N_OPENERS = 10
_WINDOWS = (1, 2, 4, 8, 16)
_N_COMBINED = 3
_GOOD_ENOUGH = 0.97
"""From this objective on a simple rule is not refined."""

_COST = 0.004
"""What a rule must gain for each thing more that it says, in units of the objective (0 to 1)."""


class TokenPatternLabeller:
    """Labels features by token patterns.

    Args:
        token_strings: text of each id of the vocabulary, leading spaces kept.
        special_ids: ids that stand for no text.
    """

    id = "token_pattern"

    def __init__(self, token_strings: Sequence[str], special_ids: Iterable[int] = ()) -> None:
        self.lexicon = TokenLexicon(token_strings, frozenset(special_ids))

    def label_all(self, evidence: Iterable[Evidence]) -> Iterator[Label | LabelFailure]:
        """A label or a failure for each, in order, one at a time."""
        for one in evidence:
            yield self.label(one)

    def label(self, evidence: Evidence) -> Label | LabelFailure:
        """The label of one feature, or why it has none."""
        stats = evidence.stats
        if stats.dead:
            return LabelFailure(stats.feature, "dead", "It never fired on these tokens.", self.id)
        explain, score = (_Seen(part, self.lexicon, stats.max) for part in (evidence.explain, evidence.score))
        if min(explain.n_firing_contexts, score.n_firing_contexts) < _MIN_CONTEXTS:
            found = f"{explain.n_firing_contexts} to build a label from and {score.n_firing_contexts} to score it on"
            detail = f"It fires in too few contexts: {found}, at least {_MIN_CONTEXTS} of each are needed."
            return LabelFailure(stats.feature, "too_few_examples", detail, self.id)
        rule = best_rule(explain)
        held_out = score.confusion(rule.mask(score.contexts))
        confidence = held_out.balanced_accuracy
        label = rule.label(self.lexicon)
        if not confidence >= _MIN_CONFIDENCE:  # NaN where nothing is silent
            detail = f"No pattern holds on held-out contexts: the best, “{label}”, has balanced accuracy "
            return LabelFailure(stats.feature, "no_pattern", f"{detail}{confidence:.2f}.", self.id)
        explained = score.share_of_activation(rule.mask(score.contexts))
        return Label(
            feature=stats.feature,
            label=label,
            category=rule.category(self.lexicon),
            confidence=confidence,
            evidence=(
                f"On held-out contexts the rule holds on {held_out.true_positive:.0f} of {score.n_fires} firing tokens "
                f"and on {held_out.false_positive:.0f} of {score.n_silent} silent ones; "
                f"it covers {explained:.0%} of the activation."
            ),
            method=self.id,
            numbers={
                "n_firing": score.n_fires,
                "n_silent": score.n_silent,
                "recall": held_out.recall,
                "specificity": held_out.specificity,
                "precision": held_out.precision if held_out.true_positive else 0.0,
                "activation_explained": explained,
                "n_explain_contexts": len(evidence.explain),
                "n_score_contexts": len(evidence.score),
            },
        )


def rule_for(evidence: Evidence, lexicon: TokenLexicon) -> Rule | None:
    """The rule that a label for this evidence is made of; None where the feature does not fire in it."""
    explain = _Seen(evidence.explain, lexicon, evidence.stats.max)
    return best_rule(explain) if explain.n_fires else None


class _Seen:
    """Contexts with what counts as firing and as silent in them."""

    def __init__(self, examples: Sequence, lexicon: TokenLexicon, maximum: float) -> None:
        self.contexts = Contexts(examples, lexicon)
        acts = self.contexts.acts
        counts = self.contexts.counts.copy()
        for row, example in zip(counts, examples, strict=True):
            row[: len(example.token_ids)] &= example.counted
        self.fires = (acts >= _FIRES_AT * maximum) & (acts > 0) & counts
        self.silent = (acts == 0) & counts
        self.n_fires, self.n_silent = _count(self.fires), _count(self.silent)
        self.n_firing_contexts = int(self.fires.any(axis=1).sum())

    def within(self, mask: NDArray[np.bool_]) -> _Seen:
        """The same with nothing but what lies under the mask."""
        part = copy.copy(self)
        part.fires, part.silent = self.fires & mask, self.silent & mask
        part.n_fires, part.n_silent = _count(part.fires), _count(part.silent)
        return part

    def confusion(self, mask: NDArray[np.bool_]) -> Confusion:
        """The rule's mask against what happened."""
        hits, misses = _count(mask & self.fires), _count(mask & self.silent)
        return Confusion(hits, misses, self.n_silent - misses, self.n_fires - hits)

    def objective(self, rule: Rule) -> float:
        """What a rule is worth: the mean of balanced accuracy and F1, less the cost of stating it.

        Balanced accuracy alone forgives a rule that holds on ten times as many tokens as fire.
        """
        found = self.confusion(rule.mask(self.contexts))
        accuracy = found.balanced_accuracy if self.n_silent else found.recall
        return (accuracy + found.f1) / 2 - _COST * rule.size

    def share_of_activation(self, mask: NDArray[np.bool_]) -> float:
        """Share of the summed activation that lies under the mask, 0 to 1."""
        return float(self.contexts.acts[mask].sum() / self.contexts.acts.sum())


def _count(mask: NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(mask))


def best_rule(seen: _Seen) -> Rule:
    """The rule with the highest objective among those that the contexts suggest."""
    on_token = _ranked(seen, _token_rules(seen))
    on_context = _ranked(seen, _context_rules(seen))
    on_context = _ranked(seen, [*on_context, *_joined(on_context)])
    best = _ranked(seen, [*on_token[:1], *on_context[:1]])[0]
    if seen.objective(best) >= _GOOD_ENOUGH:
        return best
    # A word that fires in one context only, or the words that fire in a context: the second rule is sought again
    # where the first one holds, because there other things are telling.
    pairs: list[Rule] = []
    for token in on_token[:_N_COMBINED]:
        inside = seen.within(token.mask(seen.contexts))
        pairs += (Both(token, context) for context in _ranked(inside, _context_rules(inside))[:_N_COMBINED])
    for context in on_context[:_N_COMBINED]:
        inside = seen.within(context.mask(seen.contexts))
        pairs += (Both(token, context) for token in _ranked(inside, _token_rules(inside))[:_N_COMBINED])
    return _ranked(seen, [best, *pairs])[0]


def _ranked(seen: _Seen, rules: Iterable[Rule]) -> list[Rule]:
    worth = {rule: seen.objective(rule) for rule in rules}
    return sorted(worth, key=lambda rule: -worth[rule])


def _token_rules(seen: _Seen) -> Iterator[Rule]:
    """Sets of the tokens that carry the activation, growing; kinds, scripts and endings that occur among them."""
    contexts, lexicon = seen.contexts, seen.contexts.lexicon
    n_keys = len(lexicon.keys)
    firing, silent = contexts.key[seen.fires], contexts.key[seen.silent]
    mass = np.bincount(firing, weights=contexts.acts[seen.fires], minlength=n_keys)
    precision = np.bincount(firing, minlength=n_keys) / np.maximum(
        np.bincount(firing, minlength=n_keys) + np.bincount(silent, minlength=n_keys), 1
    )
    # A token that fires now and then only would add more silence than firing: it comes last.
    keys = np.flatnonzero(_n_contexts(contexts.key, seen.fires, n_keys) >= min(_MIN_CONTEXTS, seen.n_firing_contexts))
    keys = keys[np.argsort(-(mass * precision)[keys], kind="stable")][:_LARGEST_SET].tolist()
    sizes = {1, 2, 3, 4, 6, 8, 12, 16, 24, len(keys)}
    yield from (TokenSet(tuple(keys[:n])) for n in sorted(sizes) if 0 < n <= len(keys))
    for kind in ("number", "punctuation", "space", "bytes", "capital"):
        yield Kind(kind)
    if not lexicon.starts_word.all():
        yield Kind("piece")
    ids = contexts.ids[seen.fires]
    for script in sorted({lexicon.scripts[i] for i in lexicon.script[ids]} - {"", "Latin"}):
        yield Kind("script", script)
    for n_letters in (4, 3, 2):
        endings, counts = np.unique(lexicon.ending(n_letters)[ids], return_counts=True)
        common = [str(ending) for ending in endings[counts >= 0.2 * len(ids)] if ending]
        yield from (Ending(letters) for letters in common)


def _context_rules(seen: _Seen) -> Iterator[Rule]:
    """What stands before firing tokens more often than before silent ones, near and far; quotes; starts."""
    yield InQuotes()
    yield Start("sentence")
    yield from (Start("context", within) for within in (1, 2, 4, 8))
    for key in _openers(seen):
        yield from (Following((key,), within) for within in _WINDOWS)
        yield from (Scope((key,), end) for end in SCOPE_ENDS)


def _openers(seen: _Seen) -> list[int]:
    """Keys whose share among what stands before firing tokens exceeds that before silent ones most."""
    key = seen.contexts.key
    n_keys = len(seen.contexts.lexicon.keys)
    found: dict[int, None] = {}
    for within in (1, 4, 16):
        excess = np.zeros(n_keys)
        for where, sign in ((seen.fires, 1), (seen.silent, -1)):
            row, place = np.nonzero(where)
            before = place[:, None] - np.arange(1, within + 1)
            keys = np.where(before >= 0, key[row[:, None], before], -1)
            keys = keys[keys >= 0]
            excess += sign * np.bincount(keys, minlength=n_keys) / max(1, len(row))
        best = np.argsort(-excess, kind="stable")[:_N_OPENERS]
        found |= dict.fromkeys(best[excess[best] * seen.n_fires >= _MIN_CONTEXTS].tolist())
    return list(found)


def _n_contexts(key: NDArray[np.int64], where: NDArray[np.bool_], n_keys: int) -> NDArray[np.int64]:
    """(n_keys,) in how many contexts each key stands under the mask: what was seen in one only is no pattern."""
    row, _ = np.nonzero(where)
    pairs = np.unique(row * n_keys + key[where])
    return np.bincount(pairs % n_keys, minlength=n_keys)


def _joined(ranked: Sequence[Rule]) -> Iterator[Rule]:
    """The best rules of one form with their tokens joined: after “not” or “never”."""
    forms: dict[tuple[type, int | str], list[int]] = {}
    for rule in ranked:
        if isinstance(rule, Following):
            forms.setdefault((Following, rule.within), []).extend(rule.keys)
        elif isinstance(rule, Scope):
            forms.setdefault((Scope, rule.end), []).extend(rule.keys)
    for (form, detail), keys in forms.items():
        for n in (2, 3, 4):
            if n <= len(keys):
                yield form(tuple(keys[:n]), detail)
