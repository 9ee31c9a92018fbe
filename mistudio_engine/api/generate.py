"""Writes what is derived from the catalogue and kept as files: `python -m mistudio_engine.api.generate`.

`catalogue.txt` lets the command line list every operation without building 50 pydantic classes, and `client.pyi` tells
type checkers and editors the methods that the client makes from the catalogue. A test fails when either is out of date.
"""

from __future__ import annotations

import ast
import pkgutil
import typing
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from mistudio_engine.api.operations import OPERATIONS, JobOperation, Operation

__all__ = ["catalogue", "main", "stub"]

HERE = Path(__file__).parent


def catalogue() -> str:
    """`name<TAB>first sentence` for every operation, sorted."""
    return "".join(f"{name}\t{_summary(kind)}\n" for name, kind in sorted(OPERATIONS.items()))


def _summary(kind: type[Operation[Any]]) -> str:
    paragraph = (kind.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(paragraph.split()).split(". ")[0].rstrip(".:") + "."


def stub() -> str:
    """The client's source with bodies left out and a typed method for every operation."""
    tree = ast.parse((HERE / "client.py").read_text(encoding="utf-8"))
    names: set[str] = set()
    body: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name in ("AsyncStudio", "Studio"):
            body.append(_class(node, [_method(kind, node.name == "Studio", names) for kind in OPERATIONS.values()]))
        elif isinstance(node, ast.ClassDef):
            body.append(_class(node, []))
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            body.append(_signature(node, ""))
    imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    constants = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign) and _is_public(node)]
    header = "# Made by `python -m mistudio_engine.api.generate`: do not edit.\n"
    extra = "from typing import Literal\n" + "\n".join(
        f"from {module} import {name}" for module, name in sorted(_origin(name) for name in names)
    )
    return (
        header + "\n".join(imports) + "\n" + extra + "\n\n" + "\n".join(constants) + "\n\n" + "\n\n".join(body) + "\n"
    )


def _is_public(node: ast.Assign) -> bool:
    return all(isinstance(target, ast.Name) and not target.id.startswith("_") for target in node.targets)


def _class(node: ast.ClassDef, extra: list[str]) -> str:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    lines = [f"class {node.name}({bases}):" if bases else f"class {node.name}:"]
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            lines.append(_signature(item, "    "))
    if node.name == "AsyncStudio":
        lines.append("    home: Path\n    caller: str\n    autostart: bool")
    if node.name == "Studio":
        lines.append("    client: AsyncStudio")
    return "\n".join([*lines, *extra])


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, indent: str) -> str:
    decorators = "".join(f"{indent}@{ast.unparse(each)}\n" for each in node.decorator_list)
    # An async generator is declared without `async`, or it would have to be awaited.
    is_generator = any(isinstance(each, ast.Yield | ast.YieldFrom) for each in ast.walk(node))
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) and not is_generator else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if node.name == "call" and _is_implementation_of_overload(node):
        return ""
    return f"{decorators}{indent}{keyword} {node.name}({ast.unparse(node.args)}){returns}: ..."


def _is_implementation_of_overload(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return isinstance(node, ast.FunctionDef) and not node.decorator_list


def _method(kind: type[Operation[Any]], sync: bool, names: set[str]) -> str:
    parameters = []
    for name, field in kind.model_fields.items():
        annotation = _annotation(field.annotation, names)
        default = "" if field.default is PydanticUndefined and field.default_factory is None else " = ..."
        parameters.append(f"{name}: {annotation}{default}")
    if kind is OPERATIONS["train_sae"]:
        parameters.append("**settings: Any")
    if issubclass(kind, JobOperation):
        result = f"JobHandle[{_annotation(kind.outcome, names)}]" if sync else "Job"
    else:
        result = _annotation(kind.result, names)
    arguments = f", *, {', '.join(parameters)}" if parameters else ""
    return f"    {'' if sync else 'async '}def {kind.tool}(self{arguments}) -> {result}: ..."


def _annotation(hint: Any, names: set[str]) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "None"
    if hint is ...:
        return "..."
    if origin is typing.Annotated:
        return _annotation(arguments[0], names)
    if origin is typing.Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin in (list, dict, tuple):
        return f"{origin.__name__}[{', '.join(_annotation(each, names) for each in arguments)}]"
    if arguments:
        return " | ".join(_annotation(each, names) for each in arguments)
    generic = getattr(hint, "__pydantic_generic_metadata__", {})
    if generic.get("origin"):
        names.add(generic["origin"].__name__)
        return f"{generic['origin'].__name__}[{', '.join(_annotation(each, names) for each in generic['args'])}]"
    if hint.__module__ != "builtins" and hint is not Any:
        names.add(hint.__name__)
    return "Any" if hint is Any else hint.__name__


def _origin(name: str) -> tuple[str, str]:
    from mistudio_engine import api
    from mistudio_engine.api import operations

    for found in pkgutil.iter_modules(api.__path__, f"{api.__name__}."):
        if not found.ispkg and found.name != __name__ and name in getattr(import_module(found.name), "__all__", ()):
            return found.name, name
    return next((vars(operations)[each].__module__, name) for each in dir(operations) if each == name)


def main() -> None:
    """Write both files."""
    (HERE / "catalogue.txt").write_text(catalogue(), encoding="utf-8")
    (HERE / "client.pyi").write_text(stub(), encoding="utf-8")


if __name__ == "__main__":
    main()
