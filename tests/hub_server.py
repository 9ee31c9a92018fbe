"""A Hugging Face Hub on loopback: enough of its HTTP interface for huggingface_hub and datasets to download from.

    with serve_hub({"openai/tiny": folder, "datasets/me/words": other}) as hub:
        Hub(home, endpoint=hub.url)

A repository is a folder; its one commit is a hash of its files, and `main` names it. As on the real hub, weights and
tables are LFS files that redirect to another host, ranges are honoured, gated repositories answer 401 or 403 with an
X-Error-Code, and a repository that is not there answers 401 to strangers. It knows no uploads and no history.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["HubServer", "Request", "serve_hub"]

LFS_SUFFIXES = {".arrow", ".bin", ".npz", ".parquet", ".pkl", ".pt", ".safetensors"}

CHUNK = 16 * 1024

ROUTES = [
    (re.compile(r"/api/(models|datasets)/(?P<id>.+?)/revision/(?P<rev>[^/]+)"), "_info"),
    (re.compile(r"/api/(models|datasets)/(?P<id>.+?)/tree/(?P<rev>[^/]+)(/(?P<path>.*))?"), "_tree"),
    (re.compile(r"/api/(models|datasets)/(?P<id>.+?)/paths-info/(?P<rev>[^/]+)"), "_paths_info"),
    (re.compile(r"/api/(models|datasets)/(?P<id>[^/]+(/[^/]+)?)"), "_info"),
    (re.compile(r"/cdn/(?P<sha>[0-9a-f]{64})"), "_cdn"),
    (re.compile(r"/(datasets/)?(?P<id>.+?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"), "_resolve"),
]


class Request(NamedTuple):
    """What was asked."""

    method: str
    path: str
    host: str
    authorization: str | None
    range: str | None


@dataclass
class HubServer:
    """The running server: where it is, what it was asked, and what it shall do wrong."""

    url: str
    repositories: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    """Repositories whose files need the token `accepted_token`."""

    private: set[str] = field(default_factory=set)
    """Repositories that look missing without it."""

    accepted_token: str = "hf_accepted"
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """By file name: the connection breaks after so many bytes of a response, once for each number in the list."""

    status_for: dict[str, int] = field(default_factory=dict)
    """By file name: this status instead of the file."""

    hold: threading.Event | None = None
    """While it is set to an event that is not, every file stops after its first chunk and waits for it."""

    held: threading.Event = field(default_factory=threading.Event)
    """Set when a file is being held."""

    requests: list[Request] = field(default_factory=list)

    def commit(self, repository: str) -> str:
        """The commit that `main` names."""
        digest = hashlib.sha1(repository.encode())
        for name, path in self.files(repository).items():
            digest.update(f"{name}\0".encode() + path.read_bytes())
        return digest.hexdigest()

    def files(self, repository: str) -> dict[str, Path]:
        """Every file of a repository by its name in it."""
        folder = self.repositories[repository]
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def bytes_asked(self, name: str) -> list[str | None]:
        """The Range header of each GET for the content of a file, in order."""
        sha = {_sha256(path): each for repository in self.repositories for each, path in self.files(repository).items()}
        wanted = []
        for request in self.requests:
            at_cdn = sha.get(request.path.removeprefix("/cdn/")) == name
            plain = request.path.endswith(f"/{name}") and "/resolve/" in request.path and not _is_lfs(Path(name))
            if request.method == "GET" and (at_cdn or plain):
                wanted.append(request.range)
        return wanted


@contextmanager
def serve_hub(folder_by_repo_id: Mapping[str, Path], **settings: Any) -> Iterator[HubServer]:
    """A hub with these repositories, on a free port of 127.0.0.1, while the block runs.

    A dataset's id begins with `datasets/`. `settings` are fields of `HubServer`, and can be changed while it runs.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    url = f"http://127.0.0.1:{server.server_address[1]}"
    hub = HubServer(url, dict(folder_by_repo_id), **settings)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="hub-server")
    thread.start()
    try:
        yield hub
    finally:
        if hub.hold is not None:
            hub.hold.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_oid(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_lfs(path: Path) -> bool:
    return path.suffix in LFS_SUFFIXES


class _Cut(Exception):
    """The connection is to break here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ThreadingHTTPServer

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: `requests` has it."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = self.headers
        self.hub.requests.append(
            Request(self.command, path, headers["Host"], headers.get("Authorization"), headers.get("Range"))
        )
        body = self.rfile.read(int(headers.get("Content-Length") or 0))
        self.form = parse_qs(body.decode()) if "form" in headers.get("Content-Type", "") else _json(body)
        try:
            for pattern, name in ROUTES:
                if found := pattern.fullmatch(path):
                    getattr(self, name)(**found.groupdict())
                    return
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", "no such route")
        except (_Cut, BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # -- what is asked

    def _info(self, id: str, rev: str = "main") -> None:
        if not (repository := self._open(id, rev)):
            return
        siblings = [self._entry(name, path) for name, path in self.hub.files(repository).items()]
        answer = {
            "_id": "1",
            "id": id,
            "modelId": id,
            "sha": self.hub.commit(repository),
            "private": False,
            "disabled": False,
            "gated": "auto" if repository in self.hub.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [
                {
                    "rfilename": each["path"],
                    "size": each["size"],
                    "blobId": each["oid"],
                    **(
                        {"lfs": {"sha256": each["lfs"]["oid"], "size": each["size"], "pointerSize": 130}}
                        if "lfs" in each
                        else {}
                    ),
                }
                for each in siblings
            ],
        }
        self._send_json(answer)

    def _tree(self, id: str, rev: str, path: str | None) -> None:
        if not (repository := self._open(id, rev)):
            return
        folder = (path or "").strip("/")
        inside = {
            name: file
            for name, file in self.hub.files(repository).items()
            if not folder or name.startswith(f"{folder}/")
        }
        if folder and not inside:
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{folder} does not exist")
            return
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        depth = folder.count("/") + 1 if folder else 0
        entries = [self._entry(name, file) for name, file in inside.items() if recursive or name.count("/") == depth]
        folders = {"/".join(name.split("/")[: n + 1]) for name in inside for n in range(depth, name.count("/"))}
        entries += [
            {"type": "directory", "path": each, "oid": "0" * 40, "size": 0}
            for each in sorted(folders)
            if recursive or each.count("/") == depth
        ]
        self._send_json(entries)

    def _paths_info(self, id: str, rev: str) -> None:
        if not (repository := self._open(id, rev)):
            return
        files = self.hub.files(repository)
        wanted = self.form.get("paths", []) if isinstance(self.form, dict) else []
        entries = [self._entry(name, files[name]) for name in wanted if name in files]
        entries += [
            {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            for name in wanted
            if name not in files and any(each.startswith(f"{name}/") for each in files)
        ]
        self._send_json(entries)

    def _resolve(self, id: str, rev: str, path: str) -> None:
        if not (repository := self._open(id, rev, file=True)):
            return
        file = self.hub.files(repository).get(path)
        if file is None:
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{path} does not exist")
            return
        if path in self.hub.status_for:
            self._refuse(HTTPStatus(self.hub.status_for[path]), None, "not now")
            return
        commit = {"X-Repo-Commit": self.hub.commit(repository)}
        if _is_lfs(file):
            sha, size = _sha256(file), file.stat().st_size
            port = self.server.server_address[1]
            self._send(
                HTTPStatus.FOUND,
                b"",
                commit
                | {
                    # Another name for this machine is another host to a client, as a CDN is.
                    "Location": f"http://localhost:{port}/cdn/{sha}",
                    "ETag": f'"{_git_oid(file)}"',
                    "X-Linked-ETag": f'"{sha}"',
                    "X-Linked-Size": str(size),
                },
            )
        else:
            self._send_file(file, commit | {"ETag": f'"{_git_oid(file)}"'})

    def _cdn(self, sha: str) -> None:
        for repository in self.hub.repositories:
            for file in self.hub.files(repository).values():
                if _is_lfs(file) and _sha256(file) == sha:
                    self._send_file(file, {"ETag": f'"{sha}"'})
                    return
        self._refuse(HTTPStatus.NOT_FOUND, None, "no such object")

    # -- who may

    def _open(self, id: str, rev: str, file: bool = False) -> str | None:
        """The repository, or None after the refusal was sent."""
        dataset = self.path.startswith(("/api/datasets/", "/datasets/"))
        repository = f"datasets/{id}" if dataset else id
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        accepted = given == self.hub.accepted_token
        if repository not in self.hub.repositories or (repository in self.hub.private and not accepted):
            status = HTTPStatus.NOT_FOUND if given else HTTPStatus.UNAUTHORIZED
            self._refuse(status, "RepoNotFound" if given else None, "Repository not found")
            return None
        if rev not in ("main", self.hub.commit(repository)):
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {rev}")
            return None
        if file and repository in self.hub.gated and not accepted:
            status = HTTPStatus.FORBIDDEN if given else HTTPStatus.UNAUTHORIZED
            self._refuse(status, "GatedRepo", f"Access to {id} is restricted. You must accept its terms.")
            return None
        return repository

    # -- how it is said

    def _entry(self, name: str, file: Path) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "oid": _git_oid(file), "size": file.stat().st_size}
        if _is_lfs(file):
            entry["lfs"] = {"oid": _sha256(file), "size": file.stat().st_size, "pointerSize": 130}
        return entry

    def _send_json(self, answer: Any) -> None:
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: HTTPStatus, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers | {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, file: Path, headers: Mapping[str, str]) -> None:
        data = file.read_bytes()
        begin, status = 0, HTTPStatus.OK
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, status = int(asked[1]), HTTPStatus.PARTIAL_CONTENT
            end = int(asked[2]) + 1 if asked[2] else len(data)
            headers = {**headers, "Content-Range": f"bytes {begin}-{min(end, len(data)) - 1}/{len(data)}"}
            data = data[begin:end]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cut_after.get(file.name, [])
        allowed = cuts.pop(0) if cuts else len(data)
        for at in range(0, min(len(data), allowed), CHUNK):
            self.wfile.write(data[at : min(at + CHUNK, allowed)])
            self.wfile.flush()
            if self.hub.hold is not None and not self.hub.hold.is_set():
                self.hub.held.set()
                self.hub.hold.wait(30)
        if allowed < len(data):
            raise _Cut


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return {}
