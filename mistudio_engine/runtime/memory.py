"""The memory ledger: what lies in memory, what is set aside, and whether there is room for more, before work starts.

Residents (language models, SAEs) are loaded once, pinned while somebody works with them, and unloaded least recently
used when room is needed. It counts the bytes that it is told; it does not know torch, nor how large a model is.

Threads: `resident`, `reserve` and `unload` load and unload on the calling thread, so they belong on the one thread that
owns the devices; with a lane this is checked. What only looks (`loaded`, `free_bytes`,
`capacity`) may be called from anywhere and never waits for a load.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import pynvml

from mistudio_engine.api.errors import Conflict, NotFound, OutOfMemory, Unsupported, human_bytes
from mistudio_engine.runtime.compute import ComputeLane

__all__ = ["MemoryLedger", "Resident", "measured_capacities"]

T = TypeVar("T")

RESERVE = 0.1
"""Share of the free memory that is left to everybody else: allocators fragment and other programs grow."""


class Resident(NamedTuple):
    """Something that lies in memory."""

    key: str
    device: str
    n_bytes: int
    n_users: int
    """How many work with it now."""

    @property
    def in_use(self) -> bool:
        """Is somebody working with it? Otherwise it can be unloaded."""
        return self.n_users > 0


@dataclass
class _Loaded:
    device: str
    n_bytes: int
    value: Any
    unload: Callable[[Any], None] | None
    n_users: int = 0


@dataclass
class _Device:
    capacity: int
    reserved: dict[int, int] = field(default_factory=dict)


class MemoryLedger:
    """Accounts for the memory of each device, "cpu", "cuda:0", ….

    Args:
        lane: who owns the devices.
        capacities: bytes per device; by default what is free now, less a tenth.
    """

    def __init__(self, lane: ComputeLane | None = None, capacities: Mapping[str, int] | None = None) -> None:
        found = measured_capacities() if capacities is None else capacities
        self._devices = {name: _Device(capacity) for name, capacity in found.items()}
        self._lane = lane
        self._lock = threading.RLock()
        self._residents: dict[str, _Loaded] = {}  # in the order of their last use
        self._n_reservations = 0

    @contextmanager
    def resident(
        self,
        key: str,
        n_bytes: int,
        load: Callable[[], T],
        unload: Callable[[T], None] | None = None,
        *,
        device: str = "cpu",
    ) -> Iterator[T]:
        """What `load` returned, loaded now or before, and kept in memory while the block runs.

        Idle residents make room, least recently used first. Raises OutOfMemory before loading when that is not enough.
        """
        self._check_thread()
        loaded = self._residents.get(key)
        if loaded is None:
            with self.reserve(f"Loading {key}", n_bytes, device=device):
                loaded = _Loaded(device, n_bytes, load(), unload)
                with self._lock:
                    self._residents[key] = loaded
        with self._lock:
            loaded.n_users += 1
        try:
            yield loaded.value
        finally:
            with self._lock:
                loaded.n_users -= 1
                if self._residents.pop(key, None) is loaded:
                    self._residents[key] = loaded  # now the most recently used

    @contextmanager
    def reserve(self, what: str, n_bytes: int, *, device: str = "cpu") -> Iterator[None]:
        """Sets memory aside for the block, say an optimizer's; `what` begins the sentence of OutOfMemory."""
        self._check_thread()
        self._make_room(what, n_bytes, device)
        with self._lock:
            self._n_reservations += 1
            number = self._n_reservations
            self._device(device).reserved[number] = n_bytes
        try:
            yield
        finally:
            with self._lock:
                del self._device(device).reserved[number]

    def unload(self, key: str) -> None:
        """Takes a resident out of memory. Raises NotFound, or Conflict while it is in use."""
        self._check_thread()
        with self._lock:
            loaded = self._residents.get(key)
        if loaded is None:
            raise NotFound(
                f"{key} is not in memory.",
                why=f"Loaded: {', '.join(self._residents)}." if self._residents else "Nothing is loaded.",
            )
        if loaded.n_users:
            raise Conflict(f"{key} is in use.", fix="Wait for the work that uses it, or cancel that first.")
        self._drop(key)

    def loaded(self) -> list[Resident]:
        """What lies in memory, least recently used first."""
        with self._lock:
            return [Resident(key, each.device, each.n_bytes, each.n_users) for key, each in self._residents.items()]

    def free_bytes(self, device: str = "cpu") -> int:
        """What is neither loaded nor set aside."""
        with self._lock:
            state = self._device(device)
            loaded = sum(each.n_bytes for each in self._residents.values() if each.device == device)
            # What is being loaded stands in both for a moment, which errs on the safe side.
            return state.capacity - loaded - sum(state.reserved.values())

    def capacity(self, device: str = "cpu") -> int:
        """Bytes that may be used on a device in all."""
        with self._lock:
            return self._device(device).capacity

    def set_capacity(self, n_bytes: int, device: str = "cpu") -> None:
        """Grants a device more or less; what is loaded stays."""
        with self._lock:
            self._devices.setdefault(device, _Device(0)).capacity = n_bytes

    @property
    def devices(self) -> list[str]:
        """Names of the devices."""
        with self._lock:
            return list(self._devices)

    def clear(self) -> None:
        """Unloads everything, in use or not; for the end, when the lane has stopped."""
        for each in self.loaded():
            self._drop(each.key)

    def _check_thread(self) -> None:
        if self._lane is not None:
            self._lane.require_here()

    def _device(self, name: str) -> _Device:
        if name not in self._devices:
            raise Unsupported(
                f"There is no device {name!r} here.", fix=f"Use one of {', '.join(map(repr, self._devices))}."
            )
        return self._devices[name]

    def _make_room(self, what: str, n_bytes: int, device: str) -> None:
        """Unloads idle residents of the device until `n_bytes` are free; none when that would not be enough."""
        free = self.free_bytes(device)
        here = [each for each in self.loaded() if each.device == device]
        idle = [each for each in here if not each.n_users]
        within_reach = free + sum(each.n_bytes for each in idle)
        if within_reach < n_bytes:
            raise OutOfMemory.of(what, n_bytes, max(within_reach, 0), self._advice(n_bytes, device, here))
        for each in idle:
            if free >= n_bytes:
                break
            self._drop(each.key)
            free += each.n_bytes

    def _advice(self, n_bytes: int, device: str, here: list[Resident]) -> str:
        """What a person can do when even unloading everything idle is not enough."""
        capacity = self.capacity(device)
        smaller = "Lower batch_size, use a smaller model or a lower precision"
        if n_bytes > capacity:
            return f"{smaller}: {device} has {human_bytes(capacity)} in all."
        busy = ", ".join(f"{each.key} ({human_bytes(each.n_bytes)})" for each in here if each.n_users)
        return f"{smaller}, or wait for the work that is using {busy or device}, or cancel it."

    def _drop(self, key: str) -> None:
        with self._lock:
            loaded = self._residents.pop(key)
        if loaded.unload is not None:
            loaded.unload(loaded.value)


def measured_capacities() -> dict[str, int]:
    """Free bytes of each device now, less a tenth: main memory as "cpu", the GPUs that NVML sees as "cuda:0", …."""
    free = {"cpu": _free_main_memory()} | _free_gpu_memory()
    return {device: int(n_bytes * (1 - RESERVE)) for device, n_bytes in free.items()}


def _free_main_memory() -> int:
    """Free main memory; a container's limit counts where it is lower."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(int(text) - int(used.read_text()), 0))
    return free


def _free_gpu_memory() -> dict[str, int]:
    """Free memory of each GPU in the order of CUDA's numbers, or nothing without NVIDIA's driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = range(pynvml.nvmlDeviceGetCount()) if visible is None else filter(None, visible.split(","))
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name))
            if str(name).isdecimal()
            else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names
        ]
        return {
            f"cuda:{number}": int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for number, handle in enumerate(handles)
        }
    except pynvml.NVMLError:
        return {}
    finally:
        pynvml.nvmlShutdown()
