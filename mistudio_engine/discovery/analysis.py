"""What the words that a feature fires on have in common, each share against text on which the feature is silent.

The words under the prime tokens of its top, quantile and random examples, weighted by the activation there, are
compared with all words of its zero examples (of a feature that fires in nearly every context, with the words beside
which it fires): “95 % nouns” says something only where fewer words are nouns elsewhere.
Tokens that the extraction left out stand beside words and are never compared: nobody knows whether it is silent there.
Examples are strong ones and samples of weaker ones, so the shares describe the feature's activation, not all tokens
on which it fires. It knows neither where examples come from on disk nor where an analysis is kept.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from mistudio_engine.api.analysis import ContextPattern, FeatureAnalysis, SemanticGroup, Share, WordShare
from mistudio_engine.api.errors import EmptyData
from mistudio_engine.discovery.analysis_text import N_ROWS, describe
from mistudio_engine.discovery.context_names import ContextNames, Counts, WordNames, read_context
from mistudio_engine.discovery.extraction_store import Example
from mistudio_engine.discovery.labelling.labeller import is_held_out
from mistudio_engine.discovery.nlp import Pipeline
from mistudio_engine.discovery.words import WordReader

__all__ = ["Analyst"]

S = TypeVar("S", bound=Share)

_N_PATTERNS, _N_GROUPS = 12, 10
_MEMBERS = 8
_WORDS_COMPARED = 100

_MIN_SHARE, _MIN_LIFT = 0.1, 1.5
"""A group or a pattern below is not worth stating."""

_MIN_DEVIATIONS = 4
"""Nor is one whose count lies fewer standard deviations above that of as many silent words: hundreds are looked at."""

_ALIKE = 0.6
"""Cosine of two word vectors from which the words are put into one group."""

_MIN_SILENT_WORDS, _OTHER_CONTEXTS = 100, 12
"""With fewer words in silent contexts, the silent words of so many contexts in which it fires are added to them."""

_WORDS_KEPT = 200_000
"""Words of contexts that are kept read: some hundred MiB at most."""


class _Occurrence(NamedTuple):
    """A place at which the feature fires."""

    weight: float
    token: str
    pieces: list[str]
    text: str
    names: WordNames


class Analyst:
    """Analyses features of one extraction.

    Args:
        tokenizer: of the model that it was made with.
        pipeline: what says what the words are.
        n_examples: at most this many examples of each kind for a feature.
    """

    def __init__(self, tokenizer: Any, pipeline: Pipeline, n_examples: int = 50) -> None:
        self.pipeline, self.n_examples = pipeline, n_examples
        self._reader = WordReader(tokenizer)
        self._read: OrderedDict[int, ContextNames] = OrderedDict()  # features share contexts, the silent ones above all
        self._n_read = 0

    def analyse(self, index: int, examples: Iterable[Example]) -> FeatureAnalysis:
        """The analysis of one feature.

        Args:
            index: the feature.
            examples: of all groups, each with its whole context.

        Raises:
            EmptyData: it fires in none of them.
        """
        examples = list(examples)
        active, silent = self._parted(examples)
        if not active:
            raise EmptyData(
                f"Feature {index} fires on nothing in this extraction, so there are no words to analyse.",
                fix="Choose a living feature, or extract from more tokens.",
            )
        found = self._analysis(index, active, silent)
        # The summary goes into prompts, and a label must not be made from what it will be scored on.
        explaining = self._parted(example for example in examples if not is_held_out(example.context))
        summary = describe(self._analysis(index, *explaining)) if explaining[0] else ""
        return found.model_copy(update={"summary": summary})

    def _analysis(self, index: int, active: list[Example], silent: list[Example]) -> FeatureAnalysis:
        occurrences = [self._occurrence(example) for example in active]
        base = [self._context(example).counts for example in silent]
        n_beside = 0
        if sum(each.n_words for each in base) < _MIN_SILENT_WORDS:
            beside = list({example.context: example for example in active}.values())
            beside = beside[:: -(-len(beside) // _OTHER_CONTEXTS)]  # of all strengths
            base += (counts := [self._context(example).count(example.values == 0) for example in beside])
            n_beside = sum(each.n_words for each in counts)
        tally = _Tally(occurrences, base)
        missing = self.pipeline.missing

        def said(field: str, kind: str) -> list[Share] | None:
            return None if field in missing else tally.shares(kind)

        return FeatureAnalysis(
            index=index,
            pipeline=self.pipeline.name,
            missing=missing,
            advice=self.pipeline.advice,
            n_examples=len(occurrences),
            n_contexts=len({example.context for example in active}),
            n_silent_contexts=len(silent),
            n_silent_words=tally.n_silent,
            n_silent_beside=n_beside,
            tokens=tally.tokens(),
            words=tally.words(),
            part_of_speech=said("part_of_speech", "part_of_speech"),
            lemmas=said("lemmas", "lemma"),
            entities=said("entities", "entity"),
            morphology=said("morphology", "morphology"),
            shapes=tally.shares("shape"),
            scripts=tally.shares("script"),
            groups=tally.groups(self.pipeline),
            patterns=tally.patterns(),
            positions=tally.shares("position"),
            summary="",
        )

    def _parted(self, examples: Iterable[Example]) -> tuple[list[Example], list[Example]]:
        """Places at which it fires, each once, and contexts in which it never does."""
        active: dict[tuple[int, int], Example] = {}
        silent: dict[int, Example] = {}
        seen: Counter[str] = Counter()
        for example in examples:
            seen[example.group] += 1
            if seen[example.group] > self.n_examples:
                continue
            if example.group == "zero":
                silent.setdefault(example.context, example)
            elif example.value > 0:
                active.setdefault((example.context, example.position), example)
        return list(active.values()), list(silent.values())

    def _occurrence(self, example: Example) -> _Occurrence:
        context = self._context(example)
        at = int(context.words.word_of[example.prime])
        word = context.words.words[at]
        pieces = context.strings[word.start : word.end]
        return _Occurrence(example.value, context.strings[example.prime], pieces, word.text, context.names(at))

    def _context(self, example: Example) -> ContextNames:
        number = example.context
        if number not in self._read:
            self._read[number] = read_context(self._reader, self.pipeline, example.token_ids, example.counted)
            self._n_read += len(self._read[number].words.words)
            while self._n_read > _WORDS_KEPT and len(self._read) > 1:
                self._n_read -= len(self._read.popitem(last=False)[1].words.words)
        self._read.move_to_end(number)
        return self._read[number]


class _Tally:
    """Occurrences counted by what can be said of them, against words on which the feature is silent."""

    def __init__(self, occurrences: list[_Occurrence], silent: list[Counts]) -> None:
        self.occurrences, self._silent = occurrences, silent
        self.n_silent = sum(each.n_words for each in silent)
        self._total = math.fsum(each.weight for each in occurrences)

    def shares(self, kind: str) -> list[Share]:
        """Names of one kind, by falling share."""
        return self._table(Share, _named(kind), self._base(kind), self.n_silent)[:N_ROWS]

    def tokens(self) -> list[Share]:
        """Prime tokens."""
        base: Counter[str] = Counter()
        for counts in self._silent:
            base.update(counts.tokens)
        return self._table(Share, lambda each: (each.token,), base, base.total())[:N_ROWS]

    def words(self) -> list[WordShare]:
        """Words, written as in the strongest example."""
        rows = self._table(WordShare, _named("word"), self._base("word"), self.n_silent)[:N_ROWS]
        first = {each.names.word[0]: each for each in sorted(self.occurrences, key=lambda each: each.weight)}
        return [row.model_copy(update={"name": first[row.name].text, "pieces": first[row.name].pieces}) for row in rows]

    def patterns(self) -> list[ContextPattern]:
        """What stands around the word more often than elsewhere; of one sequence within another the longer, if it is
        as frequent."""
        found: list[ContextPattern] = []
        for where in ("before", "after", "near before", "near after"):
            kind = where.replace(" ", "_")
            rows = self._table(ContextPattern, _named(kind), self._base(kind), self.n_silent, where=where)
            found += (row for row in rows if self.tells(row))
        found = sorted(found, key=_telling, reverse=True)
        kept: list[ContextPattern] = []
        for row in sorted(found, key=lambda row: ("near" in row.where, -len(row.name.split(" ")))):
            if not any(other.n >= row.n and _holds(other, row) for other in kept):
                kept.append(row)
        return sorted(kept, key=_telling, reverse=True)[:_N_PATTERNS]

    def groups(self, pipeline: Pipeline) -> list[SemanticGroup]:
        """Words that belong together by one thing or another, the most telling first."""
        found: list[SemanticGroup] = []
        for by in ("lemma", "entity", "morphology", "ending", "script", "shape"):
            names = _named(by)
            rows = self._table(SemanticGroup, names, self._base(by), self.n_silent, by=by)
            found += [self._with_members(row, names) for row in rows if self.tells(row)]
        found += (row for row in self._near_vectors(pipeline) if self.tells(row))
        # One word alone is no group; an ending needs more words before it is no accident.
        found = [row for row in found if len(row.members) > (2 if row.by == "ending" else 1)]
        ranked = sorted(found, key=_telling, reverse=True)
        kept: list[SemanticGroup] = []
        for row in ranked:  # -ing and -ng of the same words are one finding
            if not any(other.by == row.by == "ending" and other.members == row.members for other in kept):
                kept.append(row)
        return kept[:_N_GROUPS]

    def tells(self, row: Share) -> bool:
        """Whether a row is worth stating: not one example alone, and more than chance makes of silent text."""
        if row.n < 2 or row.share < _MIN_SHARE:
            return False
        if row.base is None or row.lift is None:
            return True
        base, n = (row.base * self.n_silent + 1) / (self.n_silent + 1), len(self.occurrences)
        return row.lift >= _MIN_LIFT and row.n - n * base >= _MIN_DEVIATIONS * math.sqrt(n * base * (1 - base))

    def _near_vectors(self, pipeline: Pipeline) -> Iterable[SemanticGroup]:
        """Words put to the first stronger word whose vector is like theirs."""
        words = _strongest(self.occurrences)[:_WORDS_COMPARED]
        vectors = pipeline.vectors(words)
        if vectors is None:
            return []
        leaders: list[int] = []
        group: dict[str, tuple[str, ...]] = {}
        for i, word in enumerate(words):
            near = next((leader for leader in leaders if vectors[leader] @ vectors[i] >= _ALIKE), None)
            if near is None and vectors[i].any():
                leaders.append(near := i)
            if near is not None:
                group[word] = (words[near],)

        def names(each: _Occurrence) -> tuple[str, ...]:
            return group.get(each.names.word[0], ())

        base: Counter[str] = Counter()
        for word, count in self._base("word").items():
            base.update({name: count for name in group.get(word, ())})
        rows = self._table(SemanticGroup, names, base, self.n_silent, by="vectors")
        return [self._with_members(row, names) for row in rows]

    def _with_members(self, row: SemanticGroup, names: Callable[[_Occurrence], Iterable[str]]) -> SemanticGroup:
        members = _strongest(each for each in self.occurrences if row.name in names(each))
        return row.model_copy(update={"members": members[:_MEMBERS]})

    def _base(self, kind: str) -> Counter[str]:
        counted: Counter[str] = Counter()
        for counts in self._silent:
            counted.update(counts.names[kind])
        return counted

    def _table(
        self,
        row: type[S],
        names: Callable[[_Occurrence], Iterable[str]],
        base: Counter[str],
        n_base: int,
        **fields: Any,
    ) -> list[S]:
        """A row for each name among the occurrences, by falling share, then by name."""
        weights: dict[str, list[float]] = {}
        for each in self.occurrences:
            for name in set(names(each)):
                weights.setdefault(name, []).append(each.weight)
        rows = []
        for name, some in weights.items():
            share = math.fsum(some) / self._total
            rows.append(
                row(
                    name=name,
                    n=len(some),
                    share=min(share, 1.0),
                    base=base[name] / n_base if n_base else None,
                    lift=share * (n_base + 1) / (base[name] + 1) if n_base else None,
                    **fields,
                )
            )
        return sorted(rows, key=lambda each: (-each.share, each.name))


def _named(kind: str) -> Callable[[_Occurrence], tuple[str, ...]]:
    return lambda each: getattr(each.names, kind)


def _strongest(occurrences: Iterable[_Occurrence]) -> list[str]:
    """The words under them, by falling activation."""
    weights: dict[str, float] = {}
    for each in occurrences:
        word = each.names.word[0]
        weights[word] = weights.get(word, 0.0) + each.weight
    return sorted(weights, key=lambda word: (-weights[word], word))


def _telling(row: Share) -> tuple[float, str]:
    """Its part of the divergence of the feature's words from others, in bits: frequent and unusual comes first."""
    return row.share * math.log2(row.lift or _MIN_LIFT), row.name


def _holds(longer: ContextPattern, row: ContextPattern) -> bool:
    """Whether what `row` says is said by a pattern that is kept."""
    if not longer.where.endswith(row.where.removeprefix("near ")):
        return False
    words, part = longer.name.split(" "), row.name.split(" ")
    return any(words[i : i + len(part)] == part for i in range(len(words)))
