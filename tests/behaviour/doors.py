"""Three ways to call one engine: in process, over REST, over MCP. A behaviour test does not know which one it has.

Answers come as `Answer`, plain data with attributes, since an agent is given less than a program.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport

from mistudio_engine.api import wire
from mistudio_engine.api.client import AsyncStudio
from mistudio_engine.api.errors import ErrorBody, error_from_body
from mistudio_engine.api.home import EngineFile
from mistudio_engine.api.operations import ControlJob, Describe, GetFeature, ListJobs, Operation, ShowJob
from mistudio_engine.handlers import REGISTRY
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.server.app import build_app

Door = Callable[[Operation[Any]], Any]


class Answer(SimpleNamespace):
    """A result with attributes; what is not in it is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def answer(value: Any) -> Any:
    if isinstance(value, dict):
        return Answer(**{key: answer(each) for key, each in value.items()})
    return [answer(each) for each in value] if isinstance(value, list) else value


class Loop:
    """An event loop on a thread, for tests that are not async."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, coroutine: Any, timeout: float = 90) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Served:
    """An engine with its app listening on a loopback port."""

    def __init__(self, engine: Engine, url: str) -> None:
        self.engine, self.url = engine, url
        self.headers = {"Authorization": f"Bearer {engine.token}"}

    def http(self, **keywords: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, timeout=60, **keywords)


def started(home: Path) -> Engine:
    """A real engine without a server, once it is ready."""
    engine = Engine(home, REGISTRY)
    engine.start()
    engine.wait_ready(120)
    return engine


@contextmanager
def served(home: Path) -> Iterator[Served]:
    """A real engine behind a real server, in this process."""
    engine = Engine(home, REGISTRY)
    config = uvicorn.Config(build_app(engine), host="127.0.0.1", port=0, log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    engine.start()
    thread.start()
    engine.wait_ready(120)
    for _ in range(1000):
        if server.started:
            break
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(engine, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        engine.bus.close()
        thread.join(30)
        engine.stop()


def in_process(served: Served, loop: Loop) -> Iterator[Door]:
    def call(operation: Operation[Any]) -> Any:
        return answer(served.engine.call(operation).model_dump(mode="json"))

    yield call


def over_rest(served: Served, loop: Loop) -> Iterator[Door]:
    studio = AsyncStudio(served.engine.home, autostart=False)
    studio._engine = EngineFile(
        url=served.url, token=served.engine.token, pid=1, version="", epoch=served.engine.epoch, started_at=0
    )

    def call(operation: Operation[Any]) -> Any:
        return answer(loop.run(studio.call(operation)).model_dump(mode="json"))

    yield call
    loop.run(studio.close())


def over_mcp(served: Served, loop: Loop, mode: Any = "auto") -> Iterator[Door]:
    client = Client(StreamableHttpTransport(f"{served.url}/mcp/", headers=served.headers), mode=mode)
    loop.run(client.__aenter__())

    def call(operation: Operation[Any]) -> Any:
        name, arguments = as_tool(operation)
        result = loop.run(client.call_tool(name, arguments, raise_on_error=False))
        if result.is_error:
            raise error_from_body(ErrorBody.model_validate(result.structured_content))
        structure = dict(result.structured_content)
        structure.setdefault("slug", structure.get("id"))  # a job's
        return answer(structure)

    yield call
    loop.run(client.__aexit__(None, None, None))


def as_tool(operation: Operation[Any]) -> tuple[str, dict[str, Any]]:
    """The tool call that an agent would make for an operation."""
    arguments = operation.model_dump(mode="json", exclude_unset=True)
    match operation:
        case Describe():
            return "describe", {"ref": f"{operation.kind}/{operation.slug}"}
        case GetFeature():
            return "get_feature", {"ref": f"sae/{operation.sae}#{operation.index}"}
        case ShowJob():
            return "job", {"id": operation.job, "wait_s": operation.wait_s}
        case ListJobs():
            return "job", {}
        case ControlJob():
            return "job_control", {"id": operation.job, "action": operation.action}
    return operation.tool, arguments


DOORS = {"in process": in_process, "REST": over_rest, "MCP": over_mcp}

__all__ = ["DOORS", "Answer", "Door", "Loop", "Served", "answer", "as_tool", "served", "wire"]
