"""The door through Jupyter, with a real Jupyter server in front and a small engine behind."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from jupyter_process import JUPYTER_CONFIG, Jupyter, running_jupyter
from stand_in_engine import CHUNK, N_CHUNKS, StandIn
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from mistudio_engine.api.home import missing_packages, read_engine_file, write_engine_file
from mistudio_engine.server.serve import stop

API = "mistudio/api/v1"

ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine(jupyter: Jupyter) -> Generator[StandIn]:
    engine = StandIn(jupyter.home)
    yield engine
    engine.stop()


def open_socket(jupyter: Jupyter, query: str = "", origin: str | None = None, cookies: Any = None) -> ClientConnection:
    headers = {}
    if cookies is None:
        headers["Authorization"] = f"token {jupyter.token}"
    elif cookies:
        headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
    address = f"{jupyter.url.replace('http', 'ws', 1)}{API}/ws{query}"
    return connect(address, additional_headers=headers, origin=origin, proxy=None)  # type: ignore[arg-type]


def test_a_logged_in_browser_reaches_the_engine_and_the_token_is_added_on_the_way(
    jupyter: Jupyter, engine: StandIn
) -> None:
    with jupyter.by_cookie() as browser:
        answer = browser.get(f"{API}/jobs/train-0007", params={"wait_s": "0"})
    seen = answer.json()
    assert answer.status_code == 200
    assert (seen["method"], seen["path"], seen["query"], seen["known"]) == (
        "GET",
        "/api/v1/jobs/train-0007",
        "wait_s=0",
        True,
    )


def test_the_engine_sees_none_of_the_browsers_cookies_and_tokens(jupyter: Jupyter, engine: StandIn) -> None:
    with jupyter.by_cookie() as browser:
        headers = {"X-XSRFToken": browser.cookies["_xsrf"], "Origin": jupyter.origin}
        answer = browser.post(f"{API}/jobs?token={jupyter.token}&a=1&_xsrf=x", json={"b": 2}, headers=headers)
    seen = answer.json()
    assert answer.status_code == 200, answer.text
    assert (seen["query"], seen["body"]) == ("a=1", '{"b":2}')
    assert set(seen["headers"]) <= {
        "accept", "accept-encoding", "connection", "content-length", "content-type", "host", "user-agent",
    }  # fmt: skip
    assert jupyter.token not in str(engine.seen)


def test_cookies_and_permissions_of_the_engine_do_not_become_jupyters(jupyter: Jupyter, engine: StandIn) -> None:
    with jupyter.by_token() as program:
        answer = program.get(f"{API}/jobs")
    assert "engine=1" not in str(answer.headers) and "keep-alive" not in answer.headers
    assert answer.headers.get("access-control-allow-origin") != "*"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
def test_nobody_comes_in_without_logging_in(jupyter: Jupyter, engine: StandIn, method: str) -> None:
    with jupyter.anonymous() as anybody:
        answers = [anybody.request(method, f"{API}/jobs")]
        if method == "GET":
            answers.append(anybody.get("mistudio/ping"))
    assert [answer.status_code for answer in answers] == [403] * len(answers)
    assert engine.seen == []


def test_nobody_follows_events_without_logging_in(jupyter: Jupyter, engine: StandIn) -> None:
    with pytest.raises(InvalidStatus) as refused:
        open_socket(jupyter, cookies={})
    assert refused.value.response.status_code == 403
    assert engine.sockets == []


def test_a_form_on_another_page_changes_nothing_for_it_lacks_the_xsrf_token(jupyter: Jupyter, engine: StandIn) -> None:
    with jupyter.by_cookie() as browser:
        answer = browser.post(f"{API}/jobs/train-0007/control", json={"action": "cancel"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        headers = {"X-XSRFToken": browser.cookies["_xsrf"], "Origin": "https://evil.example"}
        foreign = browser.post(f"{API}/jobs/train-0007/control", json={"action": "cancel"}, headers=headers)
        assert foreign.status_code in (403, 404)
    assert engine.seen == []


def test_a_page_of_another_origin_cannot_follow_events_with_the_users_cookies(
    jupyter: Jupyter, engine: StandIn
) -> None:
    with jupyter.by_cookie() as browser, pytest.raises(InvalidStatus) as refused:
        open_socket(jupyter, origin="https://evil.example", cookies=browser.cookies)
    assert refused.value.response.status_code == 403
    assert engine.sockets == []


def test_a_foreign_host_is_refused(jupyter: Jupyter, engine: StandIn) -> None:
    with jupyter.by_token() as program:
        assert program.get(f"{API}/jobs", headers={"Host": "evil.example"}).status_code == 403
    assert engine.seen == []


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/../../secret",
        f"{API}/%2e%2e/%2e%2e/secret",
        f"{API}/%2E./secret",
        f"{API}/%252e%252e/%252e%252e/secret",
        f"{API}/..%2f..%2fsecret",
        f"{API}/..%5c..%5csecret",
        f"{API}/jobs//secret",
        f"{API}/jobs/./secret",
        f"{API}/jobs/%00",
        f"{API}/jobs/a%0d%0aX-Evil:1",
        "mistudio/secret",
        "mistudio/ping/../secret",
        "mistudio/mcp",
        "mistudio/api/v2/jobs",
    ],
)
def test_no_path_leads_out_of_the_api(jupyter: Jupyter, engine: StandIn, path: str) -> None:
    # A bare socket: every HTTP client tidies such paths up before it sends them.
    status = raw_status(jupyter, path)
    assert status == 404
    assert engine.seen == []


def raw_status(jupyter: Jupyter, path: str) -> int:
    url = httpx.URL(jupyter.url)
    head = [
        f"GET {url.path}{path} HTTP/1.1",
        f"Host: {url.host}:{url.port}",
        f"Authorization: token {jupyter.token}",
        "Connection: close",
    ]
    with socket.create_connection((url.host, url.port), timeout=30) as wire:
        wire.sendall("\r\n".join([*head, "", ""]).encode())
        with wire.makefile("rb") as answer:
            return int(answer.readline().split()[1])


def test_names_with_spaces_and_letters_of_any_script_pass_as_they_were_written(
    jupyter: Jupyter, engine: StandIn
) -> None:
    with jupyter.by_token() as program:
        seen = program.get(f"{API}/saes/caf%C3%A9%20%E7%8C%AB/features/7", params={"q": "a b&c=d"}).json()
    assert seen["path"] == "/api/v1/saes/caf%C3%A9%20%E7%8C%AB/features/7"
    assert dict(httpx.QueryParams(seen["query"])) == {"q": "a b&c=d"}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_each_verb_arrives_with_its_body(jupyter: Jupyter, engine: StandIn, method: str) -> None:
    with jupyter.by_token() as program:
        seen = program.request(method, f"{API}/templates/mine", content=b"{}").json()
    assert (seen["method"], seen["body"]) == (method, "{}")


def test_a_download_comes_whole_with_its_name(jupyter: Jupyter, engine: StandIn) -> None:
    with jupyter.by_token() as program:
        answer = program.get(f"{API}/download")
    assert answer.content == CHUNK * N_CHUNKS
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"] == 'attachment; filename="studio.zip"'


def test_a_download_that_breaks_off_does_not_look_whole(jupyter: Jupyter, engine: StandIn) -> None:
    with jupyter.by_token() as program, pytest.raises(httpx.RemoteProtocolError):
        program.get(f"{API}/torn")


def test_an_exported_page_runs_no_script_under_jupyters_origin(jupyter: Jupyter, engine: StandIn) -> None:
    with jupyter.by_token() as program:
        answer = program.get(f"{API}/page")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_body_over_the_cap_is_refused_whether_its_size_is_declared_or_not(jupyter: Jupyter, engine: StandIn) -> None:
    n_chunks = 16 * 1024 * 1024 // len(CHUNK)

    def undeclared() -> Generator[bytes]:
        for _ in range(n_chunks + 1):
            yield CHUNK

    with jupyter.by_token() as program:
        assert program.post(f"{API}/jobs", content=CHUNK * n_chunks).status_code == 200
        answers = [program.post(f"{API}/jobs", content=body) for body in (CHUNK * n_chunks + b"x", undeclared())]
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert len(engine.seen) == 1


def test_without_an_engine_the_answer_says_what_and_what_to_do(jupyter: Jupyter) -> None:
    with jupyter.by_token() as program:
        answers = [program.get("mistudio/ping"), program.get(f"{API}/jobs")]
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "engine_missing")
        assert str(jupyter.home) in error["what"] and "mistudio engine start" in error["fix"]
    with pytest.raises(InvalidStatus) as refused:
        open_socket(jupyter)
    assert refused.value.response.status_code == 503


def test_an_engine_that_was_started_anew_is_found_without_a_failed_request(jupyter: Jupyter, engine: StandIn) -> None:
    with jupyter.by_token() as program:
        first = program.get("mistudio/ping").json()
        engine.stop()
        other = StandIn(jupyter.home)
        try:
            second = program.post(f"{API}/jobs", json={}).json()
            third = program.get("mistudio/ping").json()
        finally:
            other.stop()
    assert first == {"epoch": engine.file.epoch, "known": True}
    assert second["known"] and third == {"epoch": other.file.epoch, "known": True}


def test_an_engine_with_a_new_token_is_asked_again_with_it(jupyter: Jupyter, engine: StandIn) -> None:
    with jupyter.by_token() as program:
        assert program.get(f"{API}/jobs").status_code == 200
        engine.file = engine.file.model_copy(update={"token": "another", "epoch": "another"})
        write_engine_file(jupyter.home, engine.file)
        assert program.get(f"{API}/jobs").json()["known"]


def test_the_engines_token_is_in_no_answer(jupyter: Jupyter, engine: StandIn) -> None:
    with jupyter.by_token() as program:
        for path in ("mistudio/ping", f"{API}/jobs", f"{API}/page", f"{API}/%2e%2e", "mistudio/nothing"):
            answer = program.get(path)
            assert engine.file.token not in answer.text + str(answer.headers)
            assert engine.file.url not in answer.text + str(answer.headers)
    with open_socket(jupyter) as events:
        events.send("hello")
        assert engine.file.token not in str(events.recv(timeout=30)) + str(events.response)


def test_events_pass_both_ways_and_a_logged_in_browser_may_follow_them(jupyter: Jupyter, engine: StandIn) -> None:
    with (
        jupyter.by_cookie() as browser,
        open_socket(
            jupyter, f"?after=7&token={jupyter.token}", origin=jupyter.origin, cookies=browser.cookies
        ) as events,
    ):
        events.send('{"subscribe": ["jobs/train-0007"]}')
        assert events.recv(timeout=30) == 'heard {"subscribe": ["jobs/train-0007"]}'
    seen = engine.sockets[0]
    assert seen["query"] == "after=7"
    assert seen["headers"]["authorization"] == f"Bearer {engine.file.token}"
    assert not {"cookie", "origin"} & set(seen["headers"])


def test_when_the_browser_leaves_the_engine_is_told(jupyter: Jupyter, engine: StandIn) -> None:
    with open_socket(jupyter) as events:
        events.send("hello")
        events.recv(timeout=30)
    assert engine.closed.wait(30)


def test_when_the_engine_closes_the_browser_learns_why(jupyter: Jupyter, engine: StandIn) -> None:
    with open_socket(jupyter) as events, pytest.raises(ConnectionClosedError) as closed:
        events.send("close")
        events.recv(timeout=30)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1013, "overflow")


def test_when_the_engine_dies_the_browser_learns_it(jupyter: Jupyter, engine: StandIn) -> None:
    with open_socket(jupyter) as events:
        events.send("hello")
        events.recv(timeout=30)
        engine.stop()
        with pytest.raises(ConnectionClosedError) as closed:
            events.recv(timeout=30)
    assert closed.value.rcvd is not None and closed.value.rcvd.code in (1001, 1012)


def test_jupyter_lists_the_extension_as_enabled_and_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The command lists the user's, the environment's and the system's settings; these stand for any of them.
    shutil.copytree(JUPYTER_CONFIG, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "jupyter", "server", "extension", "list"], capture_output=True, text=True, timeout=60
    )
    said = re.sub(r"\x1b\[\d+m", "", done.stdout + done.stderr)
    assert re.search(r"mistudio_widgets.*enabled", said), said
    assert re.search(r"mistudio_widgets 0\.\d+\S* OK", re.sub(r"\s+", " ", said)), said


def test_the_first_request_starts_the_engine_and_blocks_nobody_else(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if missing := missing_packages():
        pytest.skip(f"the engine needs {', '.join(missing)}")
    home, folder = tmp_path / "home", tmp_path_factory.mktemp("jupyter")
    try:
        with (
            running_jupyter("jupyter_server", home=home, root=tmp_path, folder=folder) as jupyter,
            jupyter.by_token() as program,
            ThreadPoolExecutor(4) as others,
        ):
            assert not home.exists()
            asked, longest = time.monotonic(), 0.0
            waiting = [others.submit(program.get, "mistudio/ping", timeout=60) for _ in range(3)]
            while not all(each.done() for each in waiting):
                began = time.monotonic()
                assert program.get("api/status").status_code == 200
                longest = max(longest, time.monotonic() - began)
            took = time.monotonic() - asked
            engine = read_engine_file(home)
            assert engine is not None
            assert {each.result().json()["epoch"] for each in waiting} == {engine.epoch}
            assert longest < took / 2
            with open_socket(jupyter) as events:
                events.send('{"subscribe": ["jobs/none"], "after": 0}')
                assert '"event":"hello"' in str(events.recv(timeout=30)).replace(" ", "")
    finally:
        stop(home)


def test_installing_the_package_enables_the_extension() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    shared = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    for file in JUPYTER_CONFIG.rglob("*.json"):
        assert shared[file.relative_to(ROOT).as_posix()] == f"etc/jupyter/{file.relative_to(JUPYTER_CONFIG).as_posix()}"


def test_a_jupyter_server_that_nobody_asks_about_mistudio_starts_no_engine(jupyter: Jupyter) -> None:
    with jupyter.by_token() as program:
        assert program.get("api/status").status_code == 200
    assert not (jupyter.home / "engine.json").exists()
