"""The machine's meters: GPUs, CPU, memory, disk and network, every two seconds, with an hour of history.

Rates are differences of the system's counters over the time that really passed, so the first sample has none. A sensor
that is not there or fails is null in the sample; the others go on. Sizes are bytes, rates MB/s (10⁶ bytes), utilisation
percent, temperatures °C, power watts.

It does not know the engine's jobs, nor who looks at the samples; the engine's own memory ledger is elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypedDict, TypeVar

import psutil
import pynvml

__all__ = ["Monitor", "Sample"]

log = logging.getLogger(__name__)

T = TypeVar("T")

INTERVAL_SECONDS = 2.0

HISTORY_SECONDS = 3600.0

BYTES_PER_MB = 1e6

FAULTS = (psutil.Error, pynvml.NVMLError, OSError, RuntimeError, ValueError, AttributeError)
"""What a sensor raises: psutil lacks whole functions on some platforms and cannot parse `/proc` in some containers."""


class Sample(TypedDict):
    """All meters at one moment."""

    at: float
    """Seconds since 1970."""

    gpu: list[dict[str, Any]]
    """A card each: id, name, utilization_percent, memory_used_bytes, memory_total_bytes, temperature_celsius,
    power_watts, power_limit_watts. Empty where there is none."""

    cpu: dict[str, Any]
    """percent of all cores together, per_core_percent, load_1m."""

    memory: dict[str, Any]
    """used_bytes, available_bytes, total_bytes, percent, swap_used_bytes, swap_total_bytes; engine_bytes is ours."""

    disk: dict[str, Any]
    """read_mb_per_s, write_mb_per_s."""

    network: dict[str, Any]
    """download_mb_per_s, upload_mb_per_s."""


class Publisher(Protocol):
    """Where samples go; `Bus` is one."""

    def publish(self, channel: str, event: str, data: Mapping[str, Any], *, transient: bool = False) -> Any: ...


class Monitor:
    """Samples the meters in a thread of its own, and publishes them as transient events.

    Channels: `system/gpu/{id}`, `system/cpu`, `system/memory`, `system/disk`, `system/network`, each with the event
    `metrics` and its part of a `Sample`.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        interval_seconds: float = INTERVAL_SECONDS,
        history_seconds: float = HISTORY_SECONDS,
    ) -> None:
        self.interval_seconds = interval_seconds
        self._publisher = publisher
        self._samples: deque[Sample] = deque(maxlen=max(1, round(history_seconds / interval_seconds)))
        self._meters = _Meters()
        self._sampling = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; the first sample is taken at once. Does nothing when it runs already."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="mistudio-monitor", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; the history stays."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self._meters.close()

    def sample(self) -> Sample:
        """Take a sample now, keep it and publish it."""
        with self._sampling:
            sample = self._meters.read()
            self._samples.append(sample)
        for channel, data in _channels(sample):
            self._publisher.publish(channel, "metrics", data, transient=True)
        return sample

    def latest(self) -> Sample:
        """The newest sample; takes one when there is none yet."""
        newest = list(self._samples)[-1:]
        return newest[0] if newest else self.sample()

    def history(self, seconds: float = HISTORY_SECONDS) -> list[Sample]:
        """Samples of the last so many seconds, oldest first."""
        since = time.time() - seconds
        return [sample for sample in list(self._samples) if sample["at"] >= since]

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            try:
                self.sample()
            except Exception:  # the edge of this thread: meters that end for good would look like an idle machine
                log.exception("a sample of the system's meters was lost")
            due = max(due + self.interval_seconds, time.monotonic())  # after a suspend there is nothing to catch up on
            if self._stop.wait(due - time.monotonic()):
                return


def _channels(sample: Sample) -> list[tuple[str, dict[str, Any]]]:
    cards = [(f"system/gpu/{card['id']}", card) for card in sample["gpu"]]
    return [
        *cards,
        ("system/cpu", sample["cpu"]),
        ("system/memory", sample["memory"]),
        ("system/disk", sample["disk"]),
        ("system/network", sample["network"]),
    ]


class _Meters:
    """The sensors, with the counters of the last reading."""

    def __init__(self) -> None:
        self._disk = _Rate()
        self._network = _Rate()
        self._cpu_thread: int | None = None
        """Which thread read the CPU last."""

        self._nvml: bool | None = None
        """Whether NVML is initialised; None before it was tried, False where there is no driver."""

    def read(self) -> Sample:
        return Sample(
            at=time.time(),
            gpu=self._gpus(),
            cpu=self._cpu(),
            memory=_memory(),
            disk=self._disk.read(
                lambda: psutil.disk_io_counters(), {"read_mb_per_s": "read_bytes", "write_mb_per_s": "write_bytes"}
            ),
            network=self._network.read(
                lambda: psutil.net_io_counters(), {"download_mb_per_s": "bytes_recv", "upload_mb_per_s": "bytes_sent"}
            ),
        )

    def close(self) -> None:
        if self._nvml:
            _tried(pynvml.nvmlShutdown)
        self._nvml = None

    def _cpu(self) -> dict[str, Any]:
        # psutil compares with the call before in the same thread; what the first one there says means nothing.
        cores = _tried(lambda: psutil.cpu_percent(percpu=True))
        thread, before = threading.get_ident(), self._cpu_thread
        self._cpu_thread = thread if cores is not None else None
        if before != thread:
            cores = None
        load = _tried(psutil.getloadavg)
        return {
            "percent": sum(cores) / len(cores) if cores else None,
            "per_core_percent": cores,
            "load_1m": load[0] if load else None,
        }

    def _gpus(self) -> list[dict[str, Any]]:
        if self._nvml is None:
            self._nvml = _tried(lambda: pynvml.nvmlInit() is None) is True
        if not self._nvml:
            return []
        return [_gpu(index) for index in range(_tried(pynvml.nvmlDeviceGetCount) or 0)]


def _gpu(index: int) -> dict[str, Any]:
    """One card; a card may know its memory and not its power (in a partition, in a container)."""
    handle = _tried(lambda: pynvml.nvmlDeviceGetHandleByIndex(index))

    def ask(question: Callable[[Any], T]) -> T | None:
        return None if handle is None else _tried(lambda: question(handle))

    memory = ask(pynvml.nvmlDeviceGetMemoryInfo)
    utilization = ask(pynvml.nvmlDeviceGetUtilizationRates)
    power = ask(pynvml.nvmlDeviceGetPowerUsage)
    limit = ask(pynvml.nvmlDeviceGetEnforcedPowerLimit)
    return {
        "id": index,
        "name": ask(pynvml.nvmlDeviceGetName),
        "utilization_percent": None if utilization is None else utilization.gpu,
        "memory_used_bytes": None if memory is None else memory.used,
        "memory_total_bytes": None if memory is None else memory.total,
        "temperature_celsius": ask(lambda card: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU)),
        "power_watts": None if power is None else power / 1000,
        "power_limit_watts": None if limit is None else limit / 1000,
    }


def _memory() -> dict[str, Any]:
    ram, swap = _tried(psutil.virtual_memory), _tried(psutil.swap_memory)
    return {
        "used_bytes": ram.total - ram.available if ram else None,
        "available_bytes": ram.available if ram else None,
        "total_bytes": ram.total if ram else None,
        "percent": ram.percent if ram else None,
        "swap_used_bytes": swap.used if swap else None,
        "swap_total_bytes": swap.total if swap else None,
        "engine_bytes": _tried(lambda: psutil.Process().memory_info().rss),
    }


class _Rate:
    """Counters of bytes, and what they were at the last reading."""

    def __init__(self) -> None:
        self._at = 0.0
        self._before: Any = None

    def read(self, counters: Callable[[], Any], fields: Mapping[str, str]) -> dict[str, float | None]:
        """MB/s by name, from the counter that `fields` names; null at first, and where a counter went backwards."""
        now, at, before = _tried(counters), time.monotonic(), self._before
        seconds, self._at, self._before = at - self._at, at, now
        rates: dict[str, float | None] = dict.fromkeys(fields)
        if now is not None and before is not None and seconds > 0:
            for name, counter in fields.items():
                n_bytes = getattr(now, counter) - getattr(before, counter)
                rates[name] = n_bytes / seconds / BYTES_PER_MB if n_bytes >= 0 else None
        return rates


def _tried(sensor: Callable[[], T]) -> T | None:
    """What a sensor says, or None when it fails."""
    try:
        return sensor()
    except FAULTS:
        return None
