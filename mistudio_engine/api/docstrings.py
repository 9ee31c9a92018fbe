"""A docstring under each field becomes the field's description, found by reading each module's source once.

Pydantic's `use_attribute_docstrings` does the same class by class and asks `inspect` each time, which costs half a
second for a catalogue of this size; a client that has to answer at once cannot spend that. It knows no operations.
"""

from __future__ import annotations

import ast
import sys
from functools import cache

from pydantic import BaseModel

__all__ = ["describe_fields"]


def describe_fields(cls: type[BaseModel]) -> None:
    """Give each field of `cls` that has no description its docstring; before the class's schema is built."""
    documented = _documented(str(getattr(sys.modules.get(cls.__module__), "__file__", "")))
    docs = documented.get(cls.__name__, {})
    for name, field in cls.model_fields.items():
        if field.description is None and name in docs:
            field.description = docs[name]


@cache
def _documented(path: str) -> dict[str, dict[str, str]]:
    """Docstrings by class and attribute of a source file; none where there is no source."""
    if not path.endswith(".py"):
        return {}
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    return {node.name: _attributes(node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _attributes(node: ast.ClassDef) -> dict[str, str]:
    docs: dict[str, str] = {}
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs
