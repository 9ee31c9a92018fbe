"""Words out of tokens: which word of its text each token of a context lies in.

A tokenizer cuts words to pieces (un|believ|able) and characters to bytes. Each token's bytes are known, and put behind
one another they are the text, so every token has its place in it, to the character; a word is then a run of whole
tokens. Nothing is encoded again: another run of the tokenizer might cut elsewhere. In scripts that put no spaces
between words (Chinese, Japanese, Thai, …) a word is what one token holds. It knows no features and no language.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.models.vocabulary import byte_alphabet, special_ids, token_strings

__all__ = ["ContextWords", "Pieces", "Word", "WordReader", "is_spaceless"]


class Word(NamedTuple):
    """A run of tokens that belong to one word."""

    text: str
    """As it reads, without the spaces around it; of white space itself just that; of a special token its name."""

    start: int
    """Its first token."""

    end: int
    """One past its last token."""

    begin: int
    """Where `text` begins in the context's text."""

    special: bool = False
    """A token that stands for no text."""


class ContextWords(NamedTuple):
    """A context as text and as words. The words' token ranges follow one another without a gap, from 0 to n_tokens."""

    text: str
    """Special tokens left out; a character of which bytes are missing is U+FFFD, one for each byte."""

    offsets: NDArray[np.int64]
    """(n_tokens, 2) where each token begins and ends in `text`; tokens that share a character overlap there."""

    words: list[Word]
    word_of: NDArray[np.int64]
    """(n_tokens,) index of each token's word."""


class Pieces(NamedTuple):
    """A context's text cut at its tokens; joined they are the text."""

    texts: list[str]
    """(n_tokens,) what each token shows; a character that several tokens share is shown by the first of them."""

    shown_by: NDArray[np.int64]
    """(n_tokens,) where to look for each token: itself where it shows anything, else what shows its character."""


class WordReader:
    """Reads contexts of one tokenizer.

    Args:
        tokenizer: of transformers; with a fast one the decoder says how its pieces are spelt.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = json.loads(backend.to_str()) if backend is not None else {}
        self._spell = _spelling(rules)
        self._bytes: dict[int, bytes] = {}

    def read(self, token_ids: Sequence[int] | NDArray[np.integer]) -> ContextWords:
        """The words of a context, (n_tokens,) ids."""
        ids = [int(each) for each in token_ids]
        self._learn(ids)
        raws = [self._bytes[each] for each in ids]
        text, starts = _decoded(b"".join(raws))
        ends_at = np.cumsum([0, *map(len, raws)])  # (n_tokens + 1,) in bytes
        first, whole = starts[ends_at[:-1]], starts[ends_at[1:]]
        # A character of which a token holds only the first bytes is its, too.
        cut = _inside_character(starts, ends_at[1:])
        offsets = np.stack([first, np.where(cut & (ends_at[1:] > ends_at[:-1]), whole + 1, whole)], axis=1)
        is_special = np.array([each in self._special for each in ids], dtype=bool)
        boundary = np.ones(len(text) + 1, dtype=bool)
        for begin, end in _word_spans(text):
            boundary[begin + 1 : end] = False
        # A word may end after token i if the text has a boundary there, and no character is shared with the next one.
        may_end = boundary[np.minimum(whole, len(text))] & ~cut
        may_end |= is_special | np.append(is_special[1:], True)
        words, word_of = self._grouped(text, ids, offsets, may_end, is_special)
        return ContextWords(text, offsets, words, word_of)

    def pieces(self, token_ids: Sequence[int] | NDArray[np.integer]) -> Pieces:
        """The tokens of a context, (n_tokens,) ids, as they read together."""
        read = self.read(token_ids)
        ends = np.maximum.accumulate(read.offsets[:, 1]) if len(read.offsets) else np.zeros(0, dtype=np.int64)
        texts = [read.text[begin:end] for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=False)]
        own = np.arange(len(ends))
        first = np.minimum(np.searchsorted(ends, read.offsets[:, 0], side="right"), own)
        return Pieces(texts, np.where(np.array([bool(text) for text in texts], dtype=bool), own, first))

    def strings(self, token_ids: Iterable[int]) -> list[str]:
        """The tokens themselves as a person reads them."""
        return token_strings(self._tokenizer, token_ids)

    def _grouped(
        self,
        text: str,
        ids: list[int],
        offsets: NDArray[np.int64],
        may_end: NDArray[np.bool_],
        is_special: NDArray[np.bool_],
    ) -> tuple[list[Word], NDArray[np.int64]]:
        words: list[Word] = []
        word_of = np.zeros(len(ids), dtype=np.int64)
        start = 0
        for last in range(len(ids)):
            if last + 1 < len(ids) and not may_end[last]:
                continue
            begin, end = int(offsets[start, 0]), int(offsets[last, 1])
            if is_special[start]:
                words.append(Word(self.strings([ids[start]])[0], start, last + 1, begin, special=True))
            else:
                raw = text[begin:end]
                bare = raw.strip()
                words.append(Word(bare or raw, start, last + 1, begin + (len(raw) - len(raw.lstrip()) if bare else 0)))
            word_of[start : last + 1] = len(words) - 1
            start = last + 1
        return words, word_of

    def _learn(self, ids: Iterable[int]) -> None:
        """Remember the bytes of tokens not seen before."""
        new = [each for each in dict.fromkeys(ids) if each not in self._bytes]
        for token_id, piece in zip(new, self._tokenizer.convert_ids_to_tokens(new), strict=True):
            if token_id in self._special or piece is None:  # models pad their vocabulary with ids that have no token
                self._bytes[token_id] = b""
            elif token_id in self._added:
                self._bytes[token_id] = self._added[token_id].encode()
            else:
                self._bytes[token_id] = self._spell(piece)


def _spelling(rules: dict[str, Any]) -> Any:
    """From a piece of the vocabulary to its bytes, by the rules of the tokenizer's decoder."""
    described = json.dumps([rules.get("decoder"), rules.get("pre_tokenizer")])
    if '"ByteLevel"' in described:
        alphabet = byte_alphabet()
        return lambda piece: bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()
    decoder = rules.get("decoder") or {}
    if decoder.get("type") == "WordPiece":
        prefix = decoder["prefix"]
        # The decoder leaves out the space before these, so that a sentence reads as one.
        close = frozenset(".?!,") if decoder.get("cleanup") else frozenset()
        return lambda piece: (
            piece.removeprefix(prefix) if piece.startswith(prefix) else piece if piece in close else f" {piece}"
        ).encode()
    if decoder.get("type") == "BPEDecoder":
        return lambda piece: piece.replace(decoder["suffix"], " ").encode()
    return _sentencepiece


def _sentencepiece(piece: str) -> bytes:
    """Spaces are written ▁, and a byte of a character that the vocabulary lacks <0xE4>."""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


def _decoded(raw: bytes) -> tuple[str, NDArray[np.int64]]:
    """The text, and for each byte (and the end) which character it lies in."""
    if raw.isascii():
        return raw.decode("ascii"), np.arange(len(raw) + 1)
    text = raw.decode("utf-8", errors="surrogateescape")
    # A lone surrogate stands for one broken byte.
    lengths = [1 if c < "\x80" or "\udc80" <= c <= "\udcff" else len(c.encode()) for c in text]
    at = np.repeat(np.arange(len(text)), lengths)
    return re.sub("[\udc80-\udcff]", "\ufffd", text), np.append(at, len(text))


def _inside_character(at: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the bytes before and after each of `ends` belong to one character."""
    inside = (ends > 0) & (ends < len(at) - 1)
    return inside & (at[np.maximum(ends - 1, 0)] == at[np.minimum(ends, len(at) - 1)])


# Scripts without spaces between words, by the ranges of their letters: Thai, Lao, Tibetan, Myanmar, Khmer, Kana and
# Bopomofo, Han (with its extensions), Yi.
_SPACELESS = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\ua000-\ua4cf\uff66-\uff9f\U00020000-\U0003ffff"
)
_IS_SPACELESS = re.compile(f"[{_SPACELESS}]")


def _marks() -> str:
    """Every combining mark (vowel signs, accents) as part of a character class: to `re` they are no letters."""
    return "".join(chr(c) for c in range(0x300, 0x20000) if unicodedata.category(chr(c))[0] == "M")


_LETTER = rf"(?:(?![{_SPACELESS}])\w)"
_LETTERS = rf"{_LETTER}(?:(?![{_SPACELESS}])[\w{_marks()}])*"
_WORDS = re.compile(
    r"(?:https?://|www\.)[^\s<>\"']*[\w/]|[\w.+-]+@\w[\w-]*(?:\.\w[\w-]*)+"
    rf"|(?:(?<!\w)[^\W\d_]\.){{2,}}"  # U.S.
    rf"|{_LETTERS}(?:['’\u200c\u200d]{_LETTERS}|(?<=\d)[.,:](?=\d){_LETTERS})*"  # don't; 3.14 and 10:30
    r"|(?P<one>[^\w\s])(?P=one)+"  # ... and ----
)


def is_spaceless(text: str) -> bool:
    """Whether a text holds letters of a script that puts no spaces between words."""
    return _IS_SPACELESS.search(text) is not None


def _word_spans(text: str) -> list[tuple[int, int]]:
    """Stretches of a text that are not to be cut, in order; what lies between them is single characters."""
    spans = [match.span() for match in _WORDS.finditer(text)]
    if text.isascii():
        return spans
    # Marks, joiners and skin tones belong to the character before them, and two regional indicators are one flag.
    n_flags = 0
    for i, c in enumerate(text):
        n_flags = n_flags + 1 if "\U0001f1e6" <= c <= "\U0001f1ff" else 0
        joined = _continues(c) or text[i - 1] == "\u200d" or (n_flags and n_flags % 2 == 0)
        if joined and i and not text[i - 1].isspace():
            spans.append((i - 1, i + 1))
    return spans


def _continues(c: str) -> bool:
    return c == "\u200d" or "\U0001f3fb" <= c <= "\U0001f3ff" or (c > "\u02ff" and unicodedata.category(c)[0] == "M")
