"""The REST door: the documents' routes, the OpenAPI document, and answers that are JSON whatever is sent."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import websockets.asyncio.client as sockets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mistudio_engine.api.operations import OPERATIONS, Status
from mistudio_engine.handlers import REGISTRY
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.server.http import openapi
from tests.behaviour.doors import Loop, Served

DOCUMENTED = [
    "",
    "GET /datasets",
    "POST /datasets",
    "POST /datasets/{id}/download",
    "POST /datasets/{id}/tokenize",
    "GET /datasets/{id}/statistics",
    "GET /models",
    "POST /models",
    "POST /models/{id}/download",
    "GET /models/{id}/architecture",
    "GET /trainings",
    "POST /trainings",
    "GET /trainings/{id}/metrics",
    "GET /trainings/{id}/checkpoints",
    "POST /trainings/{id}/stop",
    "POST /trainings/{id}/retry",
    "GET /features",
    "PATCH /features/{id}",
    "POST /features/extraction",
    "POST /features/labeling",
    "GET /saes",
    "POST /saes",
    "GET /saes/{id}",
    "DELETE /saes/{id}",
    "POST /saes/download-hf",
    "POST /saes/{id}/convert",
    "GET /saes/{id}/config",
    "POST /steering/generate",
    "POST /steering/compare",
    "POST /steering/sweep",
    "POST /steering/combined",
    "POST /neuronpedia/export",
    "GET /neuronpedia/export/{id}",
    "GET /neuronpedia/export/{id}/download",
    "POST /neuronpedia/export/{id}/cancel",
    "GET /neuronpedia/exports",
    "GET /system/metrics",
    "GET /system/history",
    "",
][1:-1]
"""Every route that the requirements name."""


@pytest.mark.parametrize("route", DOCUMENTED)
def test_a_documented_route_is_an_operation(route: str) -> None:
    ours = {
        f"{each.method} {re.sub('{[a-z_]+}', '{id}', each.path)}"
        for kind in OPERATIONS.values()
        for each in kind.routes
    }
    assert route in ours


def test_openapi_describes_every_route() -> None:
    document = openapi()
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    expected = {(each.method, f"/api/v1{each.path}") for kind in OPERATIONS.values() for each in kind.routes}
    assert described == expected
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"]), "every reference leads somewhere"
    names = [item["operationId"] for path in document["paths"].values() for item in path.values()]
    assert len(names) == len(set(names))


def test_the_engine_serves_its_openapi_document(bare: Served) -> None:
    with bare.http(headers=bare.headers) as client:
        assert client.get("/api/v1/openapi.json").json() == json.loads(json.dumps(openapi()))


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/api/v1/saes/nobody", None, 404, "not_found"),
        ("GET", "/api/v1/nothing/here", None, 404, "not_found"),
        ("GET", "/api/v1/saes?limit=0", None, 422, "bad_input"),
        ("GET", "/api/v1/saes?limit=ten", None, 422, "bad_input"),
        ("GET", "/api/v1/saes?colour=red", None, 422, "bad_input"),
        ("POST", "/api/v1/models", b"{", 422, "bad_input"),
        ("POST", "/api/v1/models", b"[1]", 422, "bad_input"),
        ("POST", "/api/v1/models", b"\xff\xfe", 422, "bad_input"),
        ("POST", "/api/v1/models", b"{}", 422, "bad_input"),
        ("PATCH", "/api/v1/features/x", b'{"label": "a"}', 422, "bad_input"),
        ("PATCH", "/api/v1/features/x:1", b'{"label": "a"}', 404, "not_found"),
        ("GET", "/api/v1/saes/..%2f..%2fetc", None, 404, "not_found"),
        ("GET", "/api/v1/saes/%00", None, 422, "bad_input"),
    ],
)
def test_a_wrong_request_gets_a_typed_error(
    bare: Served, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    with bare.http(headers=bare.headers) as client:
        response = client.request(method, path, content=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["what"] and error["fix"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    route=st.sampled_from([(kind, route) for kind in OPERATIONS.values() for route in kind.routes]),
    text=st.text(min_size=1, max_size=20),
    arguments=st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=9), max_size=3),
)
def test_rubbish_never_breaks_the_engine(bare: Served, route: Any, text: str, arguments: dict[str, Any]) -> None:
    from urllib.parse import quote

    kind, (method, path) = route
    if "wait_s" in kind.model_fields:
        arguments.pop("wait_s", None)
    path = re.sub(r"{\w+}", lambda _: quote(text.encode("utf-8", "replace"), safe=""), path)
    with bare.http(headers=bare.headers) as client:
        response = client.request(method, f"/api/v1{path}", content=json.dumps(arguments).encode())
    assert response.status_code < 500, response.text


def test_the_event_stream_replays_what_was_missed(bare: Served, loop: Loop) -> None:
    bus = bare.engine.bus
    first = bus.publish("jobs/story", "metrics", {"n": 1})
    bus.publish("jobs/other", "metrics", {"n": 0})
    bus.publish("jobs/story", "metrics", {"n": 2})

    async def follow() -> list[dict[str, Any]]:
        seen = []
        url = "ws" + bare.url[4:] + "/api/v1/ws"
        async with sockets.connect(url, proxy=None, additional_headers=bare.headers) as socket:
            await socket.send(json.dumps({"subscribe": ["jobs/story"], "after": first.seq - 1}))
            while len(seen) < 4:
                seen.append(json.loads(await socket.recv()))
                if len(seen) == 3:
                    bus.publish("jobs/story", "metrics", {"n": 3})
        return seen

    hello, *events = loop.run(follow())
    assert hello["data"]["epoch"] == bare.engine.epoch
    assert [event["data"]["n"] for event in events] == [1, 2, 3]
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})


def test_the_hello_says_where_the_log_is(bare: Served, loop: Loop) -> None:
    bare.engine.bus.publish("jobs/story", "metrics", {"n": 0})

    async def hello(**asked: Any) -> dict[str, Any]:
        async with sockets.connect(
            "ws" + bare.url[4:] + "/api/v1/ws", proxy=None, additional_headers=bare.headers
        ) as ws:
            await ws.send(json.dumps({"subscribe": ["jobs/nobody"], **asked}))
            return json.loads(await ws.recv())

    before = bare.engine.bus.seq
    assert before > 0
    assert before <= loop.run(hello())["seq"] <= bare.engine.bus.seq
    assert loop.run(hello(after=0))["seq"] == 0


def test_a_wrong_subscription_is_told_so(bare: Served, loop: Loop) -> None:
    async def attempt() -> dict[str, Any]:
        url = "ws" + bare.url[4:] + "/api/v1/ws"
        async with sockets.connect(url, proxy=None, additional_headers=bare.headers) as socket:
            await socket.send("subscribe to everything, please")
            return json.loads(await socket.recv())

    answer = loop.run(attempt())
    assert answer["event"] == "error"
    assert answer["data"]["error"]["code"] == "bad_input"


def test_while_it_starts_the_status_says_to_ask_again(tmp_path: Path) -> None:
    engine = Engine(tmp_path, REGISTRY)
    status = engine.call(Status())
    assert status.state == "starting"
    assert status.next_call is not None and (status.next_call.tool, status.next_call.arguments) == ("status", {})
    engine.stop()


def test_events_can_be_polled_without_a_socket(bare: Served) -> None:
    before = bare.engine.bus.publish("jobs/polled", "metrics", {"n": 1}).seq - 1
    with bare.http(headers=bare.headers) as client:
        page = client.get("/api/v1/events", params={"after": before, "channels": "jobs/polled"}).json()
    assert [event["data"] for event in page["events"]] == [{"n": 1}]
    assert page["seq"] > before
