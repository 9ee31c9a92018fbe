"""One engine per data directory, told by real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mistudio_engine.api.errors import EngineBusy
from mistudio_engine.api.home import EngineFile, lock_holder, read_engine_file, write_engine_file
from mistudio_engine.runtime.lock import EngineLock

HOLD = """
import sys
from mistudio_engine.runtime.lock import EngineLock
lock = EngineLock.acquire(sys.argv[1])
lock.describe("http://127.0.0.1:1234")
print("held", flush=True)
sys.stdin.read()
"""

HOLD_AND_FORK = """
import os, sys
from mistudio_engine.runtime.lock import EngineLock
lock = EngineLock.acquire(sys.argv[1])
end, other = os.pipe()
child = os.fork()
if child == 0:
    os.close(other)
    print("forked", os.getpid(), flush=True)
    os.read(end, 1)          # until the parent is gone, and then for as long as the test wants
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
"""


@contextmanager
def process(code: str, home: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, once it has said that it is ready."""
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert started.stdin and started.stdout
    try:
        started.ready = started.stdout.readline().split()  # type: ignore[attr-defined]
        yield started
    finally:
        started.kill()
        started.stdin.close()
        started.stdout.close()
        started.wait(10)


def test_a_second_engine_is_refused_within_a_second_and_told_who_is_first(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as first:
        begun = time.monotonic()
        with pytest.raises(EngineBusy) as caught:
            EngineLock.acquire(tmp_path)
        assert time.monotonic() - begun < 1
        assert f"pid {first.pid} at http://127.0.0.1:1234" in caught.value.what
        assert str(tmp_path) in caught.value.what
        assert "mistudio engine stop" in caught.value.fix


def test_the_lock_of_a_killed_engine_is_taken_over_with_its_directory(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as first:
        left = EngineFile(url="http://127.0.0.1:1", token="t", pid=first.pid, version="0", epoch="e", started_at=0)
        write_engine_file(tmp_path, left)
        first.send_signal(signal.SIGKILL)
        first.wait(10)
        assert lock_holder(tmp_path) is None
        with EngineLock.acquire(tmp_path) as lock:
            assert lock.held
            assert read_engine_file(tmp_path) is None


def test_a_forked_child_does_not_keep_the_directory_of_a_killed_engine(tmp_path: Path) -> None:
    with process(HOLD_AND_FORK, tmp_path) as first:
        assert first.ready[0] == "forked"  # type: ignore[attr-defined]
        first.send_signal(signal.SIGKILL)
        first.wait(10)
        EngineLock.acquire(tmp_path).release()


def test_a_released_lock_can_be_taken_again_and_names_nobody(tmp_path: Path) -> None:
    lock = EngineLock.acquire(tmp_path / "new")
    lock.release()
    lock.release()  # twice does no harm
    assert not lock.held
    assert lock_holder(tmp_path / "new") is None
    with pytest.raises(ValueError, match="released"):
        lock.describe("http://127.0.0.1:1")
    with EngineLock.acquire(tmp_path / "new") as again:
        assert again.path == tmp_path / "new" / "engine.lock"
        assert again.path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_two_directories_have_an_engine_each(tmp_path: Path) -> None:
    with EngineLock.acquire(tmp_path / "a"), EngineLock.acquire(tmp_path / "b"):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"torn {", b"[]", b'{"pid": "x", "url": 1}', b'{"pid": 999999999, "url": null}']
)
def test_a_holder_that_has_not_said_who_it_is_is_another_process(tmp_path: Path, content: bytes) -> None:
    with EngineLock.acquire(tmp_path) as lock:
        lock.path.write_bytes(content)
        with pytest.raises(EngineBusy, match="by another process"):
            EngineLock.acquire(tmp_path)
