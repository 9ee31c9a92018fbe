"""A real engine with one operation more, whose single step takes a minute: `stubborn_engine.py HOME`.

It stands for a step of a huge model. Run as a program only: in the tests' own process the catalogue stays as it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from typing import Any

from pydantic import BaseModel

from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.base import JobOperation
from mistudio_engine.api.records import Plan
from mistudio_engine.handlers.registry import Planned, plans, runs
from mistudio_engine.server.cli import main


class Dawdled(BaseModel):
    seconds: float


class Dawdle(JobOperation[Dawdled], route="POST /dawdle"):
    """Take a step of a minute."""


@plans(Dawdle)
def plan_dawdle(operation: Dawdle, engine: Any) -> Planned:
    return Planned(Plan(summary="Dawdle."))


@runs(Dawdle, lane="compute", resumes="checkpoint")
def run_dawdle(operation: Dawdle, engine: Any, context: Any) -> Generator[Progress, Signal, Dawdled]:
    yield Progress(stage="dawdling")
    time.sleep(60)
    return Dawdled(seconds=60)


if __name__ == "__main__":
    main(["serve", "--home", sys.argv[1]])
