"""A language model server on loopback: enough of OpenAI's and Ollama's HTTP protocols to be labelled and scored with.

    with serve_llm(lambda request: {"label": "cats"}) as server:
        ...  # OpenAI's protocol at server.openai_url (it ends in /v1), Ollama's at server.ollama_url
    assert server.requests[0].user == "…"

The `answer` function gets each request and gives what the model writes: a text, a dict (which becomes JSON), or a
`Reply` that also says what goes wrong on the way. `script(...)` is one that gives replies in turn. It is called on the
connection's thread, so it may wait. `python -m tests.llm_server --latency 0.1` runs one as a process of its own. It
knows no streaming, no tools and no images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from typing import Any, Literal

__all__ = ["GARBAGE", "LLMRequest", "LLMServer", "Reply", "Text", "failing_now_and_then", "script", "serve_llm"]

Text = str | Mapping[str, Any]


@dataclass(frozen=True)
class LLMRequest:
    """One question, whichever protocol it came by."""

    protocol: Literal["openai", "ollama"]
    number: int
    """Which one it was, from 0."""

    body: dict[str, Any]
    """As it was sent."""

    authorization: str | None

    @property
    def model(self) -> str:
        return self.body.get("model", "")

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.body.get("messages", [])

    def said_by(self, role: str) -> str:
        """What one role says, all of its messages."""
        return "\n".join(each["content"] for each in self.messages if each["role"] == role)

    @property
    def system(self) -> str:
        return self.said_by("system")

    @property
    def user(self) -> str:
        return self.said_by("user")

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer is to keep to; None when it was not sent as one."""
        if self.protocol == "ollama":
            form = self.body.get("format")
            return form if isinstance(form, dict) else None
        return self.body.get("response_format", {}).get("json_schema", {}).get("schema")

    @property
    def response_format(self) -> str | None:
        """`json_schema`, `json_object` or None: how the form of the answer was asked for."""
        if self.protocol == "ollama":
            form = self.body.get("format")
            return "json_schema" if isinstance(form, dict) else "json_object" if form == "json" else None
        return self.body.get("response_format", {}).get("type")


@dataclass(frozen=True)
class Reply:
    """What comes back."""

    content: Text = ""
    """What the model writes; a dict becomes JSON."""

    status: int = 200
    """Anything else makes `content` the message of an error."""

    error_code: str | None = None
    """`code` of an OpenAI error, such as insufficient_quota."""

    headers: Mapping[str, str] = field(default_factory=dict)
    latency: float | None = None
    """Seconds; the server's own by default."""

    cut: bool = False
    """The connection breaks in the middle of the body."""

    hangs_up: bool = False
    """The connection is closed after the answer, although nothing has said that it would be."""

    byte_seconds: float = 0.0
    """Seconds before each byte of the body."""

    raw: bytes | None = None
    """This body, instead of the protocol's envelope."""

    refusal: str | None = None
    """OpenAI's field for what the model will not do."""

    finish_reason: str = "stop"
    """`length` says that the answer was cut off."""

    n_prompt_tokens: int | None = None
    """A quarter of the characters by default."""

    n_completion_tokens: int | None = None


GARBAGE = Reply(raw=b"<html><body>502 Bad Gateway</body></html>")
"""A proxy's page with status 200: no envelope at all."""


def script(*replies: Reply | Text) -> Callable[[LLMRequest], Reply | Text]:
    """An answer function that gives these in turn, and the last one from then on."""
    following = chain(replies, repeat(replies[-1]))
    lock = threading.Lock()

    def answer(request: LLMRequest) -> Reply | Text:
        with lock:
            return next(following)

    return answer


def failing_now_and_then(
    answer: Callable[[LLMRequest], Reply | Text], share: float, seed: int = 0
) -> Callable[[LLMRequest], Reply | Text]:
    """The answer function, with this share of requests ending in a 429, a 500 or garbage instead."""
    chance, lock = random.Random(seed), threading.Lock()
    faults = (
        Reply("slow down", status=429, headers={"Retry-After": "0.1"}),
        Reply("something broke", status=500),
        Reply("Sure! Here is your label: {label: "),
    )

    def wrapped(request: LLMRequest) -> Reply | Text:
        with lock:
            fault = chance.choice(faults) if chance.random() < share else None
        return fault or answer(request)

    return wrapped


@dataclass
class LLMServer:
    """The running server: where it is, what it was asked, how it behaves. Fields may be changed while it runs."""

    url: str
    answer: Callable[[LLMRequest], Reply | Text]
    latency: float = 0.0
    """Seconds to each answer."""

    key: str | None = None
    """The key that must be shown (OpenAI's protocol); None takes any."""

    models: tuple[str, ...] | None = None
    """Models that there are; None has every one."""

    accepts: tuple[str | None, ...] = ("json_schema", "json_object", None)
    """Ways of asking for a form that it understands; another one is answered with 400."""

    hold: threading.Event | None = None
    """While it is an event that is not set, no answer is given (at most 60 seconds)."""

    requests: list[LLMRequest] = field(default_factory=list)
    n_open: int = 0
    """Requests being answered now."""

    peak: int = 0
    """The most at once."""

    n_hung_up: int = 0
    """Requests whose sender did not wait for the answer."""

    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def ollama_url(self) -> str:
        return self.url

    @contextmanager
    def _counted(
        self, protocol: Literal["openai", "ollama"], body: dict[str, Any], authorization: str | None
    ) -> Iterator[LLMRequest]:
        with self._lock:
            request = LLMRequest(protocol, len(self.requests), body, authorization)
            self.requests.append(request)
            self.n_open += 1
            self.peak = max(self.peak, self.n_open)
        try:
            yield request
        finally:
            with self._lock:
                self.n_open -= 1

    def _reply(self, request: LLMRequest) -> Reply:
        if request.protocol == "openai" and self.key is not None and request.authorization != f"Bearer {self.key}":
            # As OpenAI does it: the key comes back in the message, most of it starred out.
            shown = (request.authorization or "").removeprefix("Bearer ")
            return Reply(f"Incorrect API key provided: {shown}.", status=401, error_code="invalid_api_key")
        if self.models is not None and request.model not in self.models:
            return Reply(f"The model '{request.model}' does not exist", status=404, error_code="model_not_found")
        if request.response_format not in self.accepts:
            return Reply(f"'response_format.type' {request.response_format} is not supported", status=400)
        found = self.answer(request)
        return found if isinstance(found, Reply) else Reply(found)


@contextmanager
def serve_llm(
    answer: Callable[[LLMRequest], Reply | Text] = lambda request: "{}", **settings: Any
) -> Iterator[LLMServer]:
    """A server on a free port of 127.0.0.1 while the block runs; `settings` are fields of `LLMServer`."""
    http = _Listener(("127.0.0.1", 0), _Handler)
    llm = LLMServer(f"http://127.0.0.1:{http.server_address[1]}", answer, **settings)
    http.llm = llm
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, name="llm-server")
    thread.start()
    try:
        yield llm
    finally:
        if llm.hold is not None:
            llm.hold.set()
        http.shutdown()
        thread.join()
        http.server_close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    llm: LLMServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests; anything else is worth a trace."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        protocol = {"/v1/chat/completions": "openai", "/api/chat": "ollama"}.get(self.path)
        if protocol is None:
            self._send(404, b'{"error": "no such path"}')
            return
        llm = self.server.llm
        with llm._counted(protocol, body, self.headers["Authorization"]) as request:  # type: ignore[arg-type]
            reply = llm._reply(request)
            time.sleep(llm.latency if reply.latency is None else reply.latency)
            if llm.hold is not None:
                llm.hold.wait(60)
            if self._has_hung_up():
                llm.n_hung_up += 1
        self._give(request, reply)

    def _has_hung_up(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        return False

    def _give(self, request: LLMRequest, reply: Reply) -> None:
        content = reply.content if isinstance(reply.content, str) else json.dumps(reply.content, ensure_ascii=False)
        if reply.raw is not None:
            envelope = reply.raw
        else:
            make = _openai if request.protocol == "openai" else _ollama
            envelope = json.dumps(make(request, reply, content)).encode()
        self._send(reply.status, envelope, reply.headers, cut=reply.cut, byte_seconds=reply.byte_seconds)
        self.close_connection |= reply.hangs_up

    def _send(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        cut: bool = False,
        byte_seconds: float = 0.0,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if byte_seconds:
            for at in range(len(body)):
                time.sleep(byte_seconds)
                self.wfile.write(body[at : at + 1])
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: what was asked is in `requests`."""


def _n_tokens(request: LLMRequest, reply: Reply, content: str) -> tuple[int, int]:
    asked = sum(len(each["content"]) for each in request.messages) // 4
    n_prompt = asked if reply.n_prompt_tokens is None else reply.n_prompt_tokens
    return n_prompt, len(content) // 4 if reply.n_completion_tokens is None else reply.n_completion_tokens


def _openai(request: LLMRequest, reply: Reply, content: str) -> dict[str, Any]:
    if reply.status != 200:
        return {"error": {"message": content, "type": "error", "param": None, "code": reply.error_code}}
    n_prompt, n_answer = _n_tokens(request, reply, content)
    message = {"role": "assistant", "content": content if reply.refusal is None else None, "refusal": reply.refusal}
    return {
        "id": f"chatcmpl-{request.number}",
        "object": "chat.completion",
        "created": 0,
        "model": request.model,
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason, "logprobs": None}],
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
        },
    }


def _ollama(request: LLMRequest, reply: Reply, content: str) -> dict[str, Any]:
    if reply.status != 200:
        return {"error": content}
    n_prompt, n_answer = _n_tokens(request, reply, content)
    return {
        "model": request.model,
        "created_at": "2026-01-01T00:00:00Z",
        "message": {"role": "assistant", "content": content},
        "done": True,
        "done_reason": reply.finish_reason,
        "prompt_eval_count": n_prompt,
        "eval_count": n_answer,
    }


def main() -> None:
    """A server as a process: prints its address, labels everything alike, ends when its standard input does."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds to each answer")
    parser.add_argument("--failures", type=float, default=0.0, help="share of requests that go wrong")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    label = {"reasoning": "They all do.", "label": "words of the corpus", "category": "Words > Corpus"}
    answer = failing_now_and_then(lambda request: label, options.failures, options.seed)
    with serve_llm(answer, latency=options.latency) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        print(json.dumps({"n_requests": len(server.requests), "peak": server.peak}), flush=True)


if __name__ == "__main__":
    main()
