"""A writer: puts words on paper one after another, notes the concepts each lies in, and chooses them to a taste.

A *scope* is a concept that is open for a while (a quotation, a passage in the past tense); a word carries the scopes
that are open when it is written. Each scope has its own taste: it likes one half of all words and dislikes the other,
which adds up in log space where scopes overlap. The next word can then only be predicted well by who knows all open
scopes, at every word, and the cheapest form of that knowledge is one direction a scope.

It knows no grammar. The only source of chance is `Random.random`, which gives the same numbers on every platform.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from math import exp
from random import Random
from typing import Any, NamedTuple

__all__ = ["Document", "Word", "Writer"]

TASTE = 1.3
"""How much a scope likes one half of the words and dislikes the other, in nats."""

TASTES = {
    "aside": 1.7, "condition": 1.6, "future": 1.5, "list": 1.7, "negation": 1.7, "past": 1.5, "question": 1.7,
    "spanish": 0.0,
}  # fmt: skip
"""Scopes with another strength than `TASTE`: short ones need a stronger one, and Spanish has its own words."""

RANK_DECAY = 0.04
"""How fast words of a class get rarer with their place in the table, in nats a place."""

NOTHING: frozenset[str] = frozenset()


class Word(NamedTuple):
    """A word or a punctuation mark of a document."""

    start: int
    end: int
    concepts: frozenset[str]


class Document(NamedTuple):
    """A text and its words in order; `text[word.start:word.end]` is the word."""

    text: str
    words: tuple[Word, ...]


@cache
def likes(scope: str, word: str) -> bool:
    """Whether a scope likes a word, which the two names alone decide."""
    return Random(f"{scope}/{word}").random() < 0.5


@cache
def cumulative(words: tuple[Any, ...], scopes: frozenset[str]) -> tuple[float, ...]:
    """Cumulative weights of the words where these scopes are open."""
    weights = []
    for rank, word in enumerate(words):
        name = word if isinstance(word, str) else word[0]
        tastes = (TASTES.get(scope, TASTE) * (1 if likes(scope, name) else -1) for scope in sorted(scopes))
        weights.append(exp(sum(tastes) - RANK_DECAY * rank))
    return tuple(accumulate(weights))


class Writer:
    """A document in the making."""

    def __init__(self, rng: Random) -> None:
        self.random = rng.random
        self.scopes = NOTHING
        self.favoured: Mapping[str, float] = {}
        """What `weighted` chooses more often than its table says, by that factor."""
        self.parts: list[str] = []
        self.words: list[Word] = []
        self.length = 0
        self.at_start = True
        """The next word opens a sentence and gets a capital."""
        self.glued = True
        """The next word follows without a space."""

    def document(self) -> Document:
        return Document("".join(self.parts), tuple(self.words))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def choose(self, words: tuple[Any, ...]) -> Any:
        """One of the words (or of the tuples of word forms), to the taste of the open scopes."""
        weights = cumulative(words, self.scopes)
        return words[bisect(weights, self.random() * weights[-1], 0, len(weights) - 1)]

    def weighted(self, weights: Mapping[str, float]) -> str:
        """A key of the table, as often as its weight and what the document favours say."""
        left = self.random() * sum(weight * self.favoured.get(key, 1.0) for key, weight in weights.items())
        for key, weight in weights.items():
            left -= weight * self.favoured.get(key, 1.0)
            if left < 0:
                break
        return key

    @contextmanager
    def scope(self, *names: str, without: frozenset[str] = NOTHING) -> Iterator[None]:
        """Open scopes, and close others, for the words written inside the block."""
        outer = self.scopes
        self.scopes = outer.difference(without).union(names)
        yield
        self.scopes = outer

    def say(self, form: str, *concepts: str) -> None:
        """Write the words of `form`, which lie in these concepts beside the open scopes."""
        for piece in form.split():
            if self.at_start:
                piece = piece[0].upper() + piece[1:]
                self.at_start = False
            if not self.glued:
                self.parts.append(" ")
                self.length += 1
            self.glued = False
            self.append(piece, concepts)

    def mark(self, mark: str) -> None:
        """Write a punctuation mark onto the word before it."""
        self.append(mark, ())
        self.glued = mark == "\n"

    def open(self, mark: str) -> None:
        """Write an opening mark onto the word after it."""
        at_start, self.at_start = self.at_start, False
        self.say(mark)
        self.at_start, self.glued = at_start, True

    def append(self, piece: str, concepts: tuple[str, ...]) -> None:
        end = self.length + len(piece)
        self.words.append(Word(self.length, end, self.scopes.union(concepts)))
        self.parts.append(piece)
        self.length = end
