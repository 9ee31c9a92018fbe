"""An engine that loses its device ends, is started again, and its jobs go on; everything else ends with its engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from mistudio_engine.api.client import connect
from mistudio_engine.api.errors import JobFailed
from mistudio_engine.api.home import EXIT_DEVICE_LOST, EngineFile, probe, process_alive
from mistudio_engine.runtime.lock import EngineLock
from mistudio_engine.server.serve import stop
from mistudio_engine.server.supervisor import MAX_RESTARTS
from tests.server.processes import until

ENGINE = str(Path(__file__).with_name("lossy_engine.py"))
ROOT = Path(__file__).parents[2]

Process = subprocess.Popen[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """`start(program, *arguments)`: a Python process; what still runs at the end is killed, and the engine with it."""
    processes: list[Process] = []

    def started(*command: str) -> Process:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with open(tmp_path / "log", "a") as log:
            process = subprocess.Popen([sys.executable, *command], env=environment, stderr=log, text=True)
        processes.append(process)
        return process

    yield started
    for process in processes:
        process.kill()
        process.wait()


def engine_of(process: Process, home: Path, other_than: EngineFile | None = None) -> EngineFile:
    """The engine that answers, once it does."""

    def answers() -> EngineFile | None:
        assert process.poll() is None, (home.parent / "log").read_text()
        found = probe(home)
        return found if found and (other_than is None or found.epoch != other_than.epoch) else None

    return until(answers, "an engine")


def count(engine: EngineFile, **arguments: Any) -> str:
    """Start the job of lossy_engine.py; its slug."""
    headers = {"Authorization": f"Bearer {engine.token}"}
    answer = httpx.post(
        f"{engine.url}/api/v1/lose-device", json=arguments, headers=headers, trust_env=False, timeout=60
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["slug"]


def check_it_goes_on(start: Callable[..., Process], home: Path, **arguments: Any) -> None:
    process = start(ENGINE, str(home))
    before = engine_of(process, home)
    slug = count(before, n_units=6, lost_at=3, **arguments)
    after = engine_of(process, home, other_than=before)
    assert not process_alive(before.pid)
    assert after.pid not in (before.pid, process.pid)
    assert after.url == before.url, "the socket stayed open"
    with connect(home, autostart=False) as studio:
        job = until(lambda: (seen := studio.show_job(job=slug)).finished and seen, "the job's end")
        assert job.state == "completed" and job.attempt == 1
        assert job.result["pids"] == [before.pid] * 3 + [after.pid] * 3, "no unit was done twice, and none left out"
        names = [event.event for event in studio.list_events(channels=f"jobs/{slug}").events]
    assert [name for name in names if name not in ("checkpoint", "progress")] == [
        *("queued", "running", "device_lost", "interrupted", "queued", "running", "completed")
    ]
    assert stop(home) == f"engine stopped (pid {after.pid})"
    assert process.wait(20) == -signal.SIGTERM
    log = (home.parent / "log").read_text()
    assert "CUDA error" in log and "started again" in log


@pytest.mark.slow
def test_a_job_that_loses_the_device_goes_on_in_the_next_engine(start: Callable[..., Process], tmp_path: Path) -> None:
    check_it_goes_on(start, tmp_path / "home")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU whose context can be poisoned")
def test_a_poisoned_context_is_left_behind_with_its_process(start: Callable[..., Process], tmp_path: Path) -> None:
    check_it_goes_on(start, tmp_path / "home", real=True)


@pytest.mark.slow
def test_somebody_who_waits_sees_the_end_and_not_the_interruption(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    process = start(ENGINE, str(tmp_path / "home"))
    slug = count(engine_of(process, tmp_path / "home"), n_units=4, lost_at=2)
    with (
        connect(tmp_path / "home") as studio,
        pytest.raises(KeyError, match="lose_device"),  # completed: only this client does not know the operation
    ):
        studio._run(studio.client.wait(slug, 60))


@pytest.mark.slow
def test_a_job_that_always_loses_the_device_is_left_and_the_engine_stays(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    process = start(ENGINE, str(home))
    slug = count(engine_of(process, home), n_units=4, lost_at=2, always=True)
    with connect(home) as studio:
        job = until(
            lambda: "3 times" in (seen := studio.show_job(job=slug)).message and seen,
            "the engine leaving the job alone",
        )
        assert job.state == "interrupted" and job.checkpoint
        until(lambda: studio.status().state == "ready", "the engine")
        with pytest.raises(JobFailed, match="lost the device 3 times"):
            studio._run(studio.client.wait(slug, 60))
        assert studio.control_job(job=slug, action="cancel").state == "cancelled"


CHILD = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore
from mistudio_engine.runtime.lock import EngineLock
from mistudio_engine.server.supervisor import supervise
with EngineLock.acquire(sys.argv[1]) as lock:
    supervise(lock)
    lock.describe("http://127.0.0.1:9")
    with open(sys.argv[1] + "/pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
    if sys.argv[2:] == ["sleep"]:
        time.sleep(60)
os._exit(int(sys.argv[2]))
"""
"""An engine in which nothing runs: it notes its pid, then sleeps or ends."""


def pids(home: Path) -> list[int]:
    path = home / "pids"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def child_of(home: Path) -> int:
    return until(lambda: pids(home) and pids(home)[-1], "a child")


@pytest.mark.parametrize("status", [0, 1, 75])
def test_any_other_end_is_passed_on(start: Callable[..., Process], tmp_path: Path, status: int) -> None:
    assert start("-c", CHILD, str(tmp_path / "home"), str(status)).wait(20) == status
    assert len(pids(tmp_path / "home")) == 1


def test_it_gives_up_when_a_new_process_does_not_help(start: Callable[..., Process], tmp_path: Path) -> None:
    process = start("-c", CHILD, str(tmp_path / "home"), str(EXIT_DEVICE_LOST))
    assert process.wait(30) == EXIT_DEVICE_LOST
    assert len(set(pids(tmp_path / "home"))) == 1 + MAX_RESTARTS
    assert "is not started again" in (tmp_path / "log").read_text()
    EngineLock.acquire(tmp_path / "home").release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_reaches_the_engine_and_ends_both(
    start: Callable[..., Process], tmp_path: Path, number: signal.Signals
) -> None:
    process = start("-c", CHILD, str(tmp_path / "home"), "sleep")
    child = child_of(tmp_path / "home")
    os.kill(process.pid, number)
    assert process.wait(20) == -number
    assert not process_alive(child)
    EngineLock.acquire(tmp_path / "home").release()


@pytest.mark.parametrize("whose", ["supervisor", "engine"])
def test_killing_one_ends_the_other_and_frees_the_directory(
    start: Callable[..., Process], tmp_path: Path, whose: str
) -> None:
    process = start("-c", CHILD, str(tmp_path / "home"), "sleep")
    child = child_of(tmp_path / "home")
    os.kill(process.pid if whose == "supervisor" else child, signal.SIGKILL)
    assert process.wait(20) == (-signal.SIGKILL if whose == "supervisor" else 128 + signal.SIGKILL)
    until(lambda: not process_alive(child), "the engine's end")
    began = time.monotonic()
    EngineLock.acquire(tmp_path / "home").release()
    assert time.monotonic() - began < 1
