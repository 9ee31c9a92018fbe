"""What a word looks like: a number, a date, an address, an identifier of code, a sign, an emoji, a word.

Decided by the characters alone, in any script. It knows no language and no context.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

__all__ = ["SHAPES", "shape_of"]

SHAPES = (
    *("space", "broken", "date", "time", "year", "number", "url", "email", "emoji", "punctuation", "symbol"),
    *("identifier", "upper", "capitalised", "lower", "letters", "mixed"),
)
"""`letters` are of a script without capitals; `broken` are bytes that are no whole character."""

_PATTERNS = (
    ("date", re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}")),
    ("time", re.compile(r"\d{1,2}:\d{2}(:\d{2})?")),
    ("year", re.compile(r"1[0-9]{3}|20[0-9]{2}")),
    ("number", re.compile(r"[+-]?[\d\u00b2\u00b3\u00bc-\u00be]+(?:[.,:'’]\d+)*%?")),
    ("email", re.compile(r"[\w.+-]+@\w[\w-]*(\.\w[\w-]*)+")),
    ("url", re.compile(r"(https?://|www\.)\S+")),
)
_IDENTIFIER = re.compile(r"_*[A-Za-z][A-Za-z0-9]*(_+[A-Za-z0-9]*)+|[a-z]+([A-Z][a-z0-9]*)+|([A-Z][a-z0-9]+){2,}")


@lru_cache(maxsize=100_000)
def shape_of(text: str) -> str:
    """One of SHAPES for a word's text."""
    if not text.strip():
        return "space"
    if set(text) == {"\ufffd"}:
        return "broken"
    for name, pattern in _PATTERNS:
        if pattern.fullmatch(text):
            return name
    categories = {unicodedata.category(c) for c in text}
    kinds = {category[0] for category in categories}
    if "L" not in kinds and "N" not in kinds:
        if "So" in categories:
            return "emoji"
        return "punctuation" if "P" in kinds else "symbol"
    if _IDENTIFIER.fullmatch(text):
        return "identifier"
    if kinds <= {"N", "M", "So"}:  # a keycap, or digits of another script
        return "number"
    if not kinds <= {"L", "M", "P", "C"}:
        return "mixed"
    if text.upper() == text.lower():
        return "letters"
    if text == text.upper() and sum(c.isalpha() for c in text) > 1:
        return "upper"
    return "capitalised" if text != text.lower() else "lower"
