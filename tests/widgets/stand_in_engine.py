"""A small engine for the tests of the door: it answers at real sockets, and says what reached it.

The real engine is used where the behaviour is the engine's; here the door is tested, and only something on the other
side of it can tell what came through.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from mistudio_engine.api.home import EngineFile, remove_engine_file, write_engine_file

N_CHUNKS = 64
CHUNK = b"0123456789abcdef" * 4096  # 64 KiB


class StandIn:
    """Listens from its making until `stop`; its token and address are in the directory's `engine.json`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.seen: list[dict[str, Any]] = []
        self.sockets: list[dict[str, Any]] = []
        self.closed = threading.Event()
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.file = EngineFile(
            url=f"http://127.0.0.1:{listening.getsockname()[1]}",
            token=secrets.token_urlsafe(),
            pid=os.getpid(),
            version="0",
            epoch=secrets.token_hex(8),
            started_at=0.0,
        )
        methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
        app = Starlette(
            routes=[
                Route("/ping", self._ping),
                Route("/secret", self._echo, methods=methods),
                Route("/api/v1/download", self._download),
                Route("/api/v1/torn", self._torn),
                Route("/api/v1/page", self._page),
                WebSocketRoute("/api/v1/ws", self._events),
                Route("/api/v1/{path:path}", self._echo, methods=methods),
            ]
        )
        config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="websockets-sansio")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]})
        listening.listen()  # connections wait in its queue until the server takes them
        self._thread.start()
        write_engine_file(home, self.file)

    def stop(self) -> None:
        """Stop answering; a file that names this one goes too."""
        remove_engine_file(self.home, self.file.epoch)
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(30)

    def _known(self, headers: Any) -> bool:
        return headers.get("authorization") == f"Bearer {self.file.token}"

    async def _ping(self, request: Request) -> Response:
        return JSONResponse({"epoch": self.file.epoch, "known": self._known(request.headers)})

    async def _echo(self, request: Request) -> Response:
        headers = {name: value for name, value in request.headers.items() if name != "authorization"}
        seen = {
            "method": request.method,
            "path": request.scope["raw_path"].decode(),
            "query": request.url.query,
            "headers": headers,
            "body": (await request.body()).decode("latin-1"),
            "known": self._known(request.headers),
        }
        self.seen.append(seen)
        if not seen["known"]:
            return JSONResponse({"error": {"code": "unauthorized", "what": "wrong token"}}, status_code=401)
        return JSONResponse(
            seen, headers={"Set-Cookie": "engine=1", "Access-Control-Allow-Origin": "*", "Keep-Alive": "timeout=5"}
        )

    async def _download(self, _: Request) -> Response:
        async def chunks() -> Any:
            for _ in range(N_CHUNKS):
                yield CHUNK

        headers = {"Content-Disposition": 'attachment; filename="studio.zip"'}
        return StreamingResponse(chunks(), media_type="application/zip", headers=headers)

    async def _torn(self, _: Request) -> Response:
        async def chunks() -> Any:
            yield CHUNK
            raise ConnectionResetError("the engine dies in mid-answer")

        return StreamingResponse(chunks(), media_type="application/zip")

    async def _page(self, _: Request) -> Response:
        return Response("<script>alert(1)</script>", media_type="text/html")

    async def _events(self, socket: WebSocket) -> None:
        self.sockets.append({"query": socket.url.query, "headers": dict(socket.headers)})
        await socket.accept()
        try:
            while True:
                message = await socket.receive_text()
                if message == "close":
                    await socket.close(1013, "overflow")
                    return
                await socket.send_text(f"heard {message}")
        except (WebSocketDisconnect, asyncio.CancelledError):
            self.closed.set()
