"""The engine as Jupyter Server sees it: found or started at first use, remembered, found again when it moved.

Finding and starting block for seconds, so they run in a thread, and however many requests arrive meanwhile, once. This
file adds the engine's token to what is sent; it knows nothing of Jupyter's users nor of what the requests mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import httpx
from traitlets import Bool, Float, Int, Unicode
from traitlets.config import LoggingConfigurable
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidStatus

from mistudio_engine.api.errors import EngineMissing, MistudioError
from mistudio_engine.api.home import EngineFile, data_dir, ensure_engine, probe

__all__ = ["MistudioLink"]

ANSWER_SECONDS = 60.0
"""An engine call may wait 45 s for its job; one that is silent for longer than this is taken for dead."""

MESSAGE_BYTES = 16 * 1024 * 1024
"""The largest event that is passed on."""


class MistudioLink(LoggingConfigurable):
    """Where the engine is; its traits are settings of Jupyter Server: `c.MistudioLink.start_engine = False`."""

    home = Unicode("", help="The engine's data directory; empty for MISTUDIO_HOME or the user's data folder.").tag(
        config=True
    )
    start_engine = Bool(True, help="Start an engine when none runs.").tag(config=True)
    wait_seconds = Float(30.0, help="How long an engine may take to start.").tag(config=True)
    max_body_bytes = Int(16 * 1024 * 1024, help="Larger requests are refused; the engine takes no more either.").tag(
        config=True
    )

    _engine: EngineFile | None = None
    _finding: asyncio.Task[EngineFile] | None = None
    _client: httpx.AsyncClient | None = None

    async def engine(self) -> EngineFile:
        """The engine, found or started if it is not known yet.

        Raises:
            EngineMissing: none runs and none may be, or can be, started.
            EngineBusy: it takes too long, or another one holds the directory without answering.
        """
        if self._engine is None:
            if self._finding is None:
                self._finding = asyncio.create_task(asyncio.to_thread(self._find))
                self._finding.add_done_callback(self._found)
            return await asyncio.shield(self._finding)  # a request that goes away does not stop the others' search
        return self._engine

    def forget(self, engine: EngineFile) -> None:
        """It did not answer, or did not know its token: look again at the next request."""
        if self._engine is engine:
            self._engine = None

    @asynccontextmanager
    async def request(
        self, method: str, path: str, *, query: str, headers: dict[str, str], body: bytes | None
    ) -> AsyncGenerator[httpx.Response]:
        """One request to the engine, its answer still unread, so that a large one can be passed on piece by piece.

        Raises:
            EngineMissing: it does not answer, and none could be found or started.
        """
        answer = await self._send(method, f"{path}{'?' if query else ''}{query}", headers, body)
        try:
            yield answer
        finally:
            await answer.aclose()

    async def _send(self, method: str, target: str, headers: dict[str, str], body: bytes | None) -> httpx.Response:
        """Send it, and once more to an engine that was restarted since, if the first cannot have done anything."""
        for last in (False, True):
            engine = await self.engine()
            signed = {**headers, "authorization": f"Bearer {engine.token}"}
            request = self._http().build_request(method, engine.url + target, headers=signed, content=body)
            try:
                answer = await self._http().send(request, stream=True)
            except httpx.HTTPError as error:
                self.forget(engine)
                broken = isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError))
                harmless = isinstance(error, httpx.ConnectError) or (broken and method in ("GET", "HEAD"))
                if not harmless:
                    raise _gone("It may have carried out the request: look before you repeat it.") from error
                if last:
                    raise _gone() from error
                continue
            if answer.status_code != httpx.codes.UNAUTHORIZED or last:
                return answer
            self.forget(engine)
            await answer.aclose()
        raise AssertionError("the second time returns or raises")

    async def socket(self, path: str, query: str) -> ClientConnection:
        """A WebSocket to the engine. `InvalidStatus` passes when the engine refuses it for a reason of its own."""
        for last in (False, True):
            engine = await self.engine()
            parts = urlsplit(engine.url)
            address = urlunsplit(("wss" if parts.scheme == "https" else "ws", parts.netloc, path, query, ""))
            try:
                return await connect(
                    address,
                    additional_headers={"Authorization": f"Bearer {engine.token}"},
                    proxy=None,
                    max_size=MESSAGE_BYTES,
                )
            except InvalidStatus as error:
                if error.response.status_code != httpx.codes.UNAUTHORIZED or last:
                    raise
                self.forget(engine)
            except (OSError, InvalidHandshake) as error:
                self.forget(engine)
                if last:
                    raise _gone() from error
        raise AssertionError("the second time returns or raises")

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:  # made on the event loop that uses it
            self._client = httpx.AsyncClient(
                trust_env=False,
                timeout=httpx.Timeout(10.0, read=ANSWER_SECONDS),
                # One client for all who are logged in: what one is given must not be sent along with another's call.
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            )
        return self._client

    def _find(self) -> EngineFile:
        home = data_dir(Path(self.home) if self.home else None)
        if self.start_engine:
            return ensure_engine(home, wait_seconds=self.wait_seconds)
        engine = probe(home)
        if engine is None:
            raise EngineMissing(
                f"No engine runs on {home}.",
                why="This Jupyter Server is set not to start one (MistudioLink.start_engine).",
                fix=f"Start it with `mistudio engine start --home {home}`.",
            )
        return engine

    def _found(self, finding: asyncio.Task[EngineFile]) -> None:
        self._finding = None
        if finding.cancelled():
            return
        error = finding.exception()
        if error is None:
            self._engine = finding.result()
            self.log.info("miStudio's engine answers at %s", self._engine.url)
        elif isinstance(error, MistudioError):
            self.log.warning("miStudio has no engine: %s", error)


def _gone(fix: str = "Try again: it is looked for, and started, anew.") -> EngineMissing:
    return EngineMissing("The engine does not answer.", why="It has ended, or is too busy to answer.", fix=fix)
