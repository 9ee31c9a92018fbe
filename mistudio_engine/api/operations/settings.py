"""Operations on settings of the engine: which language model labels, at what price, and the keys for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mistudio_engine.api.operations.base import Operation
from mistudio_engine.api.records import Data, Page

__all__ = ["SECRET_KEYS", "ListSettings", "SetSetting", "Setting"]

SettingKey = Literal[
    "labelling_provider",
    "labelling_model",
    "labelling_base_url",
    "openai_base_url",
    "ollama_base_url",
    "price_per_million_input",
    "price_per_million_output",
    "embedder",
    "nlp_pipeline",
    "openai_api_key",
    "labelling_api_key",
    "hf_token",
]


SECRET_KEYS = frozenset({"openai_api_key", "labelling_api_key", "hf_token"})


class Setting(Data):
    """One setting."""

    key: str
    value: Any = None
    """What counts now, as it was set or by default; a secret's is never shown."""

    is_set: bool = False
    """Did somebody set it?"""

    source: str | None = None
    """Where the value comes from: `settings`, `secrets.json`, `environment (OPENAI_API_KEY)`, `default`; None without a
    value."""

    secret: bool = False
    description: str = ""


class ListSettings(Operation[Page[Setting]], route="GET /settings"):
    """Every setting with its value, and of secrets only whether and where they are set."""


class SetSetting(Operation[Setting], route="PUT /settings/{key}", idempotent=True):
    """Change a setting, or with null take it back. Only a person may.

    Keys (openai_api_key, labelling_api_key, hf_token) go into a file that only the owner of the engine can read, and
    are never shown again.
    """

    key: SettingKey
    value: Annotated[Any, Field(repr=False)] = None
    """A text or a number; null takes the setting back. On the command line - asks for it without showing it."""
