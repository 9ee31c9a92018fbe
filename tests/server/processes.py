"""What the tests of engines that are processes share: waiting, killing, and something for an engine to do."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from mistudio_engine.api.client import Studio
from mistudio_engine.api.home import process_alive, read_engine_file
from mistudio_engine.demo.embedded import DEMO_HOOK

WAIT_SECONDS = 60.0


def until(condition: Any, what: str, pause: float = 0.02) -> Any:
    """Wait, bounded, until `condition()` is something; `pause` seconds between two looks."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        threading.Event().wait(pause)
    raise AssertionError(f"{what} did not happen within {WAIT_SECONDS:g} s")


def kill(home: Path) -> None:
    """`kill -9`, and wait until the process is gone."""
    engine = read_engine_file(home)
    assert engine is not None
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: not process_alive(engine.pid), "the engine's end")


def history(studio: Studio, name: str) -> list[int]:
    """The steps, in tokens, whose metrics were recorded, in the order of their recording."""
    rows = studio.training_metrics(training=name, limit=10_000).rows
    return [int(row.values["n_tokens"]) for row in rows if "n_tokens" in row.values]


def start_training(studio: Studio, name: str, n_tokens: int = 400_000) -> Any:
    return studio.train_sae(
        model="tiny",
        dataset="corpus",
        hook_name=DEMO_HOOK,
        d_sae=256,
        k=8,
        name=name,
        n_tokens=n_tokens,
        batch_size=1024,
        buffer_tokens=16_384,
        checkpoint_interval=16_384,
    )


def bring_in(studio: Studio) -> None:
    studio.get_model(source="embedded", name="tiny").wait(WAIT_SECONDS)
    studio.get_dataset(source="embedded", name="corpus", model="tiny", n_tokens=100_000).wait(WAIT_SECONDS)
