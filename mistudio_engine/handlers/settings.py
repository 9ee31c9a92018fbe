"""Handlers of api/operations/settings.py: what a person sets, with a rule for each value.

`setting` is how the rest of the handlers reads one. Which servers are asked with them is decided elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from mistudio_engine.api.errors import BadInput, Forbidden
from mistudio_engine.api.operations.settings import ListSettings, SetSetting, Setting
from mistudio_engine.api.records import Page
from mistudio_engine.discovery.labelling.addresses import check_address
from mistudio_engine.handlers.registry import handles
from mistudio_engine.runtime.engine import Engine, caller
from mistudio_engine.runtime.secrets import SECRETS, Secrets, looks_secret

__all__ = ["PROVIDERS", "require_person", "setting"]

PROVIDERS = ("token_pattern", "openai", "ollama", "compatible")

_EMBEDDER = re.compile(r"auto|words|local|(openai|ollama|transformers):\S{1,300}")


class _Rule(NamedTuple):
    """One setting: what it is, what counts without it, and what it may be."""

    description: str
    default: Any
    check: Callable[[Any], Any]
    """Gives the value to keep, or raises ValueError with what was expected."""


def _one_of(*known: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in known:
            raise ValueError(f"it is one of {', '.join(known)}")
        return value

    return check


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 200 or not value.isprintable():
        raise ValueError("it is a name of at most 200 printable characters")
    return value.strip()


def _address(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("it is an address such as http://127.0.0.1:8000/v1")
    return check_address(value)


def _price(value: Any) -> float:
    try:
        price = float(value)
    except (TypeError, ValueError):
        price = math.nan
    if isinstance(value, bool) or not 0 <= price <= 1e6:
        raise ValueError("it is a price in US dollars for a million tokens, 0 or more")
    return price


def _embedder(value: Any) -> str:
    if not isinstance(value, str) or not _EMBEDDER.fullmatch(value):
        raise ValueError("it is auto, words, local, openai:<model>, ollama:<model> or transformers:<hub id or folder>")
    return value


RULES = {
    "labelling_provider": _Rule("Who labels features when a call does not say.", "token_pattern", _one_of(*PROVIDERS)),
    "labelling_model": _Rule("Which language model labels when a call does not say.", None, _text),
    "labelling_base_url": _Rule("Where the OpenAI-compatible server (provider compatible) listens.", None, _address),
    "openai_base_url": _Rule("Where OpenAI is, or a gateway to it.", "https://api.openai.com/v1", _address),
    "ollama_base_url": _Rule("Where Ollama listens.", "http://127.0.0.1:11434", _address),
    "price_per_million_input": _Rule("US dollars for a million tokens of a prompt.", None, _price),
    "price_per_million_output": _Rule("US dollars for a million tokens of an answer.", None, _price),
    "nlp_pipeline": _Rule(
        "Which spaCy pipeline analyses words when a call does not say: a package's name or a folder.", None, _text
    ),
    "embedder": _Rule("What compares meanings in searches; it counts from the next search.", "auto", _embedder),
}

SECRET_DESCRIPTIONS = {
    "openai_api_key": "Key for OpenAI.",
    "labelling_api_key": "Key for the OpenAI-compatible server, if it wants one.",
    "hf_token": "Token of the Hugging Face hub.",
}


def setting(engine: Engine, key: str) -> Any:
    """The value that counts now."""
    return engine.store.get_setting(key, RULES[key].default)


def require_person(what: str) -> None:
    """Refuse an agent.

    Raises:
        Forbidden: it is one.
    """
    if caller().startswith("agent:"):
        raise Forbidden(
            f"Only a person may {what}.",
            why=f"{caller()} is an agent, and what it reads might tell it to.",
            fix="Ask the person you work for to do it: set_setting in Python, REST or the command line.",
        )


@handles(ListSettings)
def list_settings(_: ListSettings, engine: Engine) -> Page[Setting]:
    rows = [_shown(engine, key) for key in (*RULES, *SECRETS)]
    return Page[Setting](rows=rows, total=len(rows), shown=len(rows))


@handles(SetSetting)
def set_setting(operation: SetSetting, engine: Engine) -> Setting:
    require_person(f"change the setting {operation.key}")
    if operation.key in SECRETS:
        if operation.value is not None and not isinstance(operation.value, str):
            raise BadInput(f"{operation.key} is a text.", fix="Give the key as it was given to you.")
        Secrets(engine.home).put(operation.key, operation.value)
    else:
        engine.store.put_setting(operation.key, _checked(operation.key, operation.value))
    return _shown(engine, operation.key)


def _checked(key: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, str) and looks_secret(value):  # not repeated here
        raise BadInput(
            f"The value for {key} looks like a key, and settings are shown.",
            fix=f"Keys belong into {', '.join(SECRETS)}.",
        )
    try:
        return RULES[key].check(value)
    except ValueError as error:
        raise BadInput(
            f"{key} cannot be {value!r:.120}: {error}.", fix="Give such a value, or null for none."
        ) from None


def _shown(engine: Engine, key: str) -> Setting:
    if key in SECRETS:
        source = Secrets(engine.home).source(key)
        return Setting(
            key=key, is_set=source is not None, source=source, secret=True, description=SECRET_DESCRIPTIONS[key]
        )
    rule = RULES[key]
    made = engine.store.get_setting(key)
    value = rule.default if made is None else made
    source = "settings" if made is not None else "default" if value is not None else None
    return Setting(key=key, value=value, is_set=made is not None, source=source, description=rule.description)
