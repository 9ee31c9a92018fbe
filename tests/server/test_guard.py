"""Nothing gets in: token, Host, Origin and body size, on REST, WebSocket and MCP alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import websockets.asyncio.client as sockets
from starlette.routing import Mount, Route, WebSocketRoute
from websockets.exceptions import InvalidStatus

from mistudio_engine.server.app import build_app
from mistudio_engine.server.guard import MAX_BODY_BYTES, Guard
from tests.behaviour.doors import Loop, Served

DOORS = {"REST": "/api/v1/system/status", "MCP": "/mcp/", "ping": "/ping", "OpenAPI": "/api/v1/openapi.json"}


def every_route(served: Served) -> Iterator[tuple[str, str]]:
    """Method and path of every route of the app, read off the app itself."""
    guard = build_app(served.engine)
    assert isinstance(guard, Guard), "the guard is outermost"
    for route in guard.app.routes:  # type: ignore[attr-defined]
        if isinstance(route, Route):
            for method in route.methods or ():
                yield method, route.path.replace("{path:path}", "nothing").replace("{", "").replace("}", "")
        elif isinstance(route, Mount):
            yield "POST", route.path + "/"


def test_every_route_answers_401_without_the_token(bare: Served) -> None:
    routes = list(every_route(bare))
    assert len(routes) > 50
    with bare.http() as client:
        for method, path in routes:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {bare.engine.token}"}):
                response = client.request(method, path, headers=headers)
                assert response.status_code == 401, f"{method} {path} answered {response.status_code}"
            if method != "HEAD":
                assert response.json()["error"]["code"] == "unauthorized"


def connect(bare: Served, loop: Loop, headers: dict[str, str]) -> Any:
    async def attempt() -> Any:
        async with sockets.connect(
            "ws" + bare.url[4:] + "/api/v1/ws", proxy=None, additional_headers=headers
        ) as socket:
            await socket.send(json.dumps({"subscribe": ["*"], "after": 0}))
            return json.loads(await socket.recv())

    return loop.run(attempt())


def test_every_websocket_is_guarded_like_the_rest(bare: Served, loop: Loop) -> None:
    app = build_app(bare.engine).app  # type: ignore[attr-defined]
    paths = [route.path for route in app.routes if isinstance(route, WebSocketRoute)]
    assert paths == ["/api/v1/ws"]
    assert connect(bare, loop, bare.headers)["event"] == "hello"
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({**bare.headers, "Origin": "https://evil.example"}, 403),
    ):
        with pytest.raises(InvalidStatus) as refused:
            connect(bare, loop, headers)
        assert refused.value.response.status_code == status


@pytest.mark.parametrize("door", DOORS)
def test_a_foreign_host_is_answered_421(bare: Served, door: str) -> None:
    with bare.http(headers=bare.headers) as client:
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil.example"):
            response = client.get(DOORS[door], headers={"Host": host})
            assert response.status_code in (400, 421), host
        assert client.get(DOORS[door], headers={"Host": "evil.example"}).json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("door", DOORS)
def test_a_foreign_origin_is_answered_403(bare: Served, door: str) -> None:
    with bare.http(headers=bare.headers) as client:
        for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example", "file://"):
            response = client.get(DOORS[door], headers={"Origin": origin})
            assert response.status_code == 403, origin
        assert client.get(DOORS[door], headers={"Origin": bare.url}).status_code != 403


@pytest.mark.parametrize("door", DOORS)
def test_a_body_over_the_cap_is_answered_413_declared_or_not(bare: Served, door: str) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // (1 << 20) + 2):
            yield b" " * (1 << 20)

    with bare.http(headers=bare.headers) as client:
        declared = client.post(DOORS[door], content=b" " * (MAX_BODY_BYTES + 1))
        assert declared.status_code == 413
    if door == "MCP":
        with bare.http(headers=bare.headers | {"Accept": "application/json, text/event-stream"}) as client:
            assert (
                client.post(DOORS[door], content=chunks(), headers={"Content-Type": "application/json"}).status_code
                == 413
            )


def test_an_undeclared_body_is_counted(bare: Served) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // (1 << 20) + 2):
            yield b" " * (1 << 20)

    with bare.http(headers=bare.headers) as client:
        assert client.post("/api/v1/models", content=chunks()).status_code == 413


def test_the_token_is_in_no_log_and_no_answer(bare: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), bare.http(headers=bare.headers) as client:
        answers = [client.get(path).text for path in DOORS.values()]
        answers.append(client.get("/api/v1/nothing").text)
        answers.append(client.post("/api/v1/models", content=b"{").text)
    assert bare.engine.token not in "".join(answers) + caplog.text
