"""Prompts with variables: `{examples}` stands for the examples of a feature, and `{{` for a brace.

Each variable is a plain name; a format such as `{examples.__class__}` or `{feature:>9}` is refused, and what is put in
is never looked at again, so text from a dataset cannot name a variable. It knows which variables there are, and not
where their values come from.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from string import Formatter

__all__ = ["REQUIRED", "VARIABLES", "check_system_message", "check_user_prompt", "expand"]

VARIABLES = {
    "examples": "contexts in which the feature fires, with the tokens marked «like this» and their activations",
    "negatives": "contexts in which it does not fire",
    "tokens": "the tokens on which it fires, with how often and how strongly",
    "analysis": "parts of speech, lemmas, entities and patterns of these tokens",
    "promoted": "the tokens that it makes more likely",
    "suppressed": "the tokens that it makes less likely",
    "categories": "categories that other features of the SAE have",
    "feature": "its index",
    "layer": "its layer",
    "hook": "its hook",
    "model": "the name of the model",
    "sae": "the name of the SAE",
}
"""What a prompt may name, and what stands in its place."""

REQUIRED = ("examples",)
"""Without these a model could only guess."""


def check_system_message(text: str) -> str:
    """The text as it is.

    Raises:
        ValueError: a variable that there is not, or a brace that is none's.
    """
    _names(text)
    return text


def check_user_prompt(text: str) -> str:
    """The text as it is.

    Raises:
        ValueError: a variable that there is not, a brace that is none's, or one that is required is missing.
    """
    if missing := [name for name in REQUIRED if name not in _names(text)]:
        raise ValueError(f"{{{missing[0]}}} is missing: a label is made from it; {_KNOWN}")
    return text


def expand(text: str, values: Mapping[str, str]) -> str:
    """The text with each variable's value in its place, once.

    Raises:
        ValueError: as for `check_system_message`.
    """
    _names(text)
    return "".join(literal + ("" if name is None else values[name]) for literal, name, _, _ in Formatter().parse(text))


def _names(text: str) -> set[str]:
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"a brace belongs to no variable ({error}); write {{{{ or }}}} for one in the text") from None
    found = set()
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if form or conversion or name not in VARIABLES:
            raise ValueError(f"{_written(name, form, conversion)} is not a variable{_meant(name)}; {_KNOWN}")
        found.add(name)
    return found


def _written(name: str, form: str | None, conversion: str | None) -> str:
    return f"{{{name[:60]}{f'!{conversion}' if conversion else ''}{f':{form[:20]}' if form else ''}}}"


def _meant(name: str) -> str:
    likely = difflib.get_close_matches(name, VARIABLES, 1)
    return f" (did you mean {{{likely[0]}}}?)" if likely else ""


_KNOWN = f"the variables are {', '.join(f'{{{name}}}' for name in VARIABLES)}"
