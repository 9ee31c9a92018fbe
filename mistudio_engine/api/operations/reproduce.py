"""The operation that makes a result again and says whether it is the same."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from mistudio_engine.api.operations.base import JobOperation
from mistudio_engine.api.records import Data
from mistudio_engine.api.refs import Slug, kind_and_slug, slug_of

__all__ = ["Change", "Reproduce", "Reproduction"]

REPRODUCIBLE = ("training", "sae", "job")


def _result_ref(text: str) -> str:
    kind, _ = kind_and_slug(text)
    if kind not in REPRODUCIBLE:
        raise ValueError(f"a {kind} cannot be made again; name what trained it: training/NAME, sae/NAME or job/NAME")
    return f"{kind}/{slug_of(kind, text)}"


class Change(Data):
    """Something that was otherwise then."""

    what: str
    """Such as torch, n_threads or tokens.sha256."""

    then: Any = None
    now: Any = None


class Reproduction(Data):
    """Whether a result came out the same again."""

    ref: str
    """What was made again."""

    made: str
    """Ref of the second one; it stays until somebody deletes it."""

    identical: bool
    """Every tensor has the same bits."""

    n_tensors: int
    differing: list[str] = []
    """Tensors that differ, or that only one of the two has."""

    changes: list[Change] = []
    """What is recorded of how each was made, where that differs: versions, threads, data, model, settings; and
    `files.…` that are no longer what is recorded of them."""

    summary: str
    """All of it in a sentence."""


class Reproduce(JobOperation[Reproduction], route="POST /reproduce"):
    """Make a training's SAEs again from what is recorded of it, under a new name, and compare the weights bit by bit.

    The same bits can be expected from the same versions, thread count and device; what differs is said.
    """

    ref: Annotated[str, AfterValidator(_result_ref)]
    """training/NAME, sae/NAME, or the job/NAME that trained it."""

    name: Slug | None = None
    """Slug of the new training; by default NAME-again."""
