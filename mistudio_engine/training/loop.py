"""Training from beginning to end: batches from a stream into one or more trainers, as a generator of small steps.

One forward pass of the language model feeds all of them. It obeys signals and reports progress; it does not know who
listens, where checkpoints are kept (a function does that, handed in) or what a step does (trainer.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput, Cancelled, JobFailed
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.saes import SAE
from mistudio_engine.training.trainer import Trainer

__all__ = ["Member", "Stream", "Trainer", "train"]

_STEP_SECONDS = 0.15
"""Work between two yields; one optimizer step or forward pass more may follow."""


class Stream(Protocol):
    """What training needs of its data; ActivationStream is one."""

    @property
    def buffer(self) -> Mapping[str, Tensor]: ...

    def batches(self) -> Iterator[Mapping[str, Tensor] | None]: ...

    def state(self) -> dict[str, Any]: ...

    def describe(self, hook_name: str) -> dict[str, Any]: ...


@dataclass
class Member:
    """One SAE of a training, and which activations it takes."""

    name: str
    trainer: Trainer
    hook_name: str
    hook_name_out: str | None = None
    """What a transcoder predicts."""

    failure: JobFailed | None = None
    """Why it goes on no further; its weights are those before that step."""

    def prepare(self, buffer: Mapping[str, Tensor]) -> None:
        """Estimate its scaling on the first activations."""
        if not self.trainer.prepared:
            self.trainer.prepare(buffer[self.hook_name], buffer[self.hook_name_out] if self.hook_name_out else None)

    def step(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """One optimizer step; its metrics by name."""
        target = batch[self.hook_name_out] if self.hook_name_out else None
        return self.trainer.step(batch[self.hook_name], target)._asdict()

    def finished_sae(self, stream: Stream) -> SAE:
        """The SAE as others can use it."""
        trained_on = stream.describe(self.hook_name)
        return self.trainer.finished_sae(trained_on | {"hook_name_out": self.hook_name_out})


def train(
    members: Sequence[Member],
    stream: Stream,
    *,
    checkpoint: Callable[[Sequence[Member], Stream, bool], Generator[Progress, Signal | None, object]] | None = None,
) -> Generator[Progress, Signal | None, dict[str, SAE]]:
    """Train until the settings' tokens are done; trainers and a stream that were restored go on where they stood.

    Args:
        members: in the same state all; their settings of length (n_tokens, batch_size and the intervals) are the same.
        stream: in the state that belongs to it.
        checkpoint: writes all of it, perhaps in steps of its own, to which signals are passed on; called every
            `hp.checkpoint_interval` tokens, at the end, and, with True since somebody waits, when told to. Without it
            CHECKPOINT is passed over, and nothing claims to be checkpointed.

    Yields:
        Progress; with `metrics` after every `hp.log_interval` steps: those of StepMetrics for that step, `n_tokens`,
        `tokens_per_second` since the last ones and `memory_bytes`; of several members as `name/metric`. STOP ends the
        training early.

    Returns:
        The finished SAEs by name; of members that failed, none.

    Raises:
        JobFailed: every member diverged; their weights are those before that step.
        BadInput: the activations of the last one that was left are not finite, or all zero.
        Cancelled: stopped before the first step.
    """
    hp = members[0].trainer.hp
    batches = stream.batches()
    meter = _Meter(members)
    signal: Signal | None = None
    saved_at = meter.n_steps_done or -1
    while meter.n_steps_done < hp.n_steps and signal is not Signal.STOP:
        started = time.monotonic()
        stage, metrics, due = "running the model", None, False
        while time.monotonic() - started < _STEP_SECONDS and metrics is None and not due:
            batch = next(batches)
            if batch is None:
                continue
            measured = _step(members, batch, stream)
            meter.n_steps_done += 1
            stage = "training"
            is_last = meter.n_steps_done == hp.n_steps
            if meter.n_steps_done % hp.log_interval == 0 or is_last:
                metrics = {**measured, **meter.read()}
            due = is_last or _is_due(hp.checkpoint_interval, meter.n_steps_done, hp.batch_size)
            if is_last:
                break
        # The metrics first: a kill between a checkpoint and its step's metrics would leave a gap in the history.
        signal = yield meter.progress(stage, metrics)
        if checkpoint is None:
            continue
        while due or signal is Signal.CHECKPOINT:
            urgent = signal is Signal.CHECKPOINT
            later = yield from _saved(checkpoint(members, stream, urgent), meter)
            saved_at = meter.n_steps_done
            signal, due = signal if signal is Signal.STOP else later, False
    if not meter.n_steps_done:
        raise Cancelled("Training was stopped before its first step.", fix="Start it again; there was nothing to keep.")
    if checkpoint is not None and saved_at != meter.n_steps_done:
        yield from _saved(checkpoint(members, stream, True), meter)  # so that what was stopped can be extended
    return {member.name: member.finished_sae(stream) for member in members if member.failure is None}


def _step(members: Sequence[Member], batch: Mapping[str, Tensor], stream: Stream) -> dict[str, float]:
    """One step of every member that goes on; one that diverges is left behind, unless it was the last."""
    metrics: dict[str, float] = {}
    for member in members:
        if member.failure is not None:
            continue
        try:
            member.prepare(stream.buffer)
            measured = member.step(batch)
        except (JobFailed, BadInput) as error:  # it diverges, or its activations overflow from the start
            member.failure = JobFailed(error.what, why=error.why, fix=error.fix)
            if all(each.failure is not None for each in members):
                raise
            member.trainer.warnings.append(f"{member.name} goes on no further. {error}")
            continue
        metrics |= measured if len(members) == 1 else {f"{member.name}/{name}": v for name, v in measured.items()}
    return metrics


def _saved(
    writing: Generator[Progress, Signal | None, object], meter: _Meter
) -> Generator[Progress, Signal | None, Signal | None]:
    """Have a checkpoint written; answers the last signal, or STOP when that came on the way."""
    stopped, said = False, None
    try:
        while True:
            step = writing.send(said)
            said = yield step.model_copy(update={"fraction": meter.fraction})
            stopped = stopped or said is Signal.STOP
    except StopIteration:
        pass
    finally:
        writing.close()
    said = yield meter.progress("checkpoint", None, checkpointed=True)
    return Signal.STOP if stopped else said


def _is_due(interval: int | None, n_steps_done: int, batch_size: int) -> bool:
    if interval is None:
        return False
    return (n_steps_done - 1) * batch_size // interval < n_steps_done * batch_size // interval


class _Meter:
    """How far and how fast it goes. Only this reads the clock, so time never reaches the weights."""

    def __init__(self, members: Sequence[Member]) -> None:
        trainer = members[0].trainer
        self.hp, self.device = trainer.hp, trainer.device
        # A member that was left behind stands still.
        self.n_steps_done = max(member.trainer.n_steps_done for member in members)
        self._at, self._counted = time.monotonic(), self.n_steps_done
        self._rate: float | None = None

    @property
    def fraction(self) -> float:
        """Share of the steps done."""
        return self.n_steps_done / self.hp.n_steps

    def read(self) -> dict[str, float]:
        """Tokens so far, and per second since the last reading; the memory in use."""
        now, n_tokens = time.monotonic(), (self.n_steps_done - self._counted) * self.hp.batch_size
        rate = self._rate = n_tokens / max(now - self._at, 1e-9)
        self._at, self._counted = now, self.n_steps_done
        return {
            "tokens_per_second": rate,
            "n_tokens": float(self.n_steps_done * self.hp.batch_size),
            "memory_bytes": float(_memory_in_use(self.device)),
        }

    def progress(self, stage: str, metrics: dict[str, float] | None, *, checkpointed: bool = False) -> Progress:
        """A step's report."""
        left = (self.hp.n_steps - self.n_steps_done) * self.hp.batch_size
        return Progress(
            fraction=self.fraction,
            stage=stage,
            rate=self._rate,
            unit="tokens",
            eta_seconds=left / self._rate if self._rate else None,
            metrics=metrics,
            checkpointed=checkpointed,
        )


def _memory_in_use(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
