"""A public bucket of files behind an address: listed as S3 lists, fetched a chunk at a time.

Only the address given is asked: redirects are not followed, and without TLS only this machine. Answers are bounded. It
does not know what the files mean.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import httpx

from mistudio_engine.api.errors import BadInput, CorruptFile, EmptyData, NotFound, Unreachable

__all__ = ["Bucket", "BucketFile"]

TIMEOUT = httpx.Timeout(10.0)
"""For an answer, and between two chunks of one."""

LISTING_CAP_BYTES = 8 << 20
MAX_PAGES = 50
"""Of a thousand files each."""

CHUNK_BYTES = 1 << 20

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class BucketFile(NamedTuple):
    """A file that is listed."""

    key: str
    n_bytes: int


class Bucket:
    """The bucket at `base_url`.

    Raises:
        BadInput: the address is not https://HOST, or carries a name and password.
    """

    def __init__(self, base_url: str) -> None:
        try:
            parts = urlsplit(base_url)
            host = parts.hostname
        except ValueError:
            parts, host = urlsplit(""), None
        secure = parts.scheme == "https" or (parts.scheme == "http" and host in LOOPBACK)
        if not host or not secure or "@" in parts.netloc or parts.query or parts.fragment:
            raise BadInput(
                f"{base_url.rpartition('@')[2][:100]!r} is not the address of a bucket.",  # a password is not repeated
                fix="Give https://HOST or https://HOST/PATH, without a name, password or query.",
            )
        self.base_url = base_url.rstrip("/")
        self.host = host

    def listing(self, prefix: str) -> list[BucketFile]:
        """Every file whose key begins with `prefix`.

        Raises:
            Unreachable: the bucket does not answer as a bucket, or MISTUDIO_OFFLINE=1.
            NotFound: it does not know itself.
            EmptyData: there is no such file.
        """
        found: list[BucketFile] = []
        token: str | None = None
        with self._client() as client:
            for _ in range(MAX_PAGES):
                query = {"list-type": "2", "prefix": prefix} | ({"continuation-token": token} if token else {})
                page, token = self._page(client, query)
                found += [each for each in page if each.key.startswith(prefix)]
                if token is None:
                    break
        if not found:
            raise EmptyData(
                f"{self.host} has nothing under {prefix!r}.", fix="Check the name: MODEL/SOURCE as its pages write it."
            )
        return found

    def fetch(self, file: BucketFile, target: Path) -> Generator[int, None, None]:
        """Fetch a file to `target`, which is whole or not there; yields the bytes that have come so far.

        Raises:
            Unreachable: the connection broke.
            CorruptFile: it is not as large as it was listed.
        """
        part = target.with_name(target.name + ".part")
        n_bytes = 0
        try:
            with (
                self._client() as client,
                client.stream("GET", f"{self.base_url}/{quote(file.key)}") as answer,
                part.open("wb") as out,
            ):
                self._require_ok(answer)
                for chunk in answer.iter_raw(CHUNK_BYTES):
                    n_bytes += len(chunk)
                    if n_bytes > file.n_bytes:
                        break
                    out.write(chunk)
                    yield n_bytes
            if n_bytes != file.n_bytes:
                than = "more" if n_bytes > file.n_bytes else "fewer"
                raise CorruptFile(
                    f"{file.key} has {than} bytes than the {file.n_bytes:,} that were listed.",
                    fix="Try again.",
                )
            os.replace(part, target)
        except httpx.HTTPError as error:
            raise self._unreachable(str(error) or type(error).__name__) from error
        finally:
            part.unlink(missing_ok=True)

    def _client(self) -> httpx.Client:
        if os.environ.get("MISTUDIO_OFFLINE") == "1" and self.host not in LOOPBACK:
            raise Unreachable(
                f"{self.host} is not asked: MISTUDIO_OFFLINE=1 forbids every connection.",
                fix="Unset it, or give a folder that holds the files.",
            )
        # A proxy may be needed to get out, never to reach this machine.
        return httpx.Client(timeout=TIMEOUT, follow_redirects=False, trust_env=self.host not in LOOPBACK)

    def _page(self, client: httpx.Client, query: dict[str, str]) -> tuple[list[BucketFile], str | None]:
        body = b""
        try:
            with client.stream("GET", f"{self.base_url}/", params=query) as answer:
                self._require_ok(answer)
                for chunk in answer.iter_bytes(CHUNK_BYTES):
                    body += chunk
                    if len(body) > LISTING_CAP_BYTES:
                        raise self._unreachable("its listing does not end")
        except httpx.HTTPError as error:
            raise self._unreachable(str(error) or type(error).__name__) from error
        if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
            raise self._unreachable("its answer is not a listing")
        try:
            root = ElementTree.fromstring(body)
            files = [
                BucketFile(each.findtext("{*}Key") or "", int(each.findtext("{*}Size") or ""))
                for each in root.iterfind("{*}Contents")
            ]
        except (ElementTree.ParseError, ValueError) as error:
            raise self._unreachable("its answer is not a listing") from error
        return [each for each in files if each.n_bytes > 0], root.findtext("{*}NextContinuationToken") or None

    def _require_ok(self, answer: httpx.Response) -> None:
        if answer.status_code == 404:
            raise NotFound(f"{self.host} has no such file or bucket.", fix="Check the address.")
        if answer.status_code != 200:
            raise self._unreachable(f"it answered {answer.status_code}")

    def _unreachable(self, why: str) -> Unreachable:
        return Unreachable(
            f"{self.host} could not be read: {why}.", fix="Try again later, or give a folder that holds the files."
        )
