"""A real engine with one operation more, which loses its device: `lossy_engine.py HOME`.

The operation counts on the compute thread, with a checkpoint each step, and raises what torch raises after a sticky
CUDA error. On a machine with a GPU `real` makes a kernel assert, so that the context is poisoned indeed. Run as a
program only: in the tests' own process the catalogue stays as it is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from typing import Any

from pydantic import BaseModel

from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.base import JobOperation
from mistudio_engine.api.records import Plan
from mistudio_engine.handlers.registry import Planned, plans, runs
from mistudio_engine.runtime.files import write_atomic
from mistudio_engine.server.cli import main


class Counted(BaseModel):
    pids: list[int]
    """The process that did each unit."""


class LoseDevice(JobOperation[Counted], route="POST /lose-device"):
    """Count, and lose the device on the way."""

    n_units: int = 6
    lost_at: int | None = None
    """Before this unit, the first time that it is reached."""

    always: bool = False
    """Each time that it is reached."""

    real: bool = False


@plans(LoseDevice)
def plan_lose_device(operation: LoseDevice, engine: Any) -> Planned:
    return Planned(Plan(summary="Count."), subject="training/counted")


@runs(LoseDevice, lane="compute", resumes="checkpoint")
def run_lose_device(operation: LoseDevice, engine: Any, context: Any) -> Generator[Progress, Signal, Counted]:
    state, mark = context.folder / "state.json", context.folder / "lost"
    pids: list[int] = json.loads(state.read_text()) if state.exists() else []
    while len(pids) < operation.n_units:
        if len(pids) == operation.lost_at and (operation.always or not mark.exists()):
            mark.touch()
            lose_device(operation.real)
        pids.append(os.getpid())
        write_atomic(state, json.dumps(pids))
        yield Progress(fraction=len(pids) / operation.n_units, checkpointed=True)
    return Counted(pids=pids)


def lose_device(real: bool) -> None:
    import torch

    if real:
        # The index is checked by the kernel: it asserts on the device.
        torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")].sum().item()
    raise torch.AcceleratorError(
        "CUDA error: an illegal memory access was encountered\n"
        "CUDA kernel errors might be asynchronously reported at some other API call.\n"
    )


if __name__ == "__main__":
    main(["serve", "--home", sys.argv[1]])
