"""The door through Jupyter Server: `/mistudio/*` is forwarded to the engine, under Jupyter's own authentication.

Three fixed addresses and nothing else: `/mistudio/ping`, `/mistudio/api/v1/…` and the WebSocket `/mistudio/api/v1/ws`.
Jupyter decides who may ask (login, XSRF, Origin, authorizer); the engine's token is added here and never reaches the
browser. What the requests mean is the engine's business.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from http.client import responses
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

import httpx
from jupyter_core.utils import ensure_async
from jupyter_server.auth.decorator import authorized, ws_authenticated
from jupyter_server.base.handlers import APIHandler, JupyterHandler
from jupyter_server.base.websocket import WebSocketMixin
from jupyter_server.serverapp import ServerApp
from tornado import web
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClosedError, WebSocketHandler
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from mistudio_engine.api.errors import MistudioError, NotFound, TooLarge, human_bytes
from mistudio_widgets.engine_link import MistudioLink

__all__: list[str] = []

API = "/api/v1"

AUTH_RESOURCE = "mistudio"
"""What Jupyter's authorizer is asked about."""

REQUEST_HEADERS = ("accept", "content-type", "idempotency-key", "if-none-match", "if-range", "range")
"""All that the engine sees of the browser's headers: no cookie, no Origin, no Host, none of Jupyter's tokens."""

ANSWER_HEADERS = (
    "Accept-Ranges",
    "Cache-Control",
    "Content-Disposition",
    "Content-Encoding",
    "Content-Length",
    "Content-Range",
    "Content-Type",
    "ETag",
    "Last-Modified",
    "Retry-After",
)
"""All that the browser sees of the engine's: no cookie, no CORS, nothing that concerns one connection only."""

JUPYTER_ARGUMENTS = frozenset({"token", "_xsrf", "no_track_activity"})
"""Query arguments that are Jupyter's own and stay here."""

FRAME_BYTES = 64 * 1024
"""The largest message a browser may send over the WebSocket: it only subscribes."""

CODES = {403: "forbidden", 404: "not_found", 405: "bad_input", 413: "too_large"}
"""Jupyter's refusals in our words."""


def safe_api_path(raw: str) -> str:
    """The path below `/api/v1` as it may be forwarded, still percent-encoded.

    Raises:
        NotFound: it has an empty, `.` or `..` segment, or hides a slash, backslash or control character in an escape,
            however often encoded. No path of the API needs any of these, and each could lead out of it.
    """
    decoded = raw
    while (further := unquote(decoded)) != decoded:
        decoded = further
    segments = decoded.split("/")
    hidden = (
        len(segments) != len(raw.split("/")) or "\\" in decoded or any(ord(c) < 32 or ord(c) == 127 for c in decoded)
    )
    if hidden or any(segment in ("", ".", "..") for segment in segments):
        raise NotFound(f"There is no {raw!r} in the API.", fix="Send names without slashes and dots alone.")
    return f"{API}/{raw}"


def engine_query(query: str) -> str:
    """The query without Jupyter's own arguments."""
    return urlencode([pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] not in JUPYTER_ARGUMENTS])


class EngineHandler(APIHandler):
    """Forwards one request: to the engine's `path`, or without one to whatever follows `/mistudio/api/v1/`."""

    auth_resource = AUTH_RESOURCE
    _track_activity = False  # a widget that follows a job is nobody at work: an idle server may still be culled

    def initialize(self, link: MistudioLink, prefix: str, path: str | None = None) -> None:
        self.link, self.prefix, self.path = link, prefix, path

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("X-Content-Type-Options", "nosniff")

    @property
    def content_security_policy(self) -> str:
        """An exported page is data here: opened under Jupyter's origin, its scripts would act as the user."""
        return f"{super().content_security_policy}; sandbox"

    # One function a verb: `@authorized` settles its action at the first call it sees.
    @web.authenticated
    @authorized
    async def get(self) -> None:
        await self._forward()

    @web.authenticated
    @authorized
    async def head(self) -> None:
        await self._forward()

    @web.authenticated
    @authorized
    async def post(self) -> None:
        await self._forward()

    @web.authenticated
    @authorized
    async def put(self) -> None:
        await self._forward()

    @web.authenticated
    @authorized
    async def patch(self) -> None:
        await self._forward()

    @web.authenticated
    @authorized
    async def delete(self) -> None:
        await self._forward()

    async def _forward(self) -> None:
        headers = {name: value for name in REQUEST_HEADERS if (value := self.request.headers.get(name)) is not None}
        headers["accept-encoding"] = "identity"  # Jupyter compresses for the browser, if it is set to
        try:
            self._check_size()
            async with self.link.request(
                self.request.method or "GET",
                self.path or safe_api_path(self.request.path.removeprefix(self.prefix)),
                query=engine_query(self.request.query),
                headers=headers,
                body=self.request.body or None,
            ) as answer:
                await self._pass_on(answer)
        except MistudioError as error:
            self._answer_error(error)

    async def _pass_on(self, answer: httpx.Response) -> None:
        self.set_status(answer.status_code, answer.reason_phrase or None)
        for name in ANSWER_HEADERS:
            if name in answer.headers:
                self.set_header(name, answer.headers[name])
        try:
            async for chunk in answer.aiter_raw():
                self.write(chunk)
                await self.flush()
        except StreamClosedError:
            return  # the browser went away
        except httpx.HTTPError as error:
            self.log.warning("miStudio's engine broke off an answer: %r", error)
            # Ending the answer would make a torn download look whole.
            return self.request.connection.close()  # type: ignore[union-attr]
        self.finish(set_content_type=answer.headers.get("content-type", "application/json"))

    def _check_size(self) -> None:
        # Jupyter has read it all by now, as it does for every handler: an answer given earlier would cut the
        # connection, and the browser would see a fault of the network instead of the reason.
        if len(self.request.body) > self.link.max_body_bytes:
            raise TooLarge(
                f"A request may have {human_bytes(self.link.max_body_bytes)}; "
                f"this one has {human_bytes(len(self.request.body))}.",
                fix="Bring large files in by their path or hub id.",
            )

    def _answer_error(self, error: MistudioError) -> None:
        self.set_status(error.status)
        self.finish(json.dumps({"error": error.body.model_dump()}))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Jupyter's refusals in the shape of the engine's errors."""
        error = kwargs.get("exc_info", (None, None))[1]
        what = (error.log_message if isinstance(error, web.HTTPError) else None) or responses.get(status_code, "")
        fix = "Log in to Jupyter and reload the page." if status_code == 403 else ""
        body = {"code": CODES.get(status_code, "internal"), "what": what, "why": "", "fix": fix, "next_call": None}
        self.finish(json.dumps({"message": what, "error": body}))


class EventsHandler(WebSocketMixin, WebSocketHandler, JupyterHandler):
    """The engine's event log: one WebSocket on either side, the engine's opened before the browser's is accepted."""

    auth_resource = AUTH_RESOURCE

    def initialize(self, link: MistudioLink) -> None:
        self.link = link
        self.engine: ClientConnection | None = None
        self.pump: asyncio.Task[None] | None = None

    def set_default_headers(self) -> None:
        """A handshake has no use for Jupyter's content headers."""

    @ws_authenticated
    async def get(self, *args: Any, **kwargs: Any) -> None:
        allowed = await ensure_async(self.authorizer.is_authorized(self, self.current_user, "read", AUTH_RESOURCE))
        # Tornado looks at the Origin too, but only after this has knocked at the engine.
        if not allowed or not self.check_origin(self.request.headers.get("Origin")):
            raise web.HTTPError(403)
        if self.request.headers.get("Upgrade", "").lower() != "websocket":
            raise web.HTTPError(400, "This address is a WebSocket.")
        try:
            engine = self.engine = await self.link.socket(f"{API}/ws", engine_query(self.request.query))
        except InvalidStatus as error:
            self.set_status(error.response.status_code)
            self.set_header("Content-Type", "application/json")
            return await self.finish(bytes(error.response.body))
        except MistudioError as error:
            self.set_status(error.status)
            return await self.finish({"error": error.body.model_dump()})
        try:
            await super().get(*args, **kwargs)  # lasts as long as the connection
        finally:
            await engine.close()

    async def open(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().open(*args, **kwargs)
        self.pump = asyncio.create_task(self._pump())

    async def on_message(self, message: str | bytes) -> None:  # type: ignore[override]
        assert self.engine is not None
        if len(message) > FRAME_BYTES:
            return self.close(1009, f"A message may have {FRAME_BYTES} bytes.")
        with suppress(ConnectionClosed):  # the pump tells the browser
            await self.engine.send(message)

    def on_close(self) -> None:
        if self.pump is not None:
            self.pump.cancel()

    async def _pump(self) -> None:
        """Pass the engine's messages on, no faster than the browser takes them."""
        assert self.engine is not None
        try:
            async with self.engine as engine:
                async for message in engine:
                    await self.write_message(message, binary=isinstance(message, bytes))
        except (ConnectionClosed, WebSocketClosedError):
            pass
        code = self.engine.close_code
        # 1005 and 1006 say that there was no close frame, and may not stand in one.
        self.close(
            code if code and code not in (1005, 1006) else 1012, self.engine.close_reason or "The engine went away."
        )


def _load_jupyter_server_extension(serverapp: ServerApp) -> None:
    link = MistudioLink(parent=serverapp)
    mount = serverapp.web_app.settings["base_url"].rstrip("/") + "/mistudio"
    api = f"{mount}{API}/"
    serverapp.web_app.add_handlers(
        ".*$",
        [
            (re.escape(f"{mount}/ping"), EngineHandler, {"link": link, "prefix": mount, "path": "/ping"}),
            (re.escape(f"{api}ws"), EventsHandler, {"link": link}),
            (re.escape(api) + ".+", EngineHandler, {"link": link, "prefix": api}),
        ],
    )
    serverapp.log.info("miStudio is forwarded from %s/", mount)
