"""An operation as an HTTP request, and an answer as a result: the two directions that client and server share.

It knows paths, queries and bodies, but neither sockets nor what an operation does.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError

from mistudio_engine.api.errors import BadInput, MistudioError
from mistudio_engine.api.operations.base import Operation

__all__ = [
    "API",
    "CALLER_HEADER",
    "Request",
    "error_payload",
    "invalid_arguments",
    "parse_operation",
    "problems_in",
    "request_of",
    "result_of",
]

API = "/api/v1"

CALLER_HEADER = "Mistudio-Caller"
"""Who calls: `person` (the default) or `agent:<name>`; it signs labels and jobs."""


class Request(NamedTuple):
    """What to send."""

    method: str
    path: str
    query: dict[str, str]
    body: dict[str, Any] | None


def request_of(operation: Operation[Any]) -> Request:
    """The request that carries this operation; only fields that were given travel.

    One that was given its default travels, too: it takes the place of a template's.
    """
    route = type(operation).routes[0]
    fields = operation.model_dump(mode="json", exclude_unset=True)
    path = API + route.path
    for name in route.parameters:
        value = str(getattr(operation, name)).rpartition("/")[2].replace("#", ":")
        fields.pop(name, None)
        path = path.replace(f"{{{name}}}", quote(value, safe=":"))
    if route.method in ("GET", "DELETE"):
        query = {name: _query_value(value) for name, value in fields.items() if value is not None}
        return Request(route.method, path, query, None)
    return Request(route.method, path, {}, fields)


def _query_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_operation(kind: type[Operation[Any]], arguments: dict[str, Any]) -> Operation[Any]:
    """The operation with these arguments.

    Raises:
        BadInput: an argument is missing, unknown or out of range; says which, and what was expected.
    """
    try:
        return kind.model_validate(arguments)
    except ValidationError as error:
        raise invalid_arguments(kind, error, kind.tool) from None


def invalid_arguments(kind: type[BaseModel], error: ValidationError, name: str) -> MistudioError:
    """A validation error in our words: every problem with its field, its value and what was expected."""
    known = ", ".join(kind.model_fields)
    return BadInput(
        f"{name} cannot be called like this: {'; '.join(problems_in(error, name))}.",
        fix=f"Its arguments are: {known}." if known else "It takes no arguments.",
    )


def problems_in(error: ValidationError, name: str, within: tuple[str, ...] = ()) -> list[str]:
    """Every problem in a few words: where it is (`within` stands before that), the value, what was expected."""
    problems = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in (*within, *item["loc"])) or "the arguments"
        if item["type"] == "missing":
            problems.append(f"{where} is missing")
        elif item["type"] == "extra_forbidden":
            problems.append(f"{where} is not an argument of {name}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{where} = {_short(item.get('input'))}: {message}")
    return problems


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def error_payload(error: MistudioError) -> dict[str, Any]:
    """The body of an error answer."""
    return {"error": error.body.model_dump(mode="json")}


def result_of(kind: type[Operation[Any]], payload: Any) -> Any:
    """The result of `kind` in a decoded answer."""
    return TypeAdapter(kind.result).validate_python(payload)
