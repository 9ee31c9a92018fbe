"""The engine as a process: killed, doubled, stopped, and found again."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistudio_engine.api.client import connect
from mistudio_engine.api.errors import EngineMissing
from mistudio_engine.api.home import EXIT_BUSY
from mistudio_engine.api.operations import SetLabel
from mistudio_engine.server.serve import stop
from tests.server.processes import WAIT_SECONDS, bring_in, history, kill, start_training


@pytest.fixture(scope="module")
def lived_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data directory with the model and its tokens, whose engine runs."""
    home = tmp_path_factory.mktemp("lived-in") / "home"
    with connect(home) as studio:
        bring_in(studio)
    yield home
    stop(home)


def test_what_was_acknowledged_is_there_after_a_kill(lived_in: Path) -> None:
    with connect(lived_in) as studio:
        sae = start_training(studio, "labelled", n_tokens=20_480).wait(WAIT_SECONDS)
        studio.call(SetLabel(feature=f"sae/{sae.slug}#3", label="kept for ever"))
        kill(lived_in)
        history = studio.label_history(sae=sae.slug, index=3)
        assert [label.label for label in history.rows] == ["kept for ever"]


def test_a_client_that_comes_later_sees_the_whole_history(lived_in: Path) -> None:
    code = (
        "from mistudio_engine import connect; import sys\n"
        f"studio = connect({str(lived_in)!r})\n"
        "next(iter(studio.follow(['trainings/watched'], after=0)))\n"
        "print('following', flush=True); sys.stdin.read()"
    )
    with connect(lived_in) as studio:
        job = start_training(studio, "watched")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        watcher = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
        assert watcher.stdout is not None and watcher.stdin is not None
        assert watcher.stdout.readline() == "following\n"
        watcher.kill()
        watcher.wait()
        watcher.stdin.close()
        watcher.stdout.close()
        job.wait(WAIT_SECONDS)
    with connect(lived_in) as late:
        assert history(late, "watched") == [10_240 * n for n in range(1, 40)]


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mistudio_engine.server", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_second_engine_is_refused_and_told_who_holds_the_directory(lived_in: Path) -> None:
    with connect(lived_in) as studio:
        engine = studio.client._engine
        assert engine is not None
        refused = serve("--home", str(lived_in))
    assert refused.returncode == EXIT_BUSY
    assert str(engine.pid) in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_port_in_use_is_said_so(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused = serve("--home", str(tmp_path / "home"), "--port", str(taken.getsockname()[1]))
    assert refused.returncode == EXIT_BUSY
    assert "cannot listen" in refused.stderr and "--port" in refused.stderr


def test_listening_beyond_loopback_needs_to_be_meant(tmp_path: Path) -> None:
    refused = serve("--home", str(tmp_path / "home"), "--host", "0.0.0.0")
    assert refused.returncode == 1
    assert "--allow-remote" in refused.stderr


def test_connecting_without_autostart_says_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(EngineMissing, match="mistudio engine start"):
        connect(tmp_path / "home", autostart=False)


def test_engine_json_is_for_the_owner_only(home: Path) -> None:
    with connect(home):
        assert (home / "engine.json").stat().st_mode & 0o777 == 0o600
        assert home.stat().st_mode & 0o777 == 0o700
        token = json.loads((home / "engine.json").read_text())["token"]
    assert stop(home).startswith("engine stopped")
    assert token not in (home / "engine.log").read_text()
    assert not (home / "engine.json").exists()
