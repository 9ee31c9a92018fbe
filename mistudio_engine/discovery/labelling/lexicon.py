"""What each token of a vocabulary is to look at: word, number, punctuation, its script, its capital, its ending.

Decided by Unicode categories, so that no other script is taken for punctuation. It knows tokens one by one, and nothing
of contexts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from functools import cache

import numpy as np

__all__ = ["KINDS", "TokenLexicon", "shown"]

KINDS = ("word", "number", "punctuation", "space", "bytes", "mixed", "special")
"""A word is of letters; mixed is of letters and something else."""

_SENTENCE_ENDS = frozenset(".!?。！？…؟।")
_CLOSING = frozenset(")]}）】」』")
_QUOTES = frozenset('"“”„«»「」『』‟❝❞')
_LONGEST_SHOWN = 24
_SHORT, _LONGEST_PIECE = 2, 3
"""Letters of a token without a space before it that is taken for a piece of words: always, or if it is no word."""


class TokenLexicon:
    """The vocabulary in columns, by token id; one more row stands for padding.

    Args:
        token_strings: text of each id, leading spaces kept.
        special_ids: ids that stand for no text.

    Attributes:
        texts: text of each id.
        key: (n + 1,) the same number for words that differ only in case and in spaces around; -1 for special ones.
        kind: (n + 1,) index into KINDS.
        is_capital: (n + 1,) begins with a capital letter.
        starts_word: (n + 1,) begins with a space, or the vocabulary has no such tokens at all.
        ends_sentence: (n + 1,) holds a full stop, an exclamation or a question mark, or begins a new line.
        closes_bracket: (n + 1,) holds a closing bracket.
        is_quote: (n + 1,) holds a double quotation mark.
        script: (n + 1,) index into `scripts`; 0 where there is none.
        scripts: names such as Latin, Cyrillic, Cjk.
    """

    def __init__(self, token_strings: Sequence[str], special_ids: Collection[int] = ()) -> None:
        self.texts = [*token_strings, ""]
        n = len(self.texts)
        self.pad = n - 1
        special = frozenset(special_ids) | {self.pad}
        self.kind = np.array([KINDS.index("special" if i in special else kind_of(t)) for i, t in enumerate(self.texts)])
        cores = [text.strip() or text for text in self.texts]
        self.starts_word = np.array([text[:1].isspace() and bool(text.strip()) for text in self.texts])
        if not self.starts_word.any():
            self.starts_word[:] = True
        self._known = frozenset(self.texts)
        names = [self._key_name(i, core) for i, core in enumerate(cores)]
        self.keys = sorted({name for i, name in enumerate(names) if i not in special})
        number = {name: i for i, name in enumerate(self.keys)}
        self.key = np.array([-1 if i in special else number[name] for i, name in enumerate(names)])
        self.is_capital = np.array([core[:1] != core[:1].lower() for core in cores])
        is_punctuation = self.kind == KINDS.index("punctuation")
        self.ends_sentence = is_punctuation & self._holds(_SENTENCE_ENDS) | self._holds("\n")
        self.closes_bracket = is_punctuation & self._holds(_CLOSING)
        self.is_quote = is_punctuation & self._holds(_QUOTES)
        scripts = [script_of(core) if self.kind[i] == 0 else "" for i, core in enumerate(cores)]
        self.scripts = ["", *sorted(set(scripts) - {""})]
        self.script = np.array([self.scripts.index(script) for script in scripts])
        self._endings: dict[int, np.ndarray] = {}
        self._shown_key = {
            int(key): name if name.startswith("-") else core
            for key, name, core in zip(self.key[::-1], names[::-1], cores[::-1], strict=True)
        }

    def _holds(self, characters: Collection[str]) -> np.ndarray:
        """(n + 1,) whether a token holds one of these characters."""
        return np.array([any(c in text for c in characters) for text in self.texts])

    def ending(self, n_letters: int) -> np.ndarray:
        """(n + 1,) the last letters of words that have more than these, else ""."""
        if n_letters not in self._endings:
            words = [t.strip().casefold() if self.kind[i] == 0 else "" for i, t in enumerate(self.texts)]
            self._endings[n_letters] = np.array([w[-n_letters:] if len(w) > n_letters else "" for w in words])
        return self._endings[n_letters]

    def shown_key(self, key: int) -> str:
        """A token's text for people, as the first id of this key has it; a piece inside words with a hyphen before."""
        return shown(self._shown_key[key])

    def _key_name(self, token_id: int, core: str) -> str:
        """Words differ neither in case nor in spaces. Pieces of one or two letters do: they are all they have."""
        if self.kind[token_id] != 0:
            return core.casefold()
        is_piece = len(core) <= _SHORT or (len(core) <= _LONGEST_PIECE and f" {core}" not in self._known)
        if is_piece and core == core.lower() and not self.starts_word[token_id]:
            return f"-{core}"
        return core if len(core) <= _SHORT else core.casefold()


@cache
def kind_of(text: str) -> str:
    """The kind of a token's text."""
    core = text.strip()
    if not core:
        return "space"
    if core.startswith("<0x") and core.endswith(">"):
        return "bytes"
    letters = {unicodedata.category(c)[0] for c in core}
    if letters <= {"L", "M"} or (letters <= {"L", "M", "P"} and core.strip("'’-").replace("'", "").isalpha()):
        return "word"
    if "N" in letters and letters <= {"N", "P", "S"}:
        return "number"
    if letters <= {"P", "S"}:
        return "punctuation"
    return "mixed"


def script_of(core: str) -> str:
    """The script of a word: the first word of its first letter's Unicode name, as in CYRILLIC SMALL LETTER A."""
    letter = next((c for c in core if c.isalpha()), "")
    return unicodedata.name(letter, "").partition(" ")[0].capitalize()


def shown(text: str) -> str:
    """Dataset text as it may stand in a label: one line, printable, not long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"
