"""One ASGI app: REST, WebSocket and MCP of one engine, behind one guard.

It puts the doors together and knows nothing of what lies behind them. The only file that imports `mistudio_mcp`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from mistudio_engine.api.errors import BadInput
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.server.guard import Guard
from mistudio_engine.server.http import routes
from mistudio_mcp.server import build_server
from mistudio_mcp.tools import PROFILES

__all__ = ["build_app"]


def build_app(engine: Engine, *, hosts: frozenset[str] = frozenset()) -> ASGIApp:
    """The app of a started engine.

    Args:
        hosts: names beside the loopback ones that the Host header may carry.
    """

    profile = os.environ.get("MISTUDIO_MCP_PROFILE", "research")
    if profile not in PROFILES:
        raise BadInput(f"MISTUDIO_MCP_PROFILE is {profile!r}.", fix=f"Use one of {', '.join(PROFILES)}.")
    mcp = build_server(engine.acall, profile)
    # The guard checks Host and Origin for every door; FastMCP's own check would only know its own.
    mcp_app = mcp.http_app(path="/", host_origin_protection=False)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with mcp_app.lifespan(app):
            yield

    app = Starlette(routes=[*routes(engine), Mount("/mcp", app=mcp_app)], lifespan=lifespan)
    return Guard(app, token=engine.token, hosts=hosts)
