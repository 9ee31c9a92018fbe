"""The engine process: take the directory, bind the socket, say where we are, serve, and stop in good order.

The order matters: the lock first (a second engine is refused before it touches anything), then the fork below which the
engine lives and can be started again (supervisor.py), `engine.json` only once the socket listens, and torch after that,
so that a client finds the engine within a second. It knows no operation.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from mistudio_engine import __version__
from mistudio_engine.api.errors import BadInput, EngineBusy, EngineMissing
from mistudio_engine.api.home import (
    EXIT_DEVICE_LOST,
    EngineFile,
    missing_packages,
    probe,
    process_alive,
    read_engine_file,
    remove_engine_file,
    write_engine_file,
)
from mistudio_engine.runtime.lock import EngineLock
from mistudio_engine.server.supervisor import supervise

__all__ = ["run", "stop"]

log = logging.getLogger(__name__)

ENGINE_SECONDS, CALL_SECONDS = 8.0, 1
"""How long the engine's jobs have for their checkpoints, and then calls for their answers: under ten together."""

STOP_SECONDS = 15.0
"""How long `engine stop` waits."""


def run(home: Path | None, *, host: str, port: int, allow_remote: bool, log_level: str) -> None:
    """Serve until a signal ends it.

    Raises:
        EngineBusy: another engine owns the directory, or the port is in use.
        EngineMissing: the packages of the engine are not installed.
        BadInput: an address beyond loopback without `allow_remote`.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if missing := missing_packages():
        raise EngineMissing(
            f"The engine needs {', '.join(missing)}.", fix='Install them with: pip install "mistudio[engine]"'
        )
    _require_loopback(host, allow_remote)
    # Before torch is imported: OpenMP's threads otherwise spin while they wait, which on a busy machine costs more than
    # the work itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with EngineLock.acquire(home) as lock, _bound(host, port) as listener:
        supervise(lock)  # what follows is done by a child process, and by another one if that loses its device
        from mistudio_engine.handlers import REGISTRY
        from mistudio_engine.runtime.engine import Engine
        from mistudio_engine.server.app import build_app

        engine = Engine(home, REGISTRY)
        # At once: what a poisoned CUDA context would still be asked for only fails, and may hang.
        engine.restart = partial(os._exit, EXIT_DEVICE_LOST)
        url = f"http://{_url_host(host)}:{listener.getsockname()[1]}"
        lock.describe(url)
        hosts = frozenset() if _is_loopback(host) else frozenset({host.lower(), socket.gethostname().lower()})
        config = uvicorn.Config(
            build_app(engine, hosts=hosts),
            log_level=log_level,
            access_log=False,
            ws_max_size=1 << 20,
            lifespan="on",
            timeout_graceful_shutdown=CALL_SECONDS,
        )
        # uvicorn raises the signal that stopped it once more. SIGTERM ends the process there; Python would make an
        # exception of SIGINT, and then wait for threads that wait for others.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            _Server(config, engine, url).run(sockets=[listener])
        finally:
            remove_engine_file(engine.home, engine.epoch)


class _Server(uvicorn.Server):
    """uvicorn, with our start after its sockets listen and our end before it returns.

    uvicorn raises the signal again when it is done, so nothing after `run()` is sure to be executed.
    """

    def __init__(self, config: uvicorn.Config, engine: Any, url: str) -> None:
        super().__init__(config)
        self.engine, self.url = engine, url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        write_engine_file(
            self.engine.home,
            EngineFile(
                url=self.url,
                token=self.engine.token,
                pid=os.getpid(),
                version=__version__,
                epoch=self.engine.epoch,
                started_at=time.time(),
            ),
        )
        self.engine.start()
        log.warning("engine %s listens on %s, data in %s", __version__, self.url, self.engine.home)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        import asyncio

        remove_engine_file(self.engine.home, self.engine.epoch)
        # Event streams end only when told to; without this uvicorn would wait for them for ever.
        self.engine.bus.close()
        await asyncio.to_thread(self.engine.stop, ENGINE_SECONDS)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:  # a second signal does not wait for checkpoints
            os._exit(128 + sig)
        super().handle_exit(sig, frame)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise EngineBusy(
            f"The engine cannot listen on {host} port {port}: {error.strerror}.",
            fix="Choose another --port, or leave it out: a free one is taken and clients find it.",
        ) from None
    return listener


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_loopback(host: str, allow_remote: bool) -> None:
    if not _is_loopback(host) and not allow_remote:
        raise BadInput(
            f"--host {host} would let other machines in.",
            fix="Leave it out to listen on loopback only, or add --allow-remote if that is meant.",
        )


def _url_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # listening everywhere: local clients come over loopback
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def stop(home: Path | None) -> str:
    """Stop the engine of a directory and wait for its end; says what happened."""
    engine = probe(home) or read_engine_file(home)
    if engine is None or not process_alive(engine.pid):
        return "no engine runs"
    os.kill(engine.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while process_alive(engine.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    if process_alive(engine.pid):
        raise EngineBusy(
            f"The engine (pid {engine.pid}) did not stop within {STOP_SECONDS:g} s.",
            fix="Stop it again to end it at once.",
        )
    return f"engine stopped (pid {engine.pid})"
