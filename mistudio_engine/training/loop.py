"""Training from beginning to end: batches from a stream into a trainer, as a generator of small steps.

It obeys signals and reports progress; it does not know who listens, where checkpoints are kept (a function does that,
handed in) or what a step does (trainer.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

from torch import Tensor

from mistudio_engine.api.errors import Cancelled
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.saes import SAE
from mistudio_engine.training.trainer import Trainer

__all__ = ["Stream", "Trainer", "train"]

_STEP_SECONDS = 0.15
"""Work between two yields; one optimizer step or forward pass more may follow."""


class Stream(Protocol):
    """What training needs of its data; ActivationStream is one."""

    @property
    def buffer(self) -> Tensor: ...

    def batches(self) -> Iterator[Tensor | None]: ...

    def state(self) -> dict[str, Any]: ...

    def describe(self) -> dict[str, Any]: ...


def train(
    trainer: Trainer, stream: Stream, *, checkpoint: Callable[[Trainer, Any], object] | None = None
) -> Generator[Progress, Signal | None, SAE]:
    """Train until the settings' tokens are done; a trainer and a stream that were restored go on where they stood.

    Args:
        trainer: in any state.
        stream: in the state that belongs to it.
        checkpoint: writes both; called every `hp.checkpoint_interval` tokens and when told to. Without it CHECKPOINT
            is passed over, and nothing claims to be checkpointed.

    Yields:
        Progress; with `metrics` after every `hp.log_interval` steps: those of StepMetrics for that step, `n_tokens` and
        tokens_per_second since the last ones. STOP ends the training early.

    Returns:
        The finished SAE.

    Raises:
        JobFailed: training diverged; the trainer's weights are those before that step.
        Cancelled: stopped before the first step.
    """
    hp = trainer.hp
    batches = stream.batches()
    meter = _Meter(trainer)
    signal: Signal | None = None
    while trainer.n_steps_done < hp.n_steps and signal is not Signal.STOP:
        started = time.monotonic()
        stage, metrics, due = "running the model", None, False
        while time.monotonic() - started < _STEP_SECONDS and metrics is None and not due:
            x = next(batches)
            if x is None:
                continue
            if not trainer.prepared:
                trainer.prepare(stream.buffer)
            measured = trainer.step(x)
            stage = "training"
            is_last = trainer.n_steps_done == hp.n_steps
            if trainer.n_steps_done % hp.log_interval == 0 or is_last:
                metrics = {**measured._asdict(), **meter.read()}
            due = checkpoint is not None and _checkpoint_is_due(trainer)
            if is_last:
                break
        # The metrics first: a kill between a checkpoint and its step's metrics would leave a gap in the history.
        signal = yield meter.progress(stage, metrics, checkpointed=False)
        if due and checkpoint is not None:
            checkpoint(trainer, stream)
            later = yield meter.progress("checkpoint", None, checkpointed=True)
            signal = signal if signal is Signal.STOP else later
        while signal is Signal.CHECKPOINT and checkpoint is not None:
            checkpoint(trainer, stream)
            signal = yield meter.progress("checkpoint", None, checkpointed=True)
    if not trainer.n_steps_done:
        raise Cancelled("Training was stopped before its first step.", fix="Start it again; there was nothing to keep.")
    return trainer.finished_sae(stream.describe())


def _checkpoint_is_due(trainer: Trainer) -> bool:
    interval = trainer.hp.checkpoint_interval
    if interval is None:
        return False
    before = trainer.n_tokens_done - trainer.hp.batch_size
    return before // interval < trainer.n_tokens_done // interval


class _Meter:
    """How fast it goes. Only this reads the clock, so time never reaches the weights."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._at, self._n_tokens = time.monotonic(), trainer.n_tokens_done
        self._rate: float | None = None

    def read(self) -> dict[str, float]:
        """Tokens so far, and per second since the last reading."""
        now, n_tokens = time.monotonic(), self._trainer.n_tokens_done
        self._rate = (n_tokens - self._n_tokens) / max(now - self._at, 1e-9)
        self._at, self._n_tokens = now, n_tokens
        return {"tokens_per_second": self._rate, "n_tokens": float(n_tokens)}

    def progress(self, stage: str, metrics: dict[str, float] | None, *, checkpointed: bool) -> Progress:
        """A step's report."""
        trainer = self._trainer
        left = (trainer.hp.n_steps - trainer.n_steps_done) * trainer.hp.batch_size
        return Progress(
            fraction=trainer.n_steps_done / trainer.hp.n_steps,
            stage=stage,
            rate=self._rate,
            unit="tokens",
            eta_seconds=left / self._rate if self._rate else None,
            metrics=metrics,
            checkpointed=checkpointed,
        )
