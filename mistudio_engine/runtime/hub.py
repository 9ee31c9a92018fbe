"""Repositories of the Hugging Face Hub, brought into folders of ours.

A download knows its files and their sizes before it begins, checks the disk, and pins the commit. Files arrive in
`downloads/` of the data directory, where what a broken connection, a pause or a killed engine leaves is taken up again;
each is compared with the hash that the hub lists, and the whole folder appears at its place by one rename. Only weights,
configurations, tokenizers and data are fetched, never a pickle and never code.

HTTP, authentication, redirects and retries are huggingface_hub's. It does not know what the files mean; tokens of the
hub (HF_TOKEN, or what `hf auth login` left) are in no message of ours. MISTUDIO_OFFLINE=1 opens no socket at all.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from mistudio_engine.api.errors import (
    BadInput,
    Cancelled,
    Conflict,
    CorruptFile,
    DiskFull,
    EmptyData,
    MistudioError,
    NotFound,
    Unreachable,
    Unsupported,
)
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.runtime.files import free_bytes, is_disk_full, require_free, safe_path, slugify

__all__ = ["Hub", "Listing", "RemoteFile", "RepoKind"]

T = TypeVar("T")

RepoKind = Literal["model", "dataset", "sae"]

REPO_TYPES = {"model": "model", "dataset": "dataset", "sae": "model"}

PATTERNS: dict[str, tuple[str, ...]] = {
    "model": ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"),
    "sae": ("*.safetensors", "*.npz", "*.json", "*.yaml", "*.txt"),
    "dataset": ("*.parquet", "*.arrow", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt", "*.md", "*.gz", "*.zst"),
}
"""What is fetched of each kind; a pickle (.bin, .pt, .pkl, .ckpt) or code matches none of them."""

NEVER = ("*.pkl*", "*.pickle*", "*.pt", "*.pth", "*.bin", "*.ckpt", "*.joblib", "*.npy", "*.py", "*.tar*", "*.so")
"""What is not fetched even when a pattern of the caller's asks for it."""

DEFAULT_ENDPOINT = "https://huggingface.co"

TIMEOUT_SECONDS = 10.0
"""For the hub's answer to a question; a file may pause as long as HF_HUB_DOWNLOAD_TIMEOUT."""

STEP_SECONDS = 0.25
CANCEL_SECONDS = 4.0
"""How long a cancelled download waits for its thread, which may hang in a dead connection."""

STALE_SECONDS = 24 * 3600.0
"""Partial downloads that nobody has taken up again for so long are removed."""

DISK_MARGIN_BYTES = 64 * 1024 * 1024

CONFIG_CAP_BYTES = 8 * 1024 * 1024

HASH_BYTES = 4 * 1024 * 1024


class RemoteFile(NamedTuple):
    """A file of a repository; `sha256` for an LFS file, `git_oid` (SHA-1 of the blob) for a plain one."""

    name: str
    n_bytes: int
    sha256: str | None
    git_oid: str | None


class Listing(NamedTuple):
    """What would be downloaded: the commit that the revision names now, and the wanted files of it."""

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]
    left_out: tuple[str, ...]
    """Names of the other files in the repository."""

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


class Hub:
    """The hub, for one data directory.

    Args:
        home: the data directory; partial downloads lie in its `downloads/`.
        endpoint: base address; HF_ENDPOINT by default, else huggingface.co.
    """

    def __init__(self, home: Path, endpoint: str | None = None) -> None:
        self.home = Path(home)
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self._busy: set[Path] = set()
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
            kind: "sae" is a model repository of which also `.npz` is wanted.
            revision: branch, tag or commit; the default branch if None.
            path: only what lies in this folder of the repository; of a model only what lies in no folder.
            allow_patterns: instead of the kind's own patterns (`fnmatch` on the whole name).
            token: instead of HF_TOKEN.

        Raises:
            NotFound: no such repository, revision or folder.
            BadInput: an id that cannot be one, or a gated repository, with what to set.
            Unsupported: a model whose weights are pickles only.
            EmptyData: nothing in it is wanted.
            Unreachable: the hub does not answer, or we are offline.
        """
        with self._typed_errors(repo_id, revision):
            info = HfApi(endpoint=self.endpoint, token=token).repo_info(
                repo_id, repo_type=REPO_TYPES[kind], revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
            )
        files = [
            RemoteFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None, each.blob_id)
            for each in info.siblings or []
        ]
        wanted = _wanted(files, kind, path, allow_patterns)
        names = {file.name for file in wanted}
        left_out = tuple(file.name for file in files if file.name not in names)
        _require_something(kind, repo_id, path, wanted, left_out)
        return Listing(repo_id, info.sha or revision or "main", tuple(wanted), left_out)

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
        with self._typed_errors(repo_id, listing.commit):
            self._get(kind, listing, file, content, 0, _Meter(file.n_bytes), None)
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

        Yields its progress in bytes about four times a second. Closing it cancels; what has arrived is taken up again by
        the next download of the same commit within a day. Files keep their names in the repository, folders included.

        Raises:
            Conflict: `target` exists.
            DiskFull: said before the first byte, when it can be known.
            CorruptFile: what arrived is not what the hub lists, twice.
            Cancelled: it was told to stop early; half a repository is of no use.
            NotFound, BadInput, Unsupported, EmptyData, Unreachable: as `listing`.
        """
        target = Path(target)
        if target.exists():
            raise Conflict(f"{target.name!r} exists already.", fix="Choose another name, or delete it first.")
        asked = _Meter(0)
        listing = yield from _in_thread(
            lambda: self.listing(kind, repo_id, revision, path, allow_patterns=allow_patterns, token=token),
            lambda: Progress(stage=f"asking the hub for {repo_id}"),
            asked,
        )
        assert isinstance(listing, Listing)
        folder = self.home / "downloads" / _key(kind, listing)
        while not self._take(folder):
            yield Progress(stage=f"waiting for another download of {repo_id}")
        meter = _Meter(listing.n_bytes)

        def fetch() -> None:
            try:
                self._require_space(folder, listing)
                with self._typed_errors(repo_id, listing.commit):
                    for file in listing.files:
                        self._fetch(kind, listing, file, folder, meter, token)
                _publish(folder, target)
            finally:  # by the thread itself: a cancelled download may return before its thread does
                self._release(folder)

        yield from _in_thread(fetch, meter.progress, meter)
        return target

    # -- one file

    def _fetch(
        self, kind: RepoKind, listing: Listing, file: RemoteFile, folder: Path, meter: _Meter, token: str | None
    ) -> None:
        path = safe_path(folder, file.name)
        if path.is_file() and path.stat().st_size == file.n_bytes:
            meter.advance(file.n_bytes)  # its name says that it was checked
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".incomplete")
        for last in (False, True):
            meter.begin(f"downloading {file.name}")
            with part.open("ab") as content:
                begun = content.tell()
                if begun > file.n_bytes:
                    content.truncate(0)
                    begun = 0
                meter.advance(begun)
                self._get(kind, listing, file, content, begun, meter, token)
                content.flush()
                os.fsync(content.fileno())
            meter.begin(f"checking {file.name}")
            if _is_what_was_listed(part, file, meter):
                os.replace(part, path)
                return
            part.unlink()
            meter.advance(-file.n_bytes)
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
        content: Any,
        begun: int,
        meter: _Meter,
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

    def _take(self, folder: Path) -> bool:
        """Claim a working folder; False while another download in this process has it."""
        with self._lock:
            if folder in self._busy:
                return False
            self._busy.add(folder)
        return True

    def _release(self, folder: Path) -> None:
        with self._lock:
            self._busy.discard(folder)

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
            if folder != keep and folder.stat().st_mtime <= newest and self._take(folder):
                shutil.rmtree(folder, ignore_errors=True)
                self._release(folder)

    # -- errors

    @contextmanager
    def _typed_errors(self, repo_id: str, revision: str | None) -> Iterator[None]:
        """Ours for theirs, with nothing of a request in them: its headers carry the token, its address a signature."""
        if self.offline:
            raise Unreachable(
                f"{repo_id} is on the hub, and MISTUDIO_OFFLINE=1 forbids every connection.",
                fix="Use what is here already (find), or start the engine without MISTUDIO_OFFLINE.",
            )
        where = f"on {self.endpoint.partition('://')[2]}"
        try:
            yield
        except GatedRepoError:
            raise BadInput(
                f"{repo_id} is gated {where}.",
                why="Its files are given only to accounts that have accepted its terms.",
                fix=f"Accept them at {self.endpoint}/{repo_id}, set HF_TOKEN to a token of that account (or run "
                "`hf auth login`), and start the engine again.",
            ) from None
        except DisabledRepoError:
            raise BadInput(f"{repo_id} was disabled {where}.", fix="Choose another repository.") from None
        except RevisionNotFoundError:
            raise NotFound(
                f"{repo_id} has no revision {revision!r} {where}.",
                fix="Give a branch, tag or commit that it has, or none.",
            ) from None
        except RepositoryNotFoundError:
            raise NotFound(
                f"There is no repository {repo_id!r} {where}, or it is private.",
                fix="Check the id, owner/name. For a private one set HF_TOKEN and start the engine again.",
            ) from None
        except EntryNotFoundError:
            raise NotFound(f"A file that {repo_id} lists is not there {where}.", fix="Try again later.") from None
        except HFValidationError:
            raise BadInput(f"{repo_id!r} cannot be the id of a repository.", fix="Give owner/name.") from None
        except HfHubHTTPError as error:
            raise _of_status(error.response.status_code, repo_id, where) from None
        except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
            raise Unreachable(
                f"The hub could not be reached for {repo_id}.",
                why=f"{self.endpoint}: {type(error).__name__}.",
                fix="Check the connection (HF_ENDPOINT and HTTPS_PROXY if you need them), then retry.",
            ) from None
        except OSError as error:
            if is_disk_full(error):
                free = free_bytes(self.home)
                raise DiskFull.of(f"Downloading {repo_id}", free + 1, free) from None
            if "Consistency check failed" in str(error):  # huggingface_hub's words for fewer bytes than announced
                raise Unreachable(
                    f"A file of {repo_id} did not arrive whole.", fix="Retry: it goes on from there."
                ) from None
            raise


def _of_status(status: int, repo_id: str, where: str) -> MistudioError:
    if status in (401, 403):
        return BadInput(
            f"Access to {repo_id} was refused {where} with status {status}.",
            fix="Check that HF_TOKEN is valid and may read this repository.",
        )
    if status == 404:
        return NotFound(f"{repo_id} was not found {where}.", fix="Check the id, owner/name.")
    return Unreachable(f"The hub answered {status} for {repo_id} {where}.", fix="Retry in a while.")


# -- what is wanted


def _wanted(
    files: Sequence[RemoteFile], kind: RepoKind, path: str | None, allow_patterns: Sequence[str] | None
) -> list[RemoteFile]:
    folder = path.strip("/") if path else ""
    inside = [file for file in files if not folder or file.name.startswith(f"{folder}/")]
    if kind == "model" and not allow_patterns:
        depth = folder.count("/") + 1 if folder else 0
        inside = [file for file in inside if file.name.count("/") == depth]  # folders hold onnx, flax and other formats
    patterns = allow_patterns or PATTERNS[kind]
    found = [file for file in inside if _matches(file.name, patterns) and not _matches(file.name, NEVER)]
    return _one_copy_of_weights(found) if kind == "model" and not allow_patterns else found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)


def _one_copy_of_weights(files: list[RemoteFile]) -> list[RemoteFile]:
    """Without second copies (`consolidated.safetensors`, `model.fp16.safetensors`) where transformers' own is there."""
    own = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
    weights = {file.name for file in files if file.name.endswith(".safetensors")}
    kept = {name for name in weights if own.fullmatch(name.rpartition("/")[2])} or weights
    return [file for file in files if file.name not in weights - kept]


def _require_something(
    kind: RepoKind, repo_id: str, path: str | None, wanted: list[RemoteFile], left_out: tuple[str, ...]
) -> None:
    names = [*(file.name for file in wanted), *left_out]
    if path and not any(name.startswith(f"{path.strip('/')}/") for name in names):
        folders = sorted({name.rpartition("/")[0] for name in names if "/" in name})
        raise NotFound(
            f"{repo_id} has no folder {path!r}.",
            why=f"It has {', '.join(folders[:8])}{', …' if len(folders) > 8 else ''}."
            if folders
            else "It has no folders.",
            fix="Give one of its folders, or none.",
        )
    weights = (".safetensors", ".npz")
    if kind != "dataset" and not any(file.name.endswith(weights) for file in wanted):
        pickles = [name for name in left_out if _matches(name, NEVER)]
        if pickles:
            raise Unsupported(
                f"{repo_id} has its weights only as pickles, such as {pickles[0]}.",
                why="A pickle can run code when it is read, so it is not downloaded.",
                fix="Choose a repository with .safetensors, or convert it: https://huggingface.co/spaces/safetensors/convert",
            )
    if not wanted or (kind != "dataset" and not any(file.name.endswith(weights) for file in wanted)):
        raise EmptyData(
            f"{repo_id} has nothing to bring in as a {kind}.",
            why=f"It has {', '.join(left_out[:5])}{', …' if len(left_out) > 5 else ''}."
            if left_out
            else "It is empty.",
            fix=f"Wanted is at least one of {', '.join(PATTERNS[kind][:3])}.",
        )


def _key(kind: RepoKind, listing: Listing) -> str:
    said = json.dumps([kind, listing.repo_id, listing.commit, [file.name for file in listing.files]])
    return f"{slugify(listing.repo_id)[:40]}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def _is_what_was_listed(path: Path, file: RemoteFile, meter: _Meter) -> bool:
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


def _publish(folder: Path, target: Path) -> None:
    """The finished folder at its place, by one rename that is on the disk when this returns."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise Conflict(f"{target.name!r} exists already.", fix="Choose another name, or delete it first.")
    folder.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- a thread that can be followed and stopped


class _Stopped(Exception):
    """The download was cancelled."""


class _Meter:
    """How far a download is, written by its thread and read by its generator; `stop` ends the thread at its next chunk."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes, self.n_done = n_bytes, 0
        self.stop = False
        self._stage = "starting"
        self._began: tuple[float, int] | None = None

    def begin(self, stage: str) -> None:
        self._stage = stage

    def advance(self, n_bytes: int) -> None:
        """So many bytes more are here; fewer, when they have to be fetched again."""
        self.require_going_on()
        self.n_done += n_bytes

    def require_going_on(self) -> None:
        if self.stop:
            raise _Stopped

    def bar(self) -> type[tqdm]:
        """The class of progress bar that huggingface_hub is given: it shows nothing and tells this meter."""
        meter = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **keywords: Any) -> None:
                keywords.pop("name", None)
                super().__init__(*args, **{**keywords, "disable": True})

            def update(self, n: float | None = 1) -> bool | None:
                meter.arrived(int(n or 0))
                return None

        return Bar

    def arrived(self, n_bytes: int) -> None:
        """Bytes from the network: they count for the rate."""
        if self._began is None:
            self._began = time.monotonic(), self.n_done
        self.advance(n_bytes)

    def progress(self) -> Progress:
        """As it is now."""
        rate = eta = None
        if self._began is not None:
            seconds = time.monotonic() - self._began[0]
            rate = (self.n_done - self._began[1]) / seconds if seconds > 0 else None
            eta = (self.n_bytes - self.n_done) / rate if rate else None
        fraction = min(1.0, self.n_done / self.n_bytes) if self.n_bytes else None
        return Progress(fraction=fraction, stage=self._stage, rate=rate, unit="bytes", eta_seconds=eta)


def _in_thread(
    work: Callable[[], T], progress: Callable[[], Progress], meter: _Meter
) -> Generator[Progress, Signal, T]:
    """Do `work` in a thread of its own, and yield how far it is."""
    done = threading.Event()
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="mistudio-download", daemon=True)
    thread.start()
    try:
        while not done.wait(STEP_SECONDS):
            if (yield progress()) is Signal.STOP:
                raise Cancelled("The download was stopped.", fix="Start it again: it goes on from what has arrived.")
        yield progress()
    finally:
        meter.stop = True
        thread.join(CANCEL_SECONDS)
    if failure:
        raise failure[0]
    return outcome[0]
