"""From what a language model wrote to a label that can be kept: one line of plain words, or a reason why not.

Models wrap JSON in prose and fences, repeat the question, and copy text from the dataset that would like to be obeyed.
What comes out of here is short, printable and on one line, whatever went in.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NamedTuple

from mistudio_engine.api.plain_words import plain_line

__all__ = ["NotALabel", "Written", "read_label"]

LONGEST_LABEL, LONGEST_STEP, LONGEST_REASONING = 120, 60, 1000
MOST_WORDS = 16
"""The prompt asks for ten; a label that is a little longer is no failure."""

MOST_STEPS = 5

READ_AT_MOST = 4000
"""Characters of a label, a path or a reasoning that are looked at: nothing that is kept is nearly as long."""

NOTHING = frozenset(("no label", "no pattern", "no clear pattern", "no common pattern", "could not be parsed"))
"""What models write who have nothing to say. It is not a label."""

MAYBE_NOTHING = frozenset(
    (
        *("unknown", "unclear", "undefined", "uncategorized", "none", "nothing", "null", "n/a", "na", "error"),
        *("various", "mixed", "miscellaneous"),
    )
)
"""They write these too, and yet a feature of code may fire on `null`: then its category is more than such a word."""

_AROUND = re.compile(r"""(\*+|`+|["'])((?:(?!\1).)+)\1|[“„«‘]([^“”„«»‘’]+)[”“»’]""")
"""What models put around a label, as a pair."""


class Written(NamedTuple):
    """A label as it may be kept."""

    label: str
    category: str
    reasoning: str


class NotALabel(NamedTuple):
    """Why an answer gives no label."""

    reason: Literal["unparsable", "too_long", "no_pattern"]
    detail: str
    final: bool = False
    """It is what the model wanted to say: asking again would only press it."""


def read_label(text: str) -> Written | NotALabel:
    """The label in an answer."""
    found = _object(text)
    if found is None:
        return NotALabel("unparsable", "it is no JSON object")
    wrong = [name for name in ("label", "category", "reasoning") if not isinstance(found.get(name, ""), str)]
    if "label" not in found or wrong:
        return NotALabel("unparsable", f"{', '.join(wrong) or 'label'} is {'no text' if wrong else 'missing'} in it")
    said, path, reasons = (found.get(name, "")[:READ_AT_MOST] for name in ("label", "category", "reasoning"))
    reasoning = plain_line(reasons)[:LONGEST_REASONING]
    label, category = _bare(said), _path(path)
    if not label or label.casefold() in NOTHING:
        return NotALabel("no_pattern", reasoning or "The model saw nothing that explains it.", final=True)
    if label.casefold() in MAYBE_NOTHING and not category:
        detail = f"“{label}” is no label if it means that there is no pattern (then leave the label empty); if it is "
        return NotALabel("no_pattern", f"{detail}the word itself on which the feature is active, give its category")
    if len(label) > LONGEST_LABEL or len(label.split()) > MOST_WORDS:
        return NotALabel("too_long", f"the label has more than {MOST_WORDS} words or {LONGEST_LABEL} characters")
    return Written(label, category, reasoning)


def _object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text; None without one."""
    decoder = json.JSONDecoder(strict=False)
    at = text.find("{")
    for _ in range(20):  # braces of prose before it
        if at < 0:
            return None
        try:
            found, _end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at = text.find("{", at + 1)
        else:
            return found
    return None


def _bare(text: str) -> str:
    """A label without the quotation marks, asterisks and full stops around it."""
    label = plain_line(text)
    while len(label) <= 2 * LONGEST_LABEL:  # what is longer is none, and would take long to look at
        pair = _AROUND.fullmatch(label)
        inner = (pair[2] or pair[3]) if pair else label.rstrip(". ")
        inner = inner.strip()
        if not inner or inner == label:  # a feature of full stops may be called by one
            break
        label = inner
    return label


def _path(text: str) -> str:
    """`A>B / C` as `A > B / C`: at most five steps, none empty, none long; empty where no step says anything."""
    steps = [step for each in re.split(r"[>›→]", text) if (step := _bare(each)[:LONGEST_STEP].strip())]
    said = any(step.casefold() not in NOTHING | MAYBE_NOTHING for step in steps)
    return " > ".join(steps[:MOST_STEPS]) if said else ""
