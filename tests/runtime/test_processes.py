"""Work in other processes comes back, fails with its own error, and is gone at once when nobody wants it any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mistudio_engine.api.errors import BadInput, Internal, JobFailed
from mistudio_engine.runtime.processes import ProcessPool

SECONDS = 20.0


def double(number: int) -> int:
    return 2 * number


def whose() -> tuple[int, int]:
    return os.getpid(), os.getppid()


def refuse(value: str) -> None:
    raise BadInput(f"{value!r} is no value.", fix="Give another.")


def divide(number: int) -> float:
    return number / 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def sleep_for_ever(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    while True:
        time.sleep(3600)


def libraries() -> list[str]:
    return sorted({"numpy", "torch", "spacy"} & set(sys.modules))


def drain(work):
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def gone(pid: int) -> bool:
    """Whether a process has ended; one that its parent has not waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition, what):
    for _ in range(int(SECONDS / 0.01)):
        if found := condition():
            return found
        threading.Event().wait(0.01)
    raise AssertionError(f"{what} did not happen within {SECONDS:g} s")


def test_results_come_from_another_process_that_is_kept_for_the_next_call():
    with ProcessPool(1) as pool:
        first, parent = drain(pool.run(whose))
        assert (parent, drain(pool.run(whose))[0]) == (os.getpid(), first)
        assert drain(pool.run(libraries)) == []
        assert not gone(first)
    assert gone(first)


def test_many_calls_are_done_by_several_processes_each_once():
    with ProcessPool(2) as pool:
        done = [each for each in pool.map(double, [(n,) for n in range(40)]) if each is not None]
    assert sorted(done) == [(n, 2 * n) for n in range(40)]


def test_nothing_is_started_before_it_is_needed():
    with ProcessPool(2) as pool:
        assert list(pool.map(double, [])) == []
        assert pool._processes == []


def test_an_error_of_ours_arrives_as_it_was_raised_and_another_as_a_fault(capfd):
    with ProcessPool(1) as pool:
        with pytest.raises(BadInput, match=r"'x' is no value\. Give another\."):
            drain(pool.run(refuse, "x"))
        with pytest.raises(Internal, match="divide failed by a fault of ours: ZeroDivisionError"):
            drain(pool.run(divide, 1))
        assert "ZeroDivisionError" in capfd.readouterr().err
        assert drain(pool.run(double, 4)) == 8


@pytest.mark.parametrize(("how", "said"), [(die, "SIGKILL.* memory"), (leave, "code 3")])
def test_a_process_that_dies_is_a_typed_error_and_the_next_call_has_a_new_one(how, said):
    with ProcessPool(1) as pool:
        with pytest.raises(JobFailed, match=said):
            drain(pool.run(how))
        assert drain(pool.run(double, 4)) == 8


def test_closing_kills_what_is_at_work_within_a_second(tmp_path):
    with ProcessPool(1) as pool:
        work = pool.run(sleep_for_ever, str(tmp_path / "pid"))
        pid = int(until(lambda: next(work) or _text(tmp_path / "pid"), "its start"))
        begun = time.monotonic()
        work.close()
        assert time.monotonic() - begun < 1.0
        assert gone(pid)
        assert drain(pool.run(double, 4)) == 8


def test_a_process_ends_with_its_engine_even_if_that_is_killed(tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(
        "import sys\n"
        "from mistudio_engine.runtime.processes import ProcessPool\n"
        "from tests.runtime.test_processes import sleep_for_ever\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPool(1) as pool:\n"
        "        for _ in pool.run(sleep_for_ever, sys.argv[1]): pass\n"
    )
    root = Path(__file__).parents[2]
    engine = subprocess.Popen([sys.executable, script, tmp_path / "pid"], env={**os.environ, "PYTHONPATH": str(root)})
    try:
        pid = int(until(lambda: _text(tmp_path / "pid"), "its start"))
    finally:
        engine.kill()
        engine.wait()
    until(lambda: gone(pid), "the end of the process")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
