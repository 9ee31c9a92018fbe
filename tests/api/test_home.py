"""Where the engine lives, how it is found, and that starting it makes exactly one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mistudio_engine.api import home as home_module
from mistudio_engine.api.errors import EngineBusy, EngineMissing
from mistudio_engine.api.home import (
    EngineFile,
    data_dir,
    engine_file_path,
    ensure_engine,
    log_path,
    make_data_dir,
    probe,
    process_alive,
    read_engine_file,
    remove_engine_file,
    start_engine,
    tail,
    write_engine_file,
)
from mistudio_engine.runtime.lock import EngineLock


def engine_file(**changes: Any) -> EngineFile:
    said = {
        "url": "http://127.0.0.1:9",
        "token": "very-secret",
        "pid": os.getpid(),
        "version": "0.1.0",
        "epoch": "one",
        "started_at": 1.0,
    }
    return EngineFile(**(said | changes))


@contextmanager
def answering(body: bytes, status: int = 200) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Somebody who answers every GET so: its address, and the headers that it was sent."""
    asked: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class TestDataDirectory:
    def test_it_is_the_one_given_then_mistudio_home_then_the_users(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MISTUDIO_HOME", str(tmp_path / "env"))
        assert data_dir("given") == tmp_path / "given"
        assert data_dir() == tmp_path / "env"
        assert data_dir("~/x") == Path.home() / "x"
        monkeypatch.setenv("MISTUDIO_HOME", "")
        assert data_dir().is_absolute()
        assert data_dir().name == "mistudio"
        assert not (tmp_path / "given").exists(), "asking makes nothing"

    def test_it_is_made_for_its_owner_alone(self, tmp_path: Path) -> None:
        assert make_data_dir(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
        shared = tmp_path / "shared"
        shared.mkdir(mode=0o755)
        assert make_data_dir(shared).stat().st_mode & 0o777 == 0o755, "an existing one keeps its mode"


class TestEngineFile:
    def test_it_comes_back_as_it_was_written_and_only_its_owner_can_read_it(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            (tmp_path / f"engine.json.{os.getpid()}.part").write_text("left by a crash, readable by all")
            path = write_engine_file(tmp_path, engine_file())
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o600
        assert read_engine_file(tmp_path) == engine_file()
        write_engine_file(tmp_path, engine_file(epoch="two"))
        assert [each.name for each in tmp_path.iterdir()] == ["engine.json"]

    @pytest.mark.parametrize("content", [None, b"", b'{"url": "http://127', b"[]", b'{"pid": 1}', b"\xff\xfe", b"null"])
    def test_a_missing_torn_or_foreign_one_is_none(self, tmp_path: Path, content: bytes | None) -> None:
        if content is not None:
            engine_file_path(tmp_path).write_bytes(content)
        assert read_engine_file(tmp_path) is None
        assert probe(tmp_path) is None

    def test_the_token_is_not_in_its_printed_form(self) -> None:
        assert "very-secret" not in f"{engine_file()!r} {engine_file()}"

    def test_an_engine_removes_its_own_and_not_its_successors(self, tmp_path: Path) -> None:
        write_engine_file(tmp_path, engine_file(epoch="two"))
        assert not remove_engine_file(tmp_path, "one")
        assert read_engine_file(tmp_path) is not None
        assert remove_engine_file(tmp_path, "two")
        assert not remove_engine_file(tmp_path, "two")
        write_engine_file(tmp_path, engine_file())
        assert remove_engine_file(tmp_path)


class TestProbe:
    def test_an_engine_is_there_when_file_process_and_ping_agree(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")  # an engine on this machine is not behind it
        with answering(json.dumps({"epoch": "one"}).encode()) as (url, asked):
            write_engine_file(tmp_path, engine_file(url=url))
            assert probe(tmp_path) == engine_file(url=url)
        assert asked[0]["path"] == "/ping"
        assert asked[0]["authorization"] == "Bearer very-secret"

    @pytest.mark.parametrize(
        ("body", "status"), [(b'{"epoch": "two"}', 200), (b"<html>", 200), (b"[]", 200), (b"no", 401), (b"", 500)]
    )
    def test_somebody_else_on_its_port_is_not_the_engine(self, tmp_path: Path, body: bytes, status: int) -> None:
        with answering(body, status) as (url, _):
            write_engine_file(tmp_path, engine_file(url=url))
            assert probe(tmp_path) is None

    def test_a_dead_process_is_not_asked(self, tmp_path: Path) -> None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait(30)
        with answering(b'{"epoch": "one"}') as (url, asked):
            for pid in (ended.pid, 0, -1, 2**40):
                write_engine_file(tmp_path, engine_file(url=url, pid=pid))
                assert probe(tmp_path) is None
        assert asked == []
        assert process_alive(os.getpid())
        assert process_alive(1), "somebody else's process lives too"

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9", "not an address", "http://[", ""])
    def test_an_address_where_nobody_is_answers_none(self, tmp_path: Path, url: str) -> None:
        write_engine_file(tmp_path, engine_file(url=url))
        assert probe(tmp_path, timeout=1) is None


class TestStart:
    def test_without_the_engines_packages_it_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(home_module, "ENGINE_PACKAGES", ("json", "torch_of_nobody"))
        with pytest.raises(EngineMissing) as caught:
            ensure_engine(tmp_path)
        assert "torch_of_nobody" in caught.value.what
        assert f'{sys.executable} -m pip install "mistudio[engine]"' in caught.value.fix

    def test_an_engine_that_dies_at_its_start_leaves_its_last_words(self, tmp_path: Path) -> None:
        log_path(tmp_path).write_text("something older\n")
        with pytest.raises(EngineMissing, match="ended at its start with status") as caught:
            start_engine(tmp_path, arguments=["--no-such-option"], wait_seconds=60)
        assert "no-such-option" in caught.value.why
        assert "something older" not in caught.value.why
        assert str(log_path(tmp_path)) in caught.value.fix

    def test_an_engine_that_owns_the_directory_and_does_not_answer_is_named(self, tmp_path: Path) -> None:
        with EngineLock.acquire(tmp_path), pytest.raises(EngineBusy, match=rf"pid {os.getpid()}\) owns"):
            start_engine(tmp_path, wait_seconds=6)

    def test_only_one_starts_at_a_time(self, tmp_path: Path) -> None:
        with home_module._one_starter(tmp_path, time.monotonic()), pytest.raises(EngineBusy, match="too long"):
            start_engine(tmp_path, wait_seconds=0.1)

    def test_a_long_log_is_set_aside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(home_module, "LOG_CAP_BYTES", 10)
        log_path(tmp_path).write_text("x" * 11)
        with pytest.raises(EngineMissing):
            start_engine(tmp_path, arguments=["--no-such-option"], wait_seconds=60)
        assert (tmp_path / "engine.log.1").read_text() == "x" * 11
        assert log_path(tmp_path).stat().st_mode & 0o777 == 0o600

    def test_the_tail_of_a_log(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        assert tail(log, 3) == ""
        log.write_bytes(b"one\ntwo\n\xffthree\n")
        assert tail(log, 2) == "two\n\ufffdthree"
        assert tail(log, 9, start=4) == "two\n\ufffdthree"

    @pytest.mark.slow
    def test_six_starters_make_one_engine_which_outlives_them_and_can_be_replaced(self, tmp_path: Path) -> None:
        code = (
            "import sys; from mistudio_engine.api.home import ensure_engine; "
            "engine = ensure_engine(sys.argv[1], wait_seconds=90); print(engine.pid, engine.epoch)"
        )
        starters = [
            subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
            for _ in range(6)
        ]
        said = {starter.communicate(timeout=100)[0].strip() for starter in starters}
        engine = probe(tmp_path, timeout=10)
        try:
            assert engine is not None
            assert said == {f"{engine.pid} {engine.epoch}"}
            assert os.getsid(engine.pid) != os.getsid(0), "it has a session of its own"
            os.kill(engine.pid, signal.SIGKILL)
            engine = start_engine(tmp_path, wait_seconds=90)
            assert f"{engine.pid} {engine.epoch}" not in said
        finally:
            if engine is not None:
                os.kill(engine.pid, signal.SIGKILL)

    @pytest.mark.slow
    def test_who_gave_way_to_one_that_has_ended_is_started_again(self, tmp_path: Path) -> None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        lock = EngineLock.acquire(tmp_path)
        lock.path.write_text(json.dumps({"pid": ended.pid, "url": None}))  # as a supervisor's, whose engine has died

        def let_go() -> None:
            while "is in use by another process" not in "".join(tail(log_path(tmp_path), 8)):
                time.sleep(0.01)
            lock.release()

        threading.Thread(target=let_go, daemon=True).start()
        os.kill(start_engine(tmp_path, wait_seconds=90).pid, signal.SIGKILL)
