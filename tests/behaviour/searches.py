"""What the tests of search share: a question, a feature to ask for, and whether its label is found by what it means."""

from __future__ import annotations

from typing import Any

from mistudio_engine.api.features import FeaturePage
from mistudio_engine.api.operations import SearchFeatures
from mistudio_engine.runtime.engine import Engine


def search(engine: Engine, **arguments: Any) -> FeaturePage:
    return engine.call(SearchFeatures(**arguments))


def some_feature(engine: Engine) -> int:
    """A living feature that is not dense and has a label."""
    return next(row.index for row in search(engine, sae="first", limit=200).rows if row.label)


def assert_found_by_label(engine: Engine, label: str, index: int) -> None:
    """Its label has a vector: the same words are exactly like it."""
    rows = search(engine, query=label, mode="meaning", sae="first").rows
    assert "label 1.00" in next(row.why for row in rows if row.index == index)
