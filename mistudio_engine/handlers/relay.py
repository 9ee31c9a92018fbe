"""Work of the science as a job: its steps become progress, and what the job is told reaches it.

It knows neither side.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

from mistudio_engine.api.events import Progress, Signal

__all__ = ["relay"]

Step = TypeVar("Step")
T = TypeVar("T")


def relay(work: Generator[Step, Any, T], say: Callable[[Step], Progress]) -> Generator[Progress, Signal, T]:
    """Does `work` step by step, yields what `say` makes of each step, and answers what it returns.

    Signals are sent on into it, and it is closed with us.
    """
    signal: Signal | None = None
    try:
        while True:
            step = work.send(signal)
            signal = yield say(step)
    except StopIteration as done:
        return done.value
    finally:
        work.close()
