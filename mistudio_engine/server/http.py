"""The REST and WebSocket door: every operation's routes, the OpenAPI document and the event stream.

All of it is derived from the catalogue. A request becomes an operation, `call` answers a result, and that is written as
JSON; what an operation does is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from mistudio_engine import __version__
from mistudio_engine.api.errors import BadInput, Internal, MistudioError, NotFound
from mistudio_engine.api.exports import Download
from mistudio_engine.api.operations import OPERATIONS, Operation
from mistudio_engine.api.wire import API, CALLER_HEADER, error_payload, parse_operation
from mistudio_engine.runtime.engine import Engine

__all__ = ["openapi", "routes"]

log = logging.getLogger(__name__)

Call = Callable[..., Awaitable[Any]]


def routes(engine: Engine) -> list[BaseRoute]:
    """Every route below `/api/v1`, and `/ping`."""
    # Fixed paths before those with parameters: /saes/download-hf must not be an SAE's name.
    endpoints = [(route, kind) for kind in OPERATIONS.values() for route in kind.routes]
    endpoints.sort(key=lambda pair: (len(pair[0].parameters) > 0, pair[0].path))
    return [
        Route("/ping", _ping(engine), methods=["GET"]),
        Route(f"{API}/openapi.json", _openapi_endpoint, methods=["GET"]),
        WebSocketRoute(f"{API}/ws", _event_stream(engine)),
        *(
            Route(API + route.path, _endpoint(kind, route.method, engine), methods=[route.method], name=kind.tool)
            for route, kind in endpoints
        ),
        Route(API + "/{path:path}", _unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]


def _ping(engine: Engine) -> Callable[[Request], Awaitable[Response]]:
    async def ping(_: Request) -> Response:
        return JSONResponse({"epoch": engine.epoch, "version": __version__, "state": engine.state})

    return ping


async def _unknown(request: Request) -> Response:
    error = NotFound(
        f"There is no route {request.method} {request.url.path}.", fix=f"GET {API}/openapi.json lists the routes."
    )
    return JSONResponse(error_payload(error), status_code=error.status)


def _endpoint(kind: type[Operation[Any]], method: str, engine: Engine) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            arguments = await _arguments(request, method)
            operation = parse_operation(kind, arguments | request.path_params)
            result = await engine.acall(operation, caller=_caller(request))
        except MistudioError as error:
            return JSONResponse(error_payload(error), status_code=error.status)
        except Exception:  # the edge: everything else is a fault of ours, and its trace belongs in the log only
            log.exception("%s failed", kind.tool)
            error = Internal(f"{kind.tool} failed inside the engine.", fix="`mistudio engine logs` has the trace.")
            return JSONResponse(error_payload(error), status_code=error.status)
        return _answer(result)

    return endpoint


def _caller(request: Request) -> str:
    """Who signs what this request changes; nobody but a job may sign as one."""
    name = request.headers.get(CALLER_HEADER, "person")
    if not re.fullmatch(r"person|agent:[\w.-]{1,64}", name):
        raise BadInput(
            f"The header {CALLER_HEADER} is {name[:80]!r}.",
            fix="Send `person`, or `agent:` with a name of letters and digits.",
        )
    return name


async def _arguments(request: Request, method: str) -> dict[str, Any]:
    if method in ("GET", "DELETE"):
        return dict(request.query_params)
    body = await request.body()
    if not body:
        return {}
    try:
        arguments = json.loads(body)
    except ValueError as error:
        raise BadInput(f"The body is not JSON: {error}.", fix="Send one JSON object with the arguments.") from None
    if not isinstance(arguments, dict):
        raise BadInput(f"The body is a JSON {type(arguments).__name__}, not an object.", fix="Send one JSON object.")
    return arguments


def _answer(result: BaseModel) -> Response:
    if isinstance(result, Download):
        headers = {
            "X-Mistudio-Path": result.path,
            "X-Mistudio-Filename": result.filename,
            "X-Mistudio-Sha256": result.sha256,
        }
        return FileResponse(result.path, media_type=result.media_type, filename=result.filename, headers=headers)
    return Response(result.model_dump_json(), media_type="application/json")


def _event_stream(engine: Engine) -> Callable[[WebSocket], Awaitable[None]]:
    """`{subscribe: [channel], after: seq}` in, events out: what was missed, then what comes."""

    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        following: asyncio.Task[None] | None = None
        try:
            while True:
                message = await socket.receive_text()
                channels, after = _subscription(message)
                if following:
                    following.cancel()
                following = asyncio.create_task(_follow(socket, engine, channels, after))
        except WebSocketDisconnect:
            pass
        except MistudioError as error:
            await socket.send_json(
                {"channel": "engine", "event": "error", "seq": engine.bus.seq, "data": error_payload(error)}
            )
            await socket.close(code=1008, reason=error.code)
        finally:
            if following:
                following.cancel()

    return stream


def _subscription(message: str) -> tuple[list[str] | None, int | None]:
    try:
        asked = json.loads(message)
        channels, after = asked["subscribe"], asked.get("after")
        if not isinstance(channels, list) or not all(isinstance(each, str) for each in channels):
            raise ValueError("subscribe is not a list of channels")
        if after is not None and (not isinstance(after, int) or after < 0):
            raise ValueError("after is not a sequence number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"This is not a subscription: {message[:80]!r} ({error}).",
            fix='Send {"subscribe": ["jobs/train-0007"], "after": 0}.',
        ) from None
    return (None if "*" in channels else channels), after


async def _follow(socket: WebSocket, engine: Engine, channels: list[str] | None, after: int | None) -> None:
    hello = {"epoch": engine.epoch, "version": __version__, "state": engine.state}
    with contextlib.suppress(WebSocketDisconnect):
        async with engine.bus.subscribe(channels, after=after) as events:
            seq = engine.bus.seq if after is None else after  # whoever connects again goes on from there
            await socket.send_json(
                {"channel": "engine", "event": "hello", "seq": seq, "at": 0.0, "data": hello, "transient": True}
            )
            async for event in events:
                await socket.send_text(event.model_dump_json())
        # The reader was too slow for its queue: it reconnects and is given what it missed.
        await socket.close(code=1013, reason="overflow")


async def _openapi_endpoint(_: Request) -> Response:
    return JSONResponse(openapi())


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document of all operations."""
    kinds = list(OPERATIONS.values())
    models = [(kind, "validation") for kind in kinds] + [(kind.result, "serialization") for kind in kinds]
    references, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = definitions.get("$defs", {})
    schemas["Error"] = _error_schema(schemas)
    paths: dict[str, Any] = {}
    for kind in kinds:
        answer = references[(kind.result, "serialization")]
        for route in kind.routes:
            paths.setdefault(API + route.path, {})[route.method.lower()] = _path_item(kind, route, answer)
    return {
        "openapi": "3.1.0",
        "info": {"title": "miStudio", "version": __version__, "description": "One engine for sparse autoencoders."},
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _path_item(kind: type[Operation[Any]], route: Any, answer: dict[str, Any]) -> dict[str, Any]:
    in_path = set(route.parameters)
    properties = kind.model_json_schema(ref_template="#/components/schemas/{model}").get("properties", {})
    content = (
        {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        if kind.result is Download
        else {"application/json": {"schema": answer}}
    )
    item: dict[str, Any] = {
        "operationId": kind.tool
        if route == kind.routes[0]
        else f"{kind.tool}_{route.path.strip('/').replace('/', '_').replace('{', '').replace('}', '')}",
        "summary": (kind.__doc__ or "").strip().split("\n")[0],
        "description": (kind.__doc__ or "").strip(),
        "responses": {
            "200": {"description": "The result.", "content": content},
            "default": {
                "description": "What went wrong and what to do.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": properties.get(name, {}).get("type", "string")},
        }
        for name in route.parameters
    ]
    if route.method in ("GET", "DELETE"):
        parameters += [
            {
                "name": name,
                "in": "query",
                "required": False,
                "schema": schema,
                "description": schema.get("description", ""),
            }
            for name, schema in properties.items()
            if name not in in_path
        ]
    else:
        item["requestBody"] = {
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        }
    if parameters:
        item["parameters"] = parameters
    return item


def _error_schema(schemas: dict[str, Any]) -> dict[str, Any]:
    from mistudio_engine.api.errors import ErrorBody

    schema = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schema.pop("$defs", {})
    return {"type": "object", "properties": {"error": schema}, "required": ["error"]}
