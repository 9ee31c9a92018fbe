"""Jobs for the tests of the job queue: one that a test steps by hand, and one that counts and keeps checkpoints.

Run as a program, it is an engine with nothing but a job queue, to be killed: `counting.py HOME N_UNITS`. It does one
unit for each line that it reads and says each on a line of its own.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from queue import Queue
from typing import ClassVar

from pydantic import BaseModel

from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.base import OPERATIONS, JobOperation
from mistudio_engine.runtime.bus import Bus
from mistudio_engine.runtime.compute import ComputeLane
from mistudio_engine.runtime.files import write_atomic
from mistudio_engine.runtime.jobs import JobContext, Jobs, Runner
from mistudio_engine.runtime.store import Store

CHECKPOINT_UNITS = 10


class Counted(BaseModel):
    n_units: int = 0


class Count(JobOperation[Counted]):
    """Without a route it is not in the catalogue, where tests of completeness would find it."""

    tool: ClassVar[str] = "count"

    n_units: int = 0
    text: str = ""


class Other(Count):
    tool: ClassVar[str] = "other"


class Puppet:
    """Runs a job whose every step a test decides: a Progress is yielded, an exception raised, a Counted returned."""

    def __init__(self) -> None:
        self.steps: Queue[Progress | Exception | Counted] = Queue()
        self.started: Queue[JobContext] = Queue()
        self.signals: Queue[Signal] = Queue()
        self.closed: Queue[str] = Queue()

    def run(self, operation: Count, context: JobContext) -> Generator[Progress, Signal, Counted]:
        self.started.put(context)
        try:
            while True:
                step = self.steps.get(timeout=30)
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Counted):
                    return step
                self.signals.put((yield step))
        finally:
            self.closed.put(context.job.slug)

    def step(self, progress: Progress | None = None) -> None:
        """Lets it do one more step."""
        self.steps.put(progress or Progress())

    def finish(self, n_units: int = 0) -> None:
        """Lets it return."""
        self.steps.put(Counted(n_units=n_units))


class Machine:
    """A job queue with all that it stands on, in one folder."""

    def __init__(self, home: Path, runners: dict[str, Runner], backoff_seconds: tuple[float, ...] = (0.0,) * 3) -> None:
        self.home = home
        self.store = Store(home / "mistudio.db")
        self.bus = Bus(self.store)
        self.lane = ComputeLane()
        self.jobs = Jobs(self.store, self.bus, self.lane, home, runners, backoff_seconds=backoff_seconds)
        self.lane.start()
        self.closed = False

    def close(self, seconds: float = 10.0) -> None:
        if self.closed:
            return
        self.closed = True
        self.jobs.shutdown(seconds)
        self.lane.stop(seconds)
        self.store.close()

    def copy_as_after_a_kill(self, home: Path) -> None:
        """What a kill at this moment would leave on the disk, in another folder."""
        home.mkdir()
        copy = home / "mistudio.db"
        with closing(sqlite3.connect(self.home / "mistudio.db")) as now, closing(sqlite3.connect(copy)) as then:
            now.backup(then)
        if (self.home / "jobs").is_dir():
            shutil.copytree(self.home / "jobs", home / "jobs")

    def events(self, channel: str, *names: str) -> list[str]:
        """Names of the durable events of a channel, or those of the given ones."""
        return [event.event for event in self.store.events_after(0, [channel], names=names or None)]


def count_up(wait_for_unit: Callable[[], object]) -> Callable[..., Generator[Progress, Signal, Counted]]:
    """Counts to `n_units`, one a step; state in its folder every 10 units and when it is told to."""

    def run(operation: Count, context: JobContext) -> Generator[Progress, Signal, Counted]:
        state = context.folder / "state.json"
        done = json.loads(state.read_text()) if state.exists() else 0
        signal = Signal.GO
        while done < operation.n_units and signal is not Signal.STOP:
            wait_for_unit()
            done += 1
            saved = done % CHECKPOINT_UNITS == 0 or signal is Signal.CHECKPOINT
            if saved:
                write_atomic(state, json.dumps(done))
            signal = yield Progress(fraction=done / operation.n_units, metrics={"unit": done}, checkpointed=saved)
            print("unit", done, flush=True)  # by now it has been written down
        return Counted(n_units=done)

    return run


def main(home: str, n_units: str) -> None:
    OPERATIONS[Count.tool] = Count
    machine = Machine(Path(home), {"count": Runner(count_up(sys.stdin.readline), "compute", "checkpoint")})
    machine.jobs.recover()
    job = machine.jobs.submit(Count(n_units=int(n_units), idempotency_key="the only one"), subject="training/t")
    job = machine.jobs.wait(job.slug, 60)
    print(job.state, json.dumps(job.result), flush=True)
    machine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
