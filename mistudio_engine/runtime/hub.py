"""Repositories of the Hugging Face Hub, brought into folders of ours.

A download knows its files and their sizes before it begins, checks the disk, and pins the commit. Files arrive in
`downloads/` of the data directory, where what a broken connection, a pause or a killed engine leaves is taken up again;
each is compared with the hash that the hub lists, and the folder appears at its place, whole, by one rename.

HTTP, authentication, redirects and retries are huggingface_hub's; tokens of the hub (HF_TOKEN, or what `hf auth login`
left) are in no message of ours. MISTUDIO_OFFLINE=1 opens no socket. It does not know what the files mean.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import DatasetInfo, ModelInfo
from huggingface_hub.utils import build_hf_headers

from mistudio_engine.api.errors import Conflict, CorruptFile, Unreachable
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.runtime.files import free_bytes, require_free, safe_path, slugify
from mistudio_engine.runtime.hub_errors import typed_errors
from mistudio_engine.runtime.hub_listing import REPO_TYPES, Listing, RemoteFile, RepoKind, choose
from mistudio_engine.runtime.transfer import Meter, Transfer

__all__ = ["Hub", "Listing", "RemoteFile", "RepoKind"]

DEFAULT_ENDPOINT = "https://huggingface.co"

TIMEOUT_SECONDS = 10.0
"""For the hub's answer to a question; a file may pause as long as HF_HUB_DOWNLOAD_TIMEOUT."""

STALE_SECONDS = 24 * 3600.0
"""Partial downloads that nobody has taken up again for so long are removed."""

DISK_MARGIN_BYTES = 64 * 1024 * 1024

CONFIG_CAP_BYTES = 8 * 1024 * 1024

HASH_BYTES = 4 * 1024 * 1024

WAIT_SECONDS = 0.25


class Hub:
    """The hub, for one data directory.

    Args:
        home: the data directory; partial downloads lie in its `downloads/`.
        endpoint: base address; HF_ENDPOINT by default, else huggingface.co.
        token: gives the token that is used where a call names none; HF_TOKEN or none by default.
    """

    def __init__(
        self, home: Path, endpoint: str | None = None, *, token: Callable[[], str | None] = lambda: None
    ) -> None:
        self.home = Path(home)
        self._token = token
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._busy: set[Path] = set()
        self._lingering: dict[Path, Transfer[Any]] = {}
        self._lock = threading.Lock()

    @property
    def offline(self) -> bool:
        """Whether MISTUDIO_OFFLINE=1 forbids every connection."""
        return os.environ.get("MISTUDIO_OFFLINE") == "1"

    def listing(
        self,
        kind: RepoKind,
        repo_id: str,
        revision: str | None = None,
        path: str | None = None,
        *,
        allow_patterns: Sequence[str] | None = None,
        token: str | None = None,
    ) -> Listing:
        """What a download would fetch, without fetching it.

        Args:
            kind: "sae" is a model repository of which `.npz` and folders are wanted too.
            revision: branch, tag or commit; the default branch if None.
            path: only what lies in this folder of the repository.
            allow_patterns: instead of the kind's own patterns (`fnmatch` on the whole name).
            token: instead of HF_TOKEN.

        Raises:
            NotFound: no such repository, revision or folder.
            BadInput: an id that cannot be one, or a gated repository, with what to set.
            Unsupported: weights that are pickles only.
            EmptyData: nothing in it is wanted.
            Unreachable: the hub does not answer, or we are offline.
        """
        token = token or self._token()
        with self._asking(repo_id, revision):
            info = HfApi(endpoint=self.endpoint, token=token).repo_info(
                repo_id, repo_type=REPO_TYPES[kind], revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
            )
        assert isinstance(info, ModelInfo | DatasetInfo)
        files = [
            RemoteFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None, each.blob_id)
            for each in info.siblings or []
        ]
        return choose(repo_id, info.sha or revision or "main", files, kind, path, allow_patterns)

    def size(self, kind: RepoKind, repo_id: str, revision: str | None = None, path: str | None = None) -> int:
        """Bytes that a download would fetch. Raises as `listing`."""
        return self.listing(kind, repo_id, revision, path).n_bytes

    def config(
        self, kind: RepoKind, repo_id: str, revision: str | None = None, path: str | None = None
    ) -> dict[str, Any] | None:
        """The repository's `config.json`, or None without one. Raises as `listing`, and CorruptFile."""
        listing = self.listing(kind, repo_id, revision, path)
        name = f"{path.strip('/')}/config.json" if path else "config.json"
        file = next((file for file in listing.files if file.name == name), None)
        if file is None:
            return None
        if file.n_bytes > CONFIG_CAP_BYTES:
            raise CorruptFile(f"{name} of {repo_id} has {file.n_bytes} bytes, which no configuration has.")
        content = io.BytesIO()
        with self._asking(repo_id, listing.commit):
            self._get(kind, listing, file, content, 0, Meter(), None)
        try:
            config = json.loads(content.getvalue())
        except ValueError as error:
            raise CorruptFile(f"{name} of {repo_id} is not JSON.", why=str(error)) from error
        if not isinstance(config, dict):
            raise CorruptFile(f"{name} of {repo_id} is not a JSON object.")
        return config

    def download(
        self,
        kind: RepoKind,
        repo_id: str,
        target: Path,
        *,
        revision: str | None = None,
        path: str | None = None,
        allow_patterns: Sequence[str] | None = None,
        token: str | None = None,
    ) -> Generator[Progress, Signal, Path]:
        """Fetch a repository into the new folder `target`, which is complete or not there; returns it.

        Yields its progress in bytes about four times a second. Closing it cancels; what has arrived is taken up again
        by the next download of the same commit within a day. Files keep their names in the repository, with folders.

        Raises:
            Conflict: `target` exists.
            DiskFull: said before the first byte, when it can be known.
            CorruptFile: what arrived is not what the hub lists, twice.
            Cancelled: it was told to stop early; half a repository is of no use.
            NotFound, BadInput, Unsupported, EmptyData, Unreachable: as `listing`.
        """
        target, token = Path(target), token or self._token()
        _require_absent(target)
        asking = Meter()
        asking.stage = f"asking the hub for {repo_id}"
        listing = yield from Transfer(
            lambda: self.listing(kind, repo_id, revision, path, allow_patterns=allow_patterns, token=token), asking
        ).follow()
        folder, meter = self.home / "downloads" / _key(kind, listing), Meter(listing.n_bytes)

        def fetch() -> None:
            self._require_space(folder, listing)
            with self._asking(repo_id, listing.commit):
                for file in listing.files:
                    self._fetch(kind, listing, file, folder, meter, token)

        transfer = Transfer(fetch, meter)
        while not self._claim(folder):
            yield Progress(stage=f"waiting for another download of {repo_id}")
            time.sleep(WAIT_SECONDS)
        try:
            yield from transfer.follow()
            _publish(folder, target)  # no yield after it: whoever closes us then must not find it done
        finally:
            self._release(folder, transfer)
        return target

    @contextmanager
    def _asking(self, repo_id: str, revision: str | None) -> Iterator[None]:
        """Around whatever opens a connection."""
        if self.offline:
            raise Unreachable(
                f"{repo_id} is on the hub, and MISTUDIO_OFFLINE=1 forbids every connection.",
                fix="Use what is here already (find), or start the engine without MISTUDIO_OFFLINE.",
            )
        with typed_errors(self.endpoint, repo_id, revision, self.home):
            yield

    # -- one file

    def _fetch(
        self, kind: RepoKind, listing: Listing, file: RemoteFile, folder: Path, meter: Meter, token: str | None
    ) -> None:
        path = safe_path(folder, file.name)
        if path.is_file() and path.stat().st_size == file.n_bytes:
            meter.have(file.n_bytes)  # its name says that it was checked
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".incomplete")
        for last in (False, True):
            meter.stage = f"downloading {file.name}"
            with part.open("ab") as content:
                begun = content.tell()
                if begun > file.n_bytes:
                    content.truncate(0)
                    begun = 0
                meter.have(begun)
                self._get(kind, listing, file, content, begun, meter, token)
                content.flush()
                os.fsync(content.fileno())
            meter.stage = f"checking {file.name}"
            if _is_what_was_listed(part, file, meter):
                os.replace(part, path)
                return
            part.unlink()
            meter.have(-file.n_bytes)
            if last:
                raise CorruptFile(
                    f"{file.name} of {listing.repo_id} arrived with other content than the hub lists.",
                    why="Its hash differs, twice.",
                    fix="Try again later; a proxy between here and the hub may change files.",
                )

    def _get(
        self,
        kind: RepoKind,
        listing: Listing,
        file: RemoteFile,
        content: BinaryIO,
        begun: int,
        meter: Meter,
        token: str | None,
    ) -> None:
        """Append the bytes of `file` from `begun` on to `content`."""
        url = hf_hub_url(
            listing.repo_id,
            file.name,
            repo_type=REPO_TYPES[kind],
            revision=listing.commit,
            endpoint=self.endpoint,
        )
        http_get(
            url,
            content,
            resume_size=begun,
            headers=build_hf_headers(token=token),
            expected_size=file.n_bytes,
            displayed_filename=file.name,
            tqdm_class=meter.bar(),
        )

    # -- space

    def _claim(self, folder: Path) -> bool:
        """Take a working folder; False while a download has it or the thread of a cancelled one may write there."""
        with self._lock:
            lingering = self._lingering.get(folder)
            if folder in self._busy or (lingering is not None and lingering.running):
                return False
            self._lingering.pop(folder, None)
            self._busy.add(folder)
        return True

    def _release(self, folder: Path, transfer: Transfer[Any] | None = None) -> None:
        with self._lock:
            self._busy.discard(folder)
            if transfer is not None and transfer.running:
                self._lingering[folder] = transfer

    def _require_space(self, folder: Path, listing: Listing) -> None:
        self._sweep(older_than_seconds=STALE_SECONDS, keep=folder)
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        have = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        needed = max(0, listing.n_bytes - have) + DISK_MARGIN_BYTES
        if free_bytes(folder) < needed:
            self._sweep(older_than_seconds=0, keep=folder)  # nobody may lack space for what was given up
        require_free(folder, needed, f"Downloading {listing.repo_id}")

    def _sweep(self, older_than_seconds: float, keep: Path) -> None:
        newest = time.time() - older_than_seconds
        for folder in (self.home / "downloads").glob("*"):
            if folder != keep and folder.stat().st_mtime <= newest and self._claim(folder):
                shutil.rmtree(folder, ignore_errors=True)
                self._release(folder)


def _key(kind: RepoKind, listing: Listing) -> str:
    said = json.dumps([kind, listing.repo_id, listing.commit, [file.name for file in listing.files]])
    return f"{slugify(listing.repo_id)[:40]}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def _is_what_was_listed(path: Path, file: RemoteFile, meter: Meter) -> bool:
    """Compare with the hash of the listing: SHA-256 of an LFS file, else git's SHA-1 of a blob."""
    n_bytes = path.stat().st_size
    if n_bytes != file.n_bytes:
        return False
    expected = file.sha256 or file.git_oid
    if expected is None:
        return True
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % n_bytes, usedforsecurity=False)
    with path.open("rb") as content:
        while block := content.read(HASH_BYTES):
            digest.update(block)
            meter.require_going_on()
    return digest.hexdigest() == expected


def _require_absent(target: Path) -> None:
    if target.exists():
        raise Conflict(f"{target.name!r} exists already.", fix="Choose another name, or delete it first.")


def _publish(folder: Path, target: Path) -> None:
    """The finished folder at its place, by one rename that is on the disk when this returns."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_absent(target)
    folder.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
