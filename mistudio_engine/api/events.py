"""What happens while work goes on: the signal a job is sent, the progress it yields, the events that everybody follows.

A job is a generator: `signal = yield Progress(...)`. It does not know who listens, nor where its events are kept.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["Event", "Progress", "Signal"]


class Signal(Enum):
    """What a job is told at each step; cancelling is `close()` on the generator."""

    GO = "go"
    """Carry on."""

    CHECKPOINT = "checkpoint"
    """Write a checkpoint now, then carry on; the engine may stop you after the next yield."""

    STOP = "stop"
    """Finish early: keep what is usable and return it."""


class Progress(BaseModel):
    """One step of a job."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    fraction: float | None = None
    """Share of the work done, 0 to 1; None while it is not known."""

    stage: str = ""
    """What is being done now, in a few words."""

    rate: float | None = None
    """Units per second, in the unit that `unit` names."""

    unit: str = ""
    """Of what `rate` counts: tokens, features, bytes."""

    eta_seconds: float | None = None
    """Seconds left at this rate."""

    metrics: dict[str, float] | None = None
    """Numbers to record durably (a training's loss, l0, …); written to the event log without gaps."""

    checkpointed: bool = False
    """A checkpoint was completed in this step; a restart would go on from here."""


class Event(BaseModel):
    """One line of the event log.

    Durable events have a sequence number of their own. Transient ones (generated tokens, system samples) carry the
    number of the last durable event before them and are replayed only as far as the engine's memory reaches.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    seq: int
    """Position in the log."""

    at: float
    """Seconds since 1970."""

    channel: str
    """`{entity_type}/{entity_id}`, such as `trainings/stories-l2` or `system/cpu`."""

    event: str
    """What happened: progress, metrics, completed, failed, …"""

    data: dict[str, Any] = {}
    """The particulars."""

    transient: bool = False
    """True for events that are not kept."""
