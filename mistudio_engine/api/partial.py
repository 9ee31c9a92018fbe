"""Arguments of an operation of which some are still missing: looked at one by one, and laid under others.

It knows what an operation is, and nothing of who keeps such arguments or why.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, SecretBytes, SecretStr, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mistudio_engine.api.errors import BadInput
from mistudio_engine.api.operations.base import Operation
from mistudio_engine.api.wire import problems_in

__all__ = ["checked", "merged", "secrets_in"]

SECRET_NAME = re.compile(r"(?:^|_)(?:token|api_?key|password|passphrase|secret|credentials?)$")
"""Names under which secrets travel; `n_tokens` and `concept_tokens` are none."""

SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_)[A-Za-z0-9_-]{16,}|://[^/\s:@]+:[^/\s@]+@")
"""Tokens of Hugging Face, OpenAI and GitHub, and a password in an address."""


def checked(kind: type[Operation[Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments under the names and in the forms that the operation has for them, as JSON.

    Each is checked by itself, since those that it may contradict are not all there yet.

    Raises:
        BadInput: one is unknown (with what may have been meant), or no value that the operation takes.
    """
    found, names = dict(arguments), _names(kind)
    problems: list[str] = []
    try:
        for each in kind.__pydantic_decorators__.model_validators.values():
            if each.info.mode == "before":  # moves what may be written in more than one way into its place
                found = each.func(found)
    except ValueError as error:
        raise BadInput(f"{kind.tool} cannot be called like this: {error}.", fix="Give each argument once.") from None
    values: dict[str, Any] = {}
    for name, value in found.items():
        field = names.get(name)
        if field is None:
            problems.append(f"{name} is not an argument of {kind.tool}{_meant(name, kind)}")
        elif field in values:
            problems.append(f"{name} and {field} are the same argument")
        else:
            adapter = _adapter(kind.model_fields[field])
            try:
                values[field] = adapter.dump_python(adapter.validate_python(value), mode="json", exclude_unset=True)
            except ValidationError as error:
                problems += problems_in(error, kind.tool, (field,))
    if problems:
        raise BadInput(
            f"{kind.tool} cannot be called like this: {'; '.join(problems)}.",
            fix=f"Its arguments are: {', '.join(kind.model_fields)}.",
        )
    return values


def _adapter(info: FieldInfo) -> TypeAdapter[Any]:
    """What reads a field's values, without its class around it."""
    hint: Any = info.annotation
    for constraint in info.metadata:
        hint = Annotated[hint, constraint]
    return TypeAdapter(hint)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both together: `above` counts where both have something; of settings within settings each one by itself."""
    together = {**below, **above}
    for name in below.keys() & above.keys():
        if isinstance(below[name], Mapping) and isinstance(above[name], Mapping):
            together[name] = merged(below[name], above[name])
    return together


def secrets_in(kind: type[Operation[Any]], arguments: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that are secrets or hold one: by type, by name, or by what the value looks like."""
    declared = {name for name, info in kind.model_fields.items() if _mentions(info.annotation, SecretStr, SecretBytes)}
    return sorted(name for name, value in arguments.items() if name in declared or _holds_secret(name, value))


def _holds_secret(name: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_secret(str(key), each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return any(_holds_secret(name, each) for each in value)
    if value is None:
        return False
    return bool(SECRET_NAME.search(name)) or (isinstance(value, str) and bool(SECRET_VALUE.search(value)))


def _mentions(hint: Any, *kinds: type) -> bool:
    return hint in kinds or any(_mentions(each, *kinds) for each in typing.get_args(hint))


def _names(kind: type[BaseModel]) -> dict[str, str]:
    """The field for every name that an argument may be given under."""
    return {
        alias: name
        for name, info in kind.model_fields.items()
        for alias in (name, *_aliases(info.validation_alias), *_aliases(info.alias))
    }


def _aliases(alias: Any) -> Iterable[str]:
    if isinstance(alias, AliasChoices):
        return [each for each in alias.choices if isinstance(each, str)]
    return [alias] if isinstance(alias, str) else []


def _meant(name: str, kind: type[BaseModel]) -> str:
    known = dict(_names(kind))
    for info in kind.model_fields.values():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            known |= _names(info.annotation)
    likely = difflib.get_close_matches(name, known, 2)
    return f" (did you mean {' or '.join(likely)}?)" if likely else ""
