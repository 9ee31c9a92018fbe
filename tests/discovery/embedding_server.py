"""A server on loopback that embeds texts in OpenAI's and in Ollama's protocol, and goes wrong when it is told to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

__all__ = ["EmbeddingServer", "serve_embeddings", "vector_of"]


def vector_of(text: str, dimension: int) -> list[float]:
    """A vector of its own for every text, of no particular length."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return (3 * np.random.default_rng(seed).standard_normal(dimension)).tolist()


@dataclass
class EmbeddingServer:
    """The running server. Fields may be changed while it runs."""

    url: str = ""
    dimension: int = 12
    key: str | None = None
    model: str = "tiny-embed"
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Statuses and messages that are answered first, each once."""

    vector_of: Callable[[str, int], list[float]] = vector_of
    """What the model makes of a text."""

    raw: bytes | None = None
    """Sent in place of every answer."""

    hold: threading.Event | None = None
    """While it is an event that is not set, no answer is given."""

    inputs: list[list[str]] = field(default_factory=list)
    """Texts of each request."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self) -> None:
        state: EmbeddingServer = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state.inputs.append(body["input"])
        if state.hold is not None:
            state.hold.wait(30)
        is_openai = self.path == "/v1/embeddings"
        if state.failures:
            status, message = state.failures.pop(0)
            self._send(status, {"error": {"message": message} if is_openai else message})
        elif is_openai and state.key and self.headers["Authorization"] != f"Bearer {state.key}":
            self._send(401, {"error": {"message": f"Incorrect API key: {self.headers['Authorization']}"}})
        elif body["model"] != state.model:
            self._send(404, {"error": {"message": "no such model"} if is_openai else "no such model"})
        elif state.raw is not None:
            self._send(200, state.raw)
        else:
            vectors = [state.vector_of(text, state.dimension) for text in body["input"]]
            if is_openai:
                data = [{"object": "embedding", "index": at, "embedding": each} for at, each in enumerate(vectors)]
                usage = {"prompt_tokens": 1, "total_tokens": 1}
                self._send(200, {"object": "list", "data": data[::-1], "model": state.model, "usage": usage})
            else:
                self._send(200, {"model": state.model, "embeddings": vectors})

    def _send(self, status: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that do not wait are part of the tests."""


@contextmanager
def serve_embeddings(**fields: Any) -> Iterator[EmbeddingServer]:
    """A server while the block runs."""
    listener = _Listener(("127.0.0.1", 0), _Handler)
    state = EmbeddingServer(f"http://127.0.0.1:{listener.server_address[1]}", **fields)
    listener.state = state  # type: ignore[attr-defined]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        if state.hold is not None:
            state.hold.set()
        listener.shutdown()
        thread.join()
        listener.server_close()
