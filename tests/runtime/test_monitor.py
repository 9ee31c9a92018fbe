"""The system's meters: what a sample holds, that rates are rates, and that a broken sensor breaks nothing else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from mistudio_engine.api.events import Event
from mistudio_engine.runtime import monitor as monitor_module
from mistudio_engine.runtime.bus import Bus
from mistudio_engine.runtime.monitor import Monitor
from mistudio_engine.runtime.store import Store


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    store = Store(tmp_path / "mistudio.db")
    yield Bus(store)
    store.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time of the meters, which passes when a test says so."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(
        monitor_module, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 1.7e9 + clock.now)
    )
    return clock


def has_gpu() -> bool:
    try:
        pynvml.nvmlInit()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return False
    return True


def test_a_sample_has_every_meter_in_sensible_ranges(bus: Bus) -> None:
    monitor = Monitor(bus)
    monitor.sample()
    sample = monitor.sample()
    assert abs(sample["at"] - time.time()) < 60
    assert len(sample["cpu"]["per_core_percent"]) == psutil.cpu_count()
    assert 0 <= sample["cpu"]["percent"] <= 100
    memory = sample["memory"]
    assert memory["used_bytes"] + memory["available_bytes"] == memory["total_bytes"]
    assert 0 < memory["engine_bytes"] < memory["total_bytes"]
    assert memory["swap_used_bytes"] <= memory["swap_total_bytes"]
    assert set(sample["disk"]) == {"read_mb_per_s", "write_mb_per_s"}
    assert set(sample["network"]) == {"download_mb_per_s", "upload_mb_per_s"}
    monitor.stop()


def test_the_first_sample_has_no_rates(bus: Bus) -> None:
    first = Monitor(bus).sample()
    assert first["cpu"]["percent"] is None
    assert set(first["disk"].values()) == set(first["network"].values()) == {None}


def test_a_rate_is_the_difference_over_the_time_that_passed(
    bus: Bus, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = SimpleNamespace(bytes_recv=5_000_000, bytes_sent=0)
    monkeypatch.setattr(psutil, "net_io_counters", lambda: SimpleNamespace(**vars(counters)))
    monitor = Monitor(bus)
    monitor.sample()
    clock.now += 4.0  # the machine was busy: twice the interval
    counters.bytes_recv += 10_000_000
    assert monitor.sample()["network"] == {"download_mb_per_s": 2.5, "upload_mb_per_s": 0.0}
    clock.now += 2.0
    counters.bytes_recv = 0  # an interface went away
    assert monitor.sample()["network"] == {"download_mb_per_s": None, "upload_mb_per_s": 0.0}
    monitor.sample()
    assert monitor.sample()["network"]["download_mb_per_s"] is None, "no time has passed"


@pytest.mark.parametrize(
    "fault", [OSError("no /proc"), RuntimeError("odd line"), psutil.AccessDenied(), AttributeError("x")]
)
@pytest.mark.parametrize(
    ("sensor", "part", "field"),
    [
        ("cpu_percent", "cpu", "percent"),
        ("getloadavg", "cpu", "load_1m"),
        ("virtual_memory", "memory", "total_bytes"),
        ("swap_memory", "memory", "swap_total_bytes"),
        ("disk_io_counters", "disk", "read_mb_per_s"),
        ("net_io_counters", "network", "upload_mb_per_s"),
        ("Process", "memory", "engine_bytes"),
    ],
)
def test_a_sensor_that_fails_is_null_and_the_others_go_on(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, sensor: str, part: str, field: str, fault: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(psutil, sensor, fail)
    monitor = Monitor(bus)
    monitor.sample()
    sample: Any = monitor.sample()
    assert sample[part][field] is None
    healthy = ("memory", "engine_bytes") if part != "memory" or field != "engine_bytes" else ("memory", "total_bytes")
    assert sample[healthy[0]][healthy[1]] is not None


def test_a_machine_without_a_disk_counter_has_null_rates(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)  # as psutil does in some containers
    monitor = Monitor(bus)
    monitor.sample()
    assert set(monitor.sample()["disk"].values()) == {None}


def test_cards_are_read_in_bytes_degrees_and_watts_and_what_a_card_does_not_know_is_null(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise pynvml.NVMLError_NotSupported()

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda card: f"card {card}",
        "nvmlDeviceGetMemoryInfo": lambda card: SimpleNamespace(used=2**30, total=2**34),
        "nvmlDeviceGetUtilizationRates": lambda card: SimpleNamespace(gpu=87) if card == 0 else unsupported(),
        "nvmlDeviceGetTemperature": lambda card, kind: 61,
        "nvmlDeviceGetPowerUsage": lambda card: 250_500,
        "nvmlDeviceGetEnforcedPowerLimit": unsupported,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monitor = Monitor(bus)
    first, second = monitor.sample()["gpu"]
    assert first == {
        "id": 0,
        "name": "card 0",
        "utilization_percent": 87,
        "memory_used_bytes": 2**30,
        "memory_total_bytes": 2**34,
        "temperature_celsius": 61,
        "power_watts": 250.5,
        "power_limit_watts": None,
    }
    assert second["utilization_percent"] is None
    assert [event.channel for event in bus.after(0)][:2] == ["system/gpu/0", "system/gpu/1"]
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", unsupported)  # it fell off the bus
    assert monitor.sample()["gpu"][0] == {**dict.fromkeys(first), "id": 0}
    monitor.stop()


def test_a_machine_without_a_driver_has_no_cards(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError_LibraryNotFound()

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    monitor = Monitor(bus)
    assert monitor.sample()["gpu"] == []
    monitor.stop()


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="there is no NVIDIA driver on this machine")
def test_a_real_card_knows_its_memory_and_temperature(bus: Bus) -> None:
    monitor = Monitor(bus)
    card = monitor.sample()["gpu"][0]
    assert 0 <= card["memory_used_bytes"] <= card["memory_total_bytes"]
    assert 0 < card["temperature_celsius"] < 120
    assert card["name"]
    monitor.stop()


def test_the_thread_publishes_transient_events_at_once_and_again_until_it_is_stopped(bus: Bus) -> None:
    before = set(threading.enumerate())
    monitor = Monitor(bus, interval_seconds=0.01)

    async def follow() -> list[Event]:
        subscription = bus.subscribe(["system/cpu"])
        monitor.start()
        monitor.start()  # a second time does nothing
        async with asyncio.timeout(30):
            return [await anext(subscription) for _ in range(3)]

    events = asyncio.run(follow())
    assert threading.active_count() > 1
    monitor.stop()
    assert "mistudio-monitor" not in {thread.name for thread in set(threading.enumerate()) - before}
    assert {event.event for event in events} == {"metrics"}
    assert all(event.transient for event in events)
    assert events[0].data["percent"] is None
    assert bus.seq == 0, "nothing of it is kept on the disk"
    taken = len(monitor.history())
    assert taken >= 3
    monitor.stop()
    assert len(monitor.history()) == taken


def test_the_history_is_one_hour_and_no_longer(bus: Bus, clock: SimpleNamespace) -> None:
    monitor = Monitor(bus)
    for _ in range(1810):
        monitor._samples.append(
            monitor._meters.read() if not monitor._samples else {**monitor._samples[0], "at": 1.7e9 + clock.now}
        )
        clock.now += 2.0
    history = monitor.history()
    assert len(history) == 1800
    assert history[-1] == monitor.latest()
    assert len(monitor.history(60)) == 30
    assert [sample["at"] for sample in history] == sorted(sample["at"] for sample in history)


def test_the_latest_sample_is_taken_when_there_is_none_yet(bus: Bus) -> None:
    monitor = Monitor(bus)
    assert monitor.latest()["memory"]["total_bytes"] > 0
    assert len(monitor.history()) == 1
