"""Everything that can be said of a word where it stands, as names that can be counted.

A word has names of several kinds (its lemma, its shape, what stands before it, …); a context counts each of them over
all its words, which is what a feature's words are compared with. It knows no features and no activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.discovery.labelling.lexicon import script_of
from mistudio_engine.discovery.nlp import Pipeline, WordFacts
from mistudio_engine.discovery.shapes import shape_of
from mistudio_engine.discovery.words import ContextWords, Word, WordReader

__all__ = ["ContextNames", "Counts", "WordNames", "read_context"]

NEAR = 8
"""Words to each side that are near."""

LONGEST = 3
"""Words of the longest sequence before or after a word."""

_ENDINGS = (4, 3, 2)
_OPENING, _CLOSING, _EITHER = frozenset("“«„「『"), frozenset("”»」』"), frozenset('"')


class WordNames(NamedTuple):
    """Names of one word where it stands, by kind. A kind that the pipeline says nothing of has none."""

    word: tuple[str, ...]
    part_of_speech: tuple[str, ...]
    lemma: tuple[str, ...]
    entity: tuple[str, ...]
    morphology: tuple[str, ...]
    shape: tuple[str, ...]
    script: tuple[str, ...]
    ending: tuple[str, ...]
    position: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    near_before: tuple[str, ...]
    near_after: tuple[str, ...]


class Counts(NamedTuple):
    """Words of a context counted by their names."""

    n_words: int
    names: dict[str, Counter[str]]
    """By kind: how many of the words have each name."""

    tokens: Counter[str]
    """Their tokens, as a person reads them."""


class ContextNames:
    """A context read: words, what the pipeline says of them, where they stand.

    Attributes:
        words: its words.
        strings: its tokens as a person reads them.
        counted: (n_tokens,) those whose words are counted; the others are only seen beside them.
    """

    def __init__(
        self, words: ContextWords, strings: Sequence[str], facts: Sequence[WordFacts], counted: NDArray[np.bool_]
    ) -> None:
        self.words, self.strings, self.counted = words, list(strings), counted
        self._facts = facts
        self._positions = _positions(words.words, facts)
        # What neighbours are told by: spaces alone are none, a new line is.
        self._shown = [i for i, word in enumerate(words.words) if word.text.strip() or "\n" in word.text]
        self._place = {word: place for place, word in enumerate(self._shown)}
        self._norms = [_norm(words.words[i]) for i in self._shown]

    @cached_property
    def counts(self) -> Counts:
        """Of all its words that are counted."""
        return self.count(self.counted)

    def count(self, among: NDArray[np.bool_]) -> Counts:
        """Of the counted words all of whose tokens are among these, (n_tokens,); special tokens are none."""
        among = among & self.counted
        counted = Counts(0, {kind: Counter() for kind in WordNames._fields}, Counter())
        n_words = 0
        for i, word in enumerate(self.words.words):
            if word.special or not among[word.start : word.end].all():
                continue
            n_words += 1
            for kind, names in zip(WordNames._fields, self.names(i), strict=True):
                counted.names[kind].update(names)
            counted.tokens.update(self.strings[word.start : word.end])
        return counted._replace(n_words=n_words)

    def names(self, i: int) -> WordNames:
        """The names of its i-th word."""
        word, facts = self.words.words[i], self._facts[i]
        norm = _norm(word)
        place = self._place.get(i)
        before, after = ([], []) if place is None else self._beside(place)
        return WordNames(
            word=(norm,),
            part_of_speech=_some(facts.part_of_speech),
            lemma=_some(facts.lemma),
            entity=_some(facts.entity),
            morphology=facts.morphology or (),
            shape=(shape_of(word.text),),
            script=(script_of(word.text),) if any(c.isalpha() for c in word.text) else (),
            ending=tuple(norm[-n:] for n in _ENDINGS if len(norm) > n and norm.isalpha()),
            position=self._positions[i],
            before=_sequences(before[::-1][:LONGEST], backwards=True),
            after=_sequences(after[:LONGEST], backwards=False),
            near_before=tuple(dict.fromkeys(before)),
            near_after=tuple(dict.fromkeys(after)),
        )

    def _beside(self, place: int) -> tuple[list[str], list[str]]:
        return self._norms[max(0, place - NEAR) : place], self._norms[place + 1 : place + 1 + NEAR]


def read_context(
    reader: WordReader, pipeline: Pipeline, token_ids: NDArray[np.int32], counted: NDArray[np.bool_]
) -> ContextNames:
    """A context of one tokenizer, (n_tokens,) ids of which some are counted, through a pipeline."""
    words = reader.read(token_ids)
    return ContextNames(words, reader.strings(token_ids), pipeline.read(words), counted)


def _some(name: str | None) -> tuple[str, ...]:
    return (name,) if name else ()


def _norm(word: Word) -> str:
    return word.text if word.special else word.text.casefold()


def _sequences(nearest_first: list[str], *, backwards: bool) -> tuple[str, ...]:
    """The nearest word, the nearest two, … in the order of the text."""
    found = (nearest_first[:n] for n in range(1, len(nearest_first) + 1))
    return tuple(" ".join(some[::-1] if backwards else some) for some in found)


def _positions(words: Sequence[Word], facts: Sequence[WordFacts]) -> list[tuple[str, ...]]:
    """Where each word stands: at the start of the context, of a document, a sentence, a line; in double quotes."""
    found: list[tuple[str, ...]] = []
    begun, at_document, at_line, quoted = False, False, False, False
    for word, fact in zip(words, facts, strict=True):
        if word.special:
            at_document, quoted = begun, False  # before the first word it is the context that starts
            found.append(())
            continue
        is_text = bool(word.text.strip())
        places = {
            "context_start": is_text and not begun,
            "document_start": is_text and at_document,
            "sentence_start": fact.sentence_start,
            "after_newline": is_text and at_line,
            "in_quotes": quoted and not _EITHER & set(word.text) and not _CLOSING & set(word.text),
        }
        found.append(tuple(name for name, holds in places.items() if holds))
        quoted = _is_quoted_after(word.text, quoted)
        if is_text:
            begun, at_document, at_line = True, False, False
        if "\n" in word.text:
            at_line, quoted = True, False  # a quotation that nobody closed ends with its line
    return found


def _is_quoted_after(text: str, quoted: bool) -> bool:
    for c in text:
        if c in _EITHER:
            quoted = not quoted
        elif c in _OPENING or c in _CLOSING:
            quoted = c in _OPENING
    return quoted
