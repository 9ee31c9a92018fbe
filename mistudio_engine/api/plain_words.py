"""Words as they may be kept and shown: one line, and nothing in it that cannot be seen or that turns it around.

Joiners are invisible too, but Persian, the scripts of India and emoji are not written without them: they stay where
they join. It knows nothing of what the words say.
"""

from __future__ import annotations

import unicodedata

__all__ = ["plain_line"]

_JOINERS = "\u200c\u200d"


def plain_line(text: str) -> str:
    """The text on one line, with a space for each control, invisible or direction-changing character."""
    if text.isprintable():
        return " ".join(text.split())
    kept = [c if c.isprintable() else _joiner(text, at) if c in _JOINERS else " " for at, c in enumerate(text)]
    return " ".join("".join(kept).split())


def _joiner(text: str, at: int) -> str:
    """The joiner at this place, or nothing where it joins nothing; between Latin letters it would only deceive."""
    return text[at] if 0 < at < len(text) - 1 and _is_joined(text[at - 1]) and _is_joined(text[at + 1]) else ""


def _is_joined(character: str) -> bool:
    """Can a joiner stand beside it: a letter or mark of such a script, or an emoji (or its skin colour)?"""
    is_latin = character.isascii() or unicodedata.name(character, "").startswith("LATIN")
    return not is_latin and unicodedata.category(character)[0] in "LMS"
