"""The MCP server as a process of its own: quick without an engine, and there after the engine has died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StdioTransport

from mistudio_engine.api.home import probe, process_alive, read_engine_file
from mistudio_engine.server.serve import stop
from tests.behaviour.doors import Loop
from tests.mcp.conftest import MODES, Agent, connected
from tests.mcp.test_tools import OFFERED

WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data directory; whatever engine runs on it is stopped at the end."""
    path = tmp_path_factory.mktemp("stdio") / "home"
    yield path
    stop(path)


@contextmanager
def agent_on(home: Path, loop: Loop, mode: Any = "auto") -> Iterator[Agent]:
    transport = StdioTransport(
        command=sys.executable, args=["-m", "mistudio_mcp"], env={**os.environ, "MISTUDIO_HOME": str(home)}
    )
    with connected(Client(transport, mode=mode), loop) as agent:
        yield agent


@pytest.fixture(params=MODES)
def stdio(request: pytest.FixtureRequest, home: Path, loop: Loop) -> Iterator[Agent]:
    """An agent that has started `python -m mistudio_mcp`."""
    with agent_on(home, loop, request.param) as agent:
        yield agent


def until_ready(agent: Agent) -> dict[str, Any]:
    """What `status` says once the engine is there; asking again is all that an agent has to do."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        answer = agent.call("status").structured_content
        if answer["state"] == "ready":
            return answer
        assert answer["state"] == "starting"
    raise AssertionError(f"the engine was not ready within {WAIT_SECONDS:g} s")


def test_status_answers_at_once_that_the_engine_is_starting_and_then_that_it_is_ready(home: Path, loop: Loop) -> None:
    assert probe(home) is None
    with agent_on(home, loop) as agent:
        began = time.monotonic()
        assert [tool.name for tool in agent.tools()] == OFFERED
        first = agent.call("status").structured_content
        seconds = time.monotonic() - began
        assert (first["state"], first["home"]) == ("starting", str(home))
        assert first["next_call"] == {"tool": "status", "arguments": {}}
        assert seconds < 5, "far less than an engine takes to start; benchmarks/spine.py has the exact limit"
        assert until_ready(agent)["next_call"]["tool"] == "get_model"


def test_an_agent_over_stdio_has_the_same_tools_and_answers(stdio: Agent) -> None:
    assert [tool.name for tool in stdio.tools()] == OFFERED
    until_ready(stdio)
    assert stdio.call("find", kind="sae").structured_content["total"] == 0
    refused = stdio.call("describe", ref="sae/nobody")
    assert refused.is_error
    assert refused.structured_content["code"] == "not_found"


def test_the_server_outlives_its_engine(home: Path, loop: Loop) -> None:
    with agent_on(home, loop) as agent:
        until_ready(agent)
        killed = read_engine_file(home)
        assert killed is not None
        os.kill(killed.pid, signal.SIGKILL)
        deadline = time.monotonic() + WAIT_SECONDS
        while process_alive(killed.pid) and time.monotonic() < deadline:
            agent.tools()  # needs no engine
        answer = agent.call("find", kind="model")
        assert not answer.is_error, answer
        found = probe(home)
        assert found is not None and found.epoch != killed.epoch


def test_the_server_loads_no_torch() -> None:
    code = (
        "import sys; from mistudio_mcp.__main__ import Forwarder; from mistudio_mcp import build_server;"
        "build_server(Forwarder('/nonexistent'));"
        "print(sorted({'torch', 'transformers', 'lancedb'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "[]", said.stderr
