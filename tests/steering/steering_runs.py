"""What several steering tests run with."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from mistudio_engine.steering.generation import TokenStep
from mistudio_engine.steering.sampling import Sampling

T = TypeVar("T")

GREEDY = Sampling(temperature=0, max_new_tokens=24)
PROMPTS = ["Once upon a time", "The", "Lily and her dog went to"]


def steps_and_result(work: Generator[TokenStep, None, T]) -> tuple[list[TokenStep], T]:
    """All steps of a piece of work, and what it returned."""
    steps = []
    while True:
        try:
            steps.append(next(work))
        except StopIteration as done:
            return steps, done.value


def run(work: Generator[TokenStep, None, T]) -> T:
    """What a piece of work returns."""
    return steps_and_result(work)[1]
