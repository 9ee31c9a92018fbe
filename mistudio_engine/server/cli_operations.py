"""A command for each operation, made from its fields: `mistudio train-sae --model … --wait`.

It knows how a field becomes an option, and how a result is printed; it knows no operation.
"""

from __future__ import annotations

import getpass
import json
import sys
import typing
from typing import Any

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mistudio_engine.api.operations import OPERATIONS, JobOperation, Operation
from mistudio_engine.api.operations.settings import SECRET_KEYS
from mistudio_engine.api.wire import parse_operation

__all__ = ["command_of"]


def command_of(name: str) -> click.Command:
    """The command of the operation called `name`."""
    kind = OPERATIONS[name]
    parameters: list[click.Parameter] = [_option(field, info, kind) for field, info in kind.model_fields.items()]
    parameters += [
        click.Option(["--home", "_home"], help="Data directory [default: MISTUDIO_HOME]."),
        click.Option(["--json", "_json"], is_flag=True, help="Print the result as JSON."),
    ]
    if issubclass(kind, JobOperation):
        parameters.append(
            click.Option(
                ["--wait/--no-wait", "_wait"], default=True, help="Wait for the job's end, with a progress bar."
            )
        )

    def run(_home: str | None, _json: bool, _wait: bool = True, **given: Any) -> None:
        _keep_off_the_command_line(given)
        arguments = {field: _value(text, kind, field) for field, text in given.items() if text not in (None, ())}
        _carry_out(parse_operation(kind, arguments), _home, _json, _wait)

    return click.Command(name.replace("_", "-"), callback=run, params=parameters, help=kind.__doc__)


def _option(field: str, info: Any, kind: type[Operation[Any]]) -> click.Option:
    flag = "--" + field.replace("_", "-")
    hint = _bare(info.annotation)
    required = info.default is PydanticUndefined and info.default_factory is None
    help_text = " ".join((info.description or "").split())
    if not required and info.default not in (None, (), [], "") and not isinstance(info.default, BaseModel):
        help_text += f" [default: {info.default}]"
    if hint is bool:
        return click.Option([f"{flag}/--no-{field.replace('_', '-')}", field], default=None, help=help_text)
    if typing.get_origin(hint) is typing.Literal:
        return click.Option([flag, field], type=click.Choice(typing.get_args(hint)), required=required, help=help_text)
    if typing.get_origin(hint) is list and _bare(typing.get_args(hint)[0]) in (str, int, float):
        return click.Option([flag, field], multiple=True, required=required, help=f"{help_text} May be repeated.")
    if _is_structured(hint):
        return click.Option([flag, field], required=required, help=f"{help_text} As JSON.")
    return click.Option([flag, field], required=required, help=help_text)


def _bare(hint: Any) -> Any:
    """The type under `Annotated` and `| None`."""
    if typing.get_origin(hint) is typing.Annotated:
        return _bare(typing.get_args(hint)[0])
    options = [each for each in typing.get_args(hint) if each is not type(None)]
    if type(None) in typing.get_args(hint) and len(options) == 1:
        return _bare(options[0])
    return hint


def _is_structured(hint: Any) -> bool:
    return typing.get_origin(hint) in (list, dict) or (isinstance(hint, type) and issubclass(hint, BaseModel))


def _keep_off_the_command_line(given: dict[str, Any]) -> None:
    """Ask for a key that is written as `-`; one that is written out stands in the list of processes for all to see."""
    if given.get("key") not in SECRET_KEYS or given.get("value") is None:
        return
    if given["value"] != "-":
        raise click.BadParameter("others can see what stands on a command line: use --value -", param_hint="--value")
    typed = sys.stdin
    given["value"] = getpass.getpass(f"{given['key']}: ") if typed.isatty() else typed.readline().strip()


def _value(text: Any, kind: type[Operation[Any]], field: str) -> Any:
    hint = _bare(kind.model_fields[field].annotation)
    if isinstance(text, tuple):
        return list(text)
    if _is_structured(hint) and isinstance(text, str):
        try:
            return json.loads(text)
        except ValueError as error:
            raise click.BadParameter(
                f"{text!r} is not JSON: {error}", param_hint=f"--{field.replace('_', '-')}"
            ) from None
    return text


def _carry_out(operation: Operation[Any], home: str | None, as_json: bool, wait: bool) -> None:
    from mistudio_engine.api.client import JobHandle, connect

    with connect(home) as studio:
        result = studio.call(operation)
        if isinstance(result, JobHandle) and result.slug == "dry-run":
            result = result.plan
        elif isinstance(result, JobHandle) and wait:
            if not as_json:
                click.echo(f"{result.ref} ({result.operation})", err=True)
            result = result.wait()
    click.echo(result.model_dump_json(indent=2) if as_json else _as_text(result))


def _as_text(result: BaseModel) -> str:
    rows = getattr(result, "rows", None)
    if rows is None:
        return "\n".join(f"{key}: {value}" for key, value in _filled(result).items())
    lines = ["  ".join(f"{key}={value}" for key, value in _filled(row).items()) for row in rows]
    return "\n".join([*lines, f"{len(rows)} of {getattr(result, 'total', len(rows))}"])


def _filled(result: BaseModel) -> dict[str, Any]:
    fields = result.model_dump(mode="json").items()
    return {key: value for key, value in fields if value not in (None, "", [], {})}
