"""One engine with the embedded model and a little text, and clients that reach it as agents do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any

import pytest
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport

from mistudio_engine.api.operations import GetDataset, GetModel
from mistudio_mcp import build_server
from tests.behaviour.doors import Loop, Served, served

MODES = ("auto", "legacy")
"""The protocol of 2026-07-28 without sessions, and the handshake of older clients."""


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    """An event loop on a thread."""
    made = Loop()
    yield made
    made.close()


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real engine behind a real server, with a model and a dataset that something can be trained on."""
    with served(tmp_path_factory.mktemp("home")) as made:
        for operation in (
            GetModel(source="embedded", name="tiny"),
            GetDataset(source="embedded", name="corpus", model="tiny", n_tokens=20_000),
        ):
            job = made.engine.jobs.wait(made.engine.call(operation).slug, 60)
            assert job.state == "completed", job.error
        yield made


class Agent:
    """A connected client, for tests that are not async."""

    def __init__(self, client: Client[Any], loop: Loop) -> None:
        self.client, self.loop = client, loop

    def tools(self) -> list[Any]:
        return self.loop.run(self.client.list_tools())

    def call(self, name: str, **arguments: Any) -> Any:
        return self.loop.run(self.client.call_tool(name, arguments, raise_on_error=False))


@contextmanager
def connected(client: AbstractAsyncContextManager[Any], loop: Loop) -> Iterator[Agent]:
    opened = loop.run(client.__aenter__())
    try:
        yield Agent(opened, loop)
    finally:
        loop.run(client.__aexit__(None, None, None))


@pytest.fixture(scope="session")
def agent(studio: Served, loop: Loop) -> Iterator[Agent]:
    """An agent in memory, around the engine's own call."""
    with connected(Client(build_server(studio.engine.acall)), loop) as made:
        yield made


@pytest.fixture(params=[f"{door}, {mode}" for door in ("in memory", "HTTP") for mode in MODES])
def each_agent(request: pytest.FixtureRequest, studio: Served, loop: Loop) -> Iterator[Agent]:
    """An agent by each way and protocol in turn; stdio has tests of its own."""
    door, mode = request.param.split(", ")
    if door == "HTTP":
        transport: Any = StreamableHttpTransport(f"{studio.url}/mcp/", headers=studio.headers)
    else:
        transport = build_server(studio.engine.acall)
    with connected(Client(transport, mode=mode), loop) as made:
        yield made
