"""Rules that say on which tokens of a context a feature fires: on these words, after that one, inside brackets.

A rule looks at a token and at what stands before it, never after: a causal model has seen no more. It can be asked for
its mask on any contexts, and it can say in words what it means. It does not know whether it is true.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.discovery.extraction_store import Example
from mistudio_engine.discovery.labelling.lexicon import KINDS, TokenLexicon

__all__ = [
    "SCOPE_ENDS",
    "Both",
    "Contexts",
    "Ending",
    "Following",
    "InQuotes",
    "Kind",
    "Rule",
    "Scope",
    "ScopeEnd",
    "Start",
    "TokenSet",
]

Mask = NDArray[np.bool_]

_SHOWN = 8
"""Words that a label lists at most."""

_NEVER = -(1 << 20)
"""Position of something that has not happened yet."""


class Contexts:
    """Contexts side by side, padded at the end.

    Attributes:
        ids: (n, width) token ids, the lexicon's padding row behind the text.
        acts: (n, width) the feature's activations.
        counts: (n, width) True at tokens that stand for text.
        key: (n, width) the lexicon's keys.
    """

    def __init__(self, examples: Sequence[Example], lexicon: TokenLexicon) -> None:
        self.lexicon = lexicon
        width = max((len(example.token_ids) for example in examples), default=0)
        self.ids = np.full((len(examples), width), lexicon.pad)
        self.acts = np.zeros((len(examples), width), dtype=np.float32)
        for row, example in enumerate(examples):
            self.ids[row, : len(example.token_ids)] = example.token_ids
            self.acts[row, : len(example.values)] = example.values
        self.key = lexicon.key[self.ids]
        self.counts = self.key >= 0
        self._last_of: dict[frozenset[int], NDArray[np.int64]] = {}

    def last_of(self, keys: frozenset[int]) -> NDArray[np.int64]:
        """(n, width) where one of these keys stood last **before** each token; far below 0 where never."""
        if keys not in self._last_of:
            self._last_of[keys] = _last_before(self.has(keys))
        return self._last_of[keys]

    def has(self, keys: frozenset[int]) -> Mask:
        """Where one of these keys stands."""
        if len(keys) == 1:
            return self.key == next(iter(keys))
        return np.isin(self.key, list(keys))

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """(width,) 0, 1, 2, …"""
        return np.arange(self.ids.shape[1])

    @cached_property
    def last_end(self) -> dict[ScopeEnd, NDArray[np.int64]]:
        """Where a scope of each kind was closed last before each token."""
        lexicon = self.lexicon
        sentence = lexicon.ends_sentence[self.ids] | ~self.counts
        punctuation = lexicon.kind[self.ids] == KINDS.index("punctuation")
        return {
            "sentence": _last_before(sentence),
            "clause": _last_before(sentence | punctuation),
            "bracket": _last_before(lexicon.closes_bracket[self.ids]),
        }

    @cached_property
    def in_quotes(self) -> Mask:
        """Between an opening quotation mark and its closing one, both marks left out."""
        n_before = np.cumsum(self.lexicon.is_quote[self.ids], axis=1)
        inside = (n_before % 2 == 1) & ~self.lexicon.is_quote[self.ids]
        return inside & self.counts


def _last_before(mask: Mask) -> NDArray[np.int64]:
    """(n, width) the last true place strictly before each."""
    place = np.where(mask, np.arange(mask.shape[1]), _NEVER)
    last = np.full(mask.shape, _NEVER)
    last[:, 1:] = np.maximum.accumulate(place, axis=1)[:, :-1]
    return last


class Rule(ABC):
    """A guess at what a feature fires on."""

    @property
    def size(self) -> int:
        """How much has to be said to state it; between two equally good rules the smaller is taken."""
        return 1

    @abstractmethod
    def mask(self, contexts: Contexts) -> Mask:
        """(n, width) where it holds."""

    @abstractmethod
    def label(self, lexicon: TokenLexicon) -> str:
        """In a few words."""

    @abstractmethod
    def category(self, lexicon: TokenLexicon) -> str:
        """As a path."""


@dataclass(frozen=True)
class TokenSet(Rule):
    """One of these tokens, the most telling first."""

    keys: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.keys)

    def mask(self, contexts: Contexts) -> Mask:
        return contexts.has(frozenset(self.keys))

    def label(self, lexicon: TokenLexicon) -> str:
        if len(self.keys) == 1:
            return f"{_ONE[self._kind(lexicon)]} {_quoted(self.keys, lexicon)}"
        listed = ", ".join(lexicon.shown_key(key) for key in self.keys[:_SHOWN])
        return f"{_MANY[self._kind(lexicon)]}: {listed}{', …' if len(self.keys) > _SHOWN else ''}"

    def category(self, lexicon: TokenLexicon) -> str:
        return f"Token > {_NAME[self._kind(lexicon)]}"

    def _kind(self, lexicon: TokenLexicon) -> str:
        ids = np.flatnonzero(np.isin(lexicon.key, self.keys))
        kinds = {KINDS[lexicon.kind[i]] for i in ids}
        if kinds == {"word"} and not lexicon.starts_word[ids].any():
            return "piece"
        return kinds.pop() if len(kinds) == 1 else "mixed"


_ONE = {
    "word": "the word",
    "piece": "the word piece",
    "number": "the number",
    "punctuation": "the punctuation mark",
    "space": "the white space",
    "bytes": "the byte",
    "mixed": "the token",
}
_MANY = {
    "word": "words",
    "piece": "word pieces",
    "number": "numbers",
    "punctuation": "punctuation",
    "space": "white space",
    "bytes": "bytes",
    "mixed": "tokens",
}
_NAME = {
    "word": "Word",
    "piece": "Word piece",
    "number": "Number",
    "punctuation": "Punctuation",
    "space": "White space",
    "bytes": "Bytes",
    "mixed": "Mixed",
}


@dataclass(frozen=True)
class Kind(Rule):
    """Any token of one kind: a number, punctuation, a capitalised word, a script."""

    what: Literal["number", "punctuation", "space", "bytes", "capital", "piece", "script"]
    script: str = ""

    def mask(self, contexts: Contexts) -> Mask:
        lexicon = contexts.lexicon
        match self.what:
            case "capital":
                table = lexicon.is_capital
            case "piece":
                table = (lexicon.kind == 0) & ~lexicon.starts_word
            case "script":
                table = lexicon.script == lexicon.scripts.index(self.script)
            case kind:
                table = lexicon.kind == KINDS.index(kind)
        return table[contexts.ids] & contexts.counts

    def label(self, lexicon: TokenLexicon) -> str:
        if self.what == "script":
            return f"words in {self.script} script"
        return {
            "number": "numbers in digits",
            "punctuation": "punctuation marks",
            "space": "white space",
            "bytes": "bytes of rare characters",
            "capital": "words with a capital letter",
            "piece": "word pieces that go on with a word",
        }[self.what]

    def category(self, lexicon: TokenLexicon) -> str:
        if self.what == "script":
            return f"Token > Script > {self.script}"
        return f"Token > {'Capitalised' if self.what == 'capital' else _NAME[self.what]}"


@dataclass(frozen=True)
class Ending(Rule):
    """Words that end in some letters."""

    letters: str

    @property
    def size(self) -> int:
        return 2

    def mask(self, contexts: Contexts) -> Mask:
        return (contexts.lexicon.ending(len(self.letters)) == self.letters)[contexts.ids]

    def label(self, lexicon: TokenLexicon) -> str:
        return f"words that end in -{self.letters}"

    def category(self, lexicon: TokenLexicon) -> str:
        return f"Token > Ending > -{self.letters}"


@dataclass(frozen=True)
class Following(Rule):
    """One of these tokens stands right before, or a few tokens before."""

    keys: tuple[int, ...]
    within: int

    @property
    def size(self) -> int:
        return len(self.keys) + (self.within > 1)

    def mask(self, contexts: Contexts) -> Mask:
        return (contexts.places - contexts.last_of(frozenset(self.keys)) <= self.within) & contexts.counts

    def label(self, lexicon: TokenLexicon) -> str:
        what = _quoted(self.keys, lexicon)
        return f"after {what}" if self.within == 1 else f"within {self.within} tokens after {what}"

    def category(self, lexicon: TokenLexicon) -> str:
        return f"Context > {'After' if self.within == 1 else 'Soon after'} {_quoted(self.keys[:1], lexicon)}"


ScopeEnd = Literal["sentence", "clause", "bracket"]
SCOPE_ENDS: tuple[ScopeEnd, ...] = ("sentence", "clause", "bracket")


@dataclass(frozen=True)
class Scope(Rule):
    """From one of these tokens (left out) up to the next end of a sentence, punctuation mark or closing bracket."""

    keys: tuple[int, ...]
    end: ScopeEnd

    @property
    def size(self) -> int:
        return len(self.keys) + 1

    def mask(self, contexts: Contexts) -> Mask:
        return (contexts.last_of(frozenset(self.keys)) > contexts.last_end[self.end]) & contexts.counts

    def label(self, lexicon: TokenLexicon) -> str:
        what = _quoted(self.keys, lexicon)
        return {
            "sentence": f"in a sentence after {what}",
            "clause": f"after {what}, up to the next punctuation mark",
            "bracket": f"between {what} and the closing bracket",
        }[self.end]

    def category(self, lexicon: TokenLexicon) -> str:
        where = {"sentence": "Rest of the sentence after", "clause": "Clause after", "bracket": "Inside"}[self.end]
        return f"Context > {where} {_quoted(self.keys[:1], lexicon)}"


@dataclass(frozen=True)
class InQuotes(Rule):
    """Inside quoted speech."""

    def mask(self, contexts: Contexts) -> Mask:
        return contexts.in_quotes

    def label(self, lexicon: TokenLexicon) -> str:
        return "inside quotation marks (quoted speech)"

    def category(self, lexicon: TokenLexicon) -> str:
        return "Context > Inside quotation marks"


@dataclass(frozen=True)
class Start(Rule):
    """The first tokens of a context, or the first token of a sentence."""

    of: Literal["context", "sentence"]
    within: int = 1

    def mask(self, contexts: Contexts) -> Mask:
        if self.of == "sentence":
            return (contexts.places - contexts.last_end["sentence"] == 1) & contexts.counts
        return (np.cumsum(contexts.counts, axis=1) <= self.within) & contexts.counts

    def label(self, lexicon: TokenLexicon) -> str:
        if self.of == "sentence":
            return "the first token of a sentence"
        return "the first token of a text" if self.within == 1 else f"the first {self.within} tokens of a text"

    def category(self, lexicon: TokenLexicon) -> str:
        return f"Position > Start of {'text' if self.of == 'context' else 'sentence'}"


@dataclass(frozen=True)
class Both(Rule):
    """A rule on the token and a rule on what stands before, at once."""

    token: Rule
    context: Rule

    @property
    def size(self) -> int:
        return self.token.size + self.context.size + 5  # two rules fit anything sooner than one does

    def mask(self, contexts: Contexts) -> Mask:
        return self.token.mask(contexts) & self.context.mask(contexts)

    def label(self, lexicon: TokenLexicon) -> str:
        return f"{self.token.label(lexicon)}; {self.context.label(lexicon)}"

    def category(self, lexicon: TokenLexicon) -> str:
        return self.context.category(lexicon)


def _quoted(keys: Sequence[int], lexicon: TokenLexicon) -> str:
    """“not”; “not” or “never”; “a”, “b” or “c”."""
    words = [f"“{lexicon.shown_key(key)}”" for key in keys[:_SHOWN]]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
