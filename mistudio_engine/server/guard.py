"""The one guard in front of everything: Host, Origin, token and body size, over HTTP and WebSocket alike.

Pure ASGI and outermost, so that REST, WebSocket and MCP cannot be reached around it. It knows no routes: what a request
asks for is none of its business.
"""

from __future__ import annotations

import hmac
import json
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mistudio_engine.api.errors import Forbidden, MistudioError, TooLarge, Unauthorized, WrongHost
from mistudio_engine.api.wire import error_payload

__all__ = ["MAX_BODY_BYTES", "Guard"]

MAX_BODY_BYTES = 16 * 1024 * 1024
"""Nothing that an operation takes comes near this; files are named by path, not sent."""

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


class Guard:
    """Lets a request through to `app` when all four checks pass.

    Args:
        app: what is guarded.
        token: what `Authorization: Bearer` must carry.
        hosts: names that the Host header may carry beside the loopback ones.
        max_body_bytes: larger bodies are refused, declared or not.
    """

    def __init__(
        self, app: ASGIApp, *, token: str, hosts: frozenset[str] = frozenset(), max_body_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self.app = app
        self.token = token.encode()
        self.hosts = LOOPBACK_NAMES | hosts
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            self._check(headers)
        except MistudioError as error:
            await _refuse(error, scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self._capped(scope, receive, send)

    def _check(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        # A page of evil.example that resolves to 127.0.0.1 still says evil.example here (DNS rebinding).
        if _without_port(host) not in self.hosts:
            raise WrongHost(
                f"The Host header is {host!r}, which is not this engine.",
                fix="Call it as http://127.0.0.1:PORT, as engine.json has it.",
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and _without_port(urlsplit(origin).netloc) not in self.hosts:
            raise Forbidden(
                f"The Origin {origin!r} may not call this engine.",
                fix="A web page reaches it through the JupyterLab extension only.",
            )
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        # compare_digest takes as long for a wrong token as for a right one.
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self.token):
            raise Unauthorized(
                "The token is missing or wrong.",
                fix="Send the header 'Authorization: Bearer TOKEN' with the token that engine.json holds.",
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_body_bytes:
            raise self._too_large(length.decode("latin-1")[:20])

    async def _capped(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request whose body is counted as it comes: chunked ones do not say their length."""
        seen = 0
        started = False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:
                raise self._too_large(f"over {self.max_body_bytes}")
            return message

        async def unless_refused(message: Message) -> None:
            # Whatever the app makes of the exception above (a 500, mostly), the answer is ours.
            nonlocal started
            if seen <= self.max_body_bytes:
                started = True
                await send(message)

        try:
            await self.app(scope, counted, unless_refused)
        except Exception:
            if seen <= self.max_body_bytes:
                raise
        if seen > self.max_body_bytes and not started:
            await _refuse(self._too_large(f"over {self.max_body_bytes}"), scope, receive, send)

    def _too_large(self, length: str) -> TooLarge:
        return TooLarge(
            f"The body has {length} bytes and the cap is {self.max_body_bytes}.",
            fix="Name a file by its path on the engine's machine instead of sending it.",
        )


def _without_port(netloc: str) -> str:
    if netloc.startswith("["):
        return netloc.partition("]")[0] + "]"
    return netloc.partition(":")[0]


async def _refuse(error: MistudioError, scope: Scope, receive: Receive, send: Send) -> None:
    body = json.dumps(error_payload(error)).encode()
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    response: Any = Response(body, status_code=error.status, media_type="application/json", headers=headers)
    if scope["type"] == "websocket":
        if "websocket.http.response" in scope.get("extensions", {}):
            await response(_as_denial(scope), receive, _denial(send))
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})
        return
    await response(scope, receive, send)


def _as_denial(scope: Scope) -> Scope:
    return {**scope, "type": "http"}


def _denial(send: Send) -> Send:
    """Sends an HTTP answer as the denial of a WebSocket handshake (ASGI's websocket.http.response extension)."""

    async def renamed(message: Message) -> None:
        await send({**message, "type": f"websocket.{message['type']}"})

    return renamed
