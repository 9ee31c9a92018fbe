"""Operations on the engine itself, and the two that look at anything: find and describe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mistudio_engine.api.errors import NextCall
from mistudio_engine.api.operations.base import Operation
from mistudio_engine.api.operations.datasets import Limit
from mistudio_engine.api.records import Data, Page

__all__ = [
    "Describe",
    "Description",
    "Find",
    "Found",
    "Metrics",
    "MetricsHistory",
    "Resident",
    "ShowSystemHistory",
    "ShowSystemMetrics",
    "Status",
    "SystemStatus",
]

Kind = Literal["model", "dataset", "tokens", "training", "sae", "extraction", "experiment", "export", "template", "job"]


class Resident(Data):
    """Something that lies in memory."""

    key: str
    n_bytes: int
    in_use: bool


class SystemStatus(Data):
    """How the engine is."""

    state: Literal["starting", "ready", "restarting", "stopping"]
    """`restarting` after the device was lost: another process takes this one's place, and its jobs go on."""

    version: str
    home: str = ""
    device: str = ""
    memory_free: int | None = None
    memory_total: int | None = None
    disk_free: int | None = None
    offline: bool = False
    embedder: str | None = None
    """Which text embedder search by meaning uses; None when only words are compared."""

    loaded: list[Resident] = []
    jobs_running: list[str] = []
    jobs_queued: int = 0
    counts: dict[str, int] = {}
    """How many there are of each kind."""

    uptime_seconds: float = 0.0
    next_call: NextCall | None = None
    """Something sensible to do next."""


class Metrics(Data):
    """One sample of the machine's meters; what cannot be measured here is null."""

    at: float
    gpu: list[dict[str, Any]] = []
    cpu: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    disk: dict[str, Any] = {}
    network: dict[str, Any] = {}


class MetricsHistory(Data):
    """Samples, oldest first."""

    interval_seconds: float
    samples: list[Metrics]


class Found(Data):
    """One thing that was found."""

    ref: str
    line: str
    """What it is, in a line."""

    n_bytes: int | None = None
    ready: bool = True


class Description(Data):
    """One thing, with where it comes from and what can be done with it."""

    ref: str
    record: dict[str, Any]
    lineage: dict[str, str] = {}
    """Refs of what it was made from and what was made of it."""

    health: list[str] = []
    """What is worth knowing before trusting it."""

    next_calls: list[NextCall] = []


class Status(Operation[SystemStatus], route="GET /system/status"):
    """How the engine is: version, device, memory, what is loaded, which jobs run, and what to do first.

    Answers while the engine is still starting. Start here.
    """


class ShowSystemMetrics(Operation[Metrics], route="GET /system/metrics"):
    """The machine's meters now: GPU, CPU, memory, disk and network."""


class ShowSystemHistory(Operation[MetricsHistory], route="GET /system/history"):
    """The machine's meters over the last hour, a sample every two seconds."""

    seconds: Annotated[float, Field(gt=0, le=3600)] = 3600
    limit: Annotated[int, Field(ge=1, le=2000)] = 1800
    """At most this many samples, evenly spaced."""


class Find(Operation[Page[Found]], route="GET /find"):
    """List what is here: models, datasets, tokenisations, SAEs, extractions, trainings, experiments, exports, jobs,
    templates.

    Read one with describe.
    """

    kind: Kind
    query: str | None = None
    """Part of a name or of its source."""

    limit: Limit = 20
    cursor: str | None = None


class Describe(Operation[Description], route="GET /describe/{kind}/{slug}"):
    """One thing whole: its configuration, what it came from, how healthy it is, and what can be done next."""

    kind: Kind
    slug: str
