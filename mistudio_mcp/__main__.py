"""`mistudio mcp`: the MCP server over stdio, in front of an engine that it finds or starts.

It loads no torch and answers at once; `status` says `starting` until the engine is there. It looks the engine up anew
after a failure, so it outlives an engine's restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

from mistudio_engine import __version__
from mistudio_engine.api.client import AsyncStudio
from mistudio_engine.api.errors import MistudioError, NextCall
from mistudio_engine.api.home import data_dir, probe
from mistudio_engine.api.operations import Operation, Status, SystemStatus
from mistudio_mcp.server import AGENT, build_server
from mistudio_mcp.tools import Profile

__all__ = ["Forwarder", "run"]


class Forwarder:
    """`call` through the client, with an engine that is started in the background at the first need."""

    def __init__(self, home: Path | str | None = None) -> None:
        self.home = data_dir(home)
        self.studio = AsyncStudio(self.home, caller=AGENT)
        self._starting: asyncio.Task[Any] | None = None

    async def __call__(self, operation: Operation[Any], *, caller: str = AGENT) -> Any:
        if isinstance(operation, Status):
            return await self._status(operation)
        await self._engine()
        return await self.studio.call(operation)

    async def _engine(self) -> None:
        """Wait for the engine; several calls wait for one start."""
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self.studio.engine())
        await asyncio.shield(self._starting)

    async def _status(self, operation: Status) -> SystemStatus:
        """Never waits for a start: the first thing that an agent asks is answered in a second."""
        if await asyncio.to_thread(probe, self.home) is None:
            self.studio._engine = None
            if self._starting is None or self._starting.done():
                if (
                    self._starting is not None
                    and not self._starting.cancelled()
                    and (error := self._starting.exception())
                ):
                    self._starting = None
                    if isinstance(error, MistudioError):
                        raise error
                self._starting = asyncio.create_task(self.studio.engine())
            return SystemStatus(
                state="starting", version=__version__, home=str(self.home), next_call=NextCall(tool="status")
            )
        await self._engine()
        return await self.studio.call(operation)


def run(home: Path | str | None = None, profile: Profile = "research") -> None:
    """Serve the tools of a profile over stdio until the client closes it."""
    server = build_server(Forwarder(home), profile)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(transport="stdio", show_banner=False)


if __name__ == "__main__":
    run(os.environ.get("MISTUDIO_HOME"))
