"""From what a language model wrote to a label that can be kept: one line of plain words, or a reason why not.

Models wrap JSON in prose and fences, repeat the question, and copy text from the dataset that would like to be obeyed.
What comes out of here is short, printable and on one line, whatever went in.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NamedTuple

__all__ = ["NotALabel", "Written", "read_label"]

LONGEST_LABEL, LONGEST_STEP, LONGEST_REASONING = 120, 60, 1000
MOST_WORDS = 16
"""The prompt asks for ten; a label that is a little longer is no failure."""

MOST_STEPS = 5

NOTHING = frozenset(
    (
        *("unknown", "unclear", "undefined", "uncategorized", "none", "nothing", "null", "n/a", "na", "error"),
        *("no label", "no pattern", "no clear pattern", "could not be parsed", "various", "mixed", "miscellaneous"),
    )
)
"""What models write who have nothing to say. It is not a label."""


_AROUND = "\"'“”‘’`* "
"""What models put around a label."""


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
    reasoning = _line(found.get("reasoning", ""))[:LONGEST_REASONING]
    label = _line(found["label"]).strip(_AROUND)
    label = label.rstrip(f".{_AROUND}") or label  # a feature of full stops may be called by one
    if not label or label.casefold() in NOTHING:
        return NotALabel("no_pattern", reasoning or "The model saw nothing that explains it.", final=True)
    if len(label) > LONGEST_LABEL or len(label.split()) > MOST_WORDS:
        return NotALabel("too_long", f"the label has {len(label.split())} words and {len(label)} characters")
    return Written(label, _path(found.get("category", "")), reasoning)


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


def _line(text: str) -> str:
    """One printable line: no control, invisible or direction-changing characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _path(text: str) -> str:
    """`A>B / C` as `A > B / C`: at most five steps, none empty, none long."""
    steps = (_line(step).strip("\"'“”` ")[:LONGEST_STEP].strip() for step in re.split(r"[>›→]", text))
    return " > ".join([step for step in steps if step and step.casefold() not in NOTHING][:MOST_STEPS])
