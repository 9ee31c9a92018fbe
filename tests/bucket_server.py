"""A real HTTP server that answers as a public S3 bucket does, page by page, and that can be told to misbehave."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 2
"""Files to a page, so that every listing has several."""


class BucketServer:
    """Files by key; `requests` are the paths that were asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.listing: tuple[int, bytes] | None = None
        """Answer to a listing, in place of the true one."""

        self.answers: threading.Event | None = None
        """Nothing is answered before it is set."""

        self.broken: set[str] = set()
        """Keys whose connection breaks half way."""

        self.requests: list[str] = []
        self.url = ""

    def page(self, query: dict[str, list[str]]) -> bytes:
        keys = sorted(key for key in self.files if key.startswith(query["prefix"][0]))
        start = int(query.get("continuation-token", ["0"])[0])
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.files[key])}</Size></Contents>"
            for key in keys[start : start + PAGE]
        )
        more = start + PAGE < len(keys)
        token = f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{contents}{token}</ListBucketResult>'
        ).encode()


@contextmanager
def bucket_server() -> Iterator[BucketServer]:
    """A server on a loopback port."""
    bucket = BucketServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            bucket.requests.append(self.path)
            if bucket.answers is not None:
                bucket.answers.wait(30)
            parts = urlsplit(self.path)
            query, key = parse_qs(parts.query), unquote(parts.path.lstrip("/"))
            if "list-type" in query:
                status, body = bucket.listing or (200, bucket.page(query))
            else:
                status, body = (200, bucket.files[key]) if key in bucket.files else (404, b"")
            self.send_response(status)
            if status in (301, 302):
                self.send_header("Location", "http://127.0.0.1:1/")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if key in bucket.broken else body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield bucket
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
