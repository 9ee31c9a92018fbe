"""Files that are whole or not there, and paths that stay where they belong.

Everything is written beside its place as `*.part`, synced to the disk and renamed: a crash leaves the old content or
the new one, and at worst a `*.part`, which `sweep_parts` removes at the next start. It knows no formats and no records.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
import unicodedata
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from mistudio_engine.api.errors import Conflict, DiskFull, Forbidden, human_bytes

__all__ = [
    "atomic_folder",
    "disk_full",
    "free_bytes",
    "hashing_folder",
    "is_disk_full",
    "require_free",
    "safe_path",
    "sha256_file",
    "sha256_folder",
    "slugify",
    "sweep_parts",
    "write_atomic",
]

PART = ".part"
"""Ending of what is still being written."""

SLASH_LOOKALIKES = frozenset("\u2044\u2215\u2216\u29f5\u29f8\u29f9\u2571\u2572\u3033\u4e36\u4e3f\ufe68\uff0f\uff3c")
"""Characters drawn like a slash or backslash; NFKC maps only the last three of them."""

MAX_NAME_BYTES = 255
"""Longest file name that the usual file systems take."""

HASHED_AT_ONCE = 16 << 20
"""Bytes to a step of hashing: 10 to 40 ms, by whether the processor has instructions for it."""


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder that appears at `path`, complete and synced, when the block ends without an error.

    Yields the folder to write into, `path` with `.part` added; what an earlier crash left there is removed first. One
    writer per path. Raises Conflict when `path` exists and DiskFull when the disk is full.
    """
    path = Path(path)
    _require_absent(path)
    part = path.with_name(path.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with _disk_full(path, f"Writing {path.name}"):
            yield part
            for file in sorted(part.rglob("*")):
                _sync(file)
            _sync(part)
            _require_absent(path)  # rename(2) would silently replace an empty folder
            part.rename(path)
            _sync(path.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_atomic(path: Path, data: bytes | str, mode: int = 0o644) -> Path:
    """Puts `data` at `path`, replacing what was there; readers see all of the old or all of the new.

    Text is written as UTF-8. The permissions are `mode` from the first byte on, whatever the umask, so a secret is at
    no moment readable by others. Raises DiskFull.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    part = path.with_name(f"{path.name}.{uuid4().hex[:8]}{PART}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with _disk_full(path, f"Writing {path.name}", len(content)), open(descriptor, "wb") as file:
            os.chmod(part, mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def safe_path(root: Path, *parts: str) -> Path:
    """`root` joined with `parts`, which may come from anybody; the answer lies inside `root`, links followed.

    A part is a name or several with `/` between them. Raises Forbidden for an empty or absolute part, `.`, `..`, a
    drive, a backslash, control and invisible characters, NUL, characters that look like separators or dots (whatever
    NFKC changes), and links that lead outside.
    """
    names = [name for part in parts for name in str(part).split("/")]
    for name in names:
        if reason := _refusal(name):
            raise Forbidden(
                f"The path {'/'.join(map(str, parts))[:200]!r} is not allowed: {reason}.",
                fix="Use a plain relative name made of letters, digits, '.', '_' and '-'.",
            )
    home = Path(root).resolve()
    target = home.joinpath(*names).resolve()
    if not target.is_relative_to(home):
        raise Forbidden(
            f"The path {'/'.join(names)!r} leads outside the data directory through a link.",
            fix="Remove the link, or bring the files into the data directory.",
        )
    return Path(root) / target.relative_to(home)


def _refusal(name: str) -> str | None:
    """Why `name` cannot be one component of a path, or None."""
    if not name:
        return "it is absolute or has an empty part"
    if "\0" in name:
        return "it contains a NUL"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in name):
        return "it contains control or invisible characters"
    if "\\" in name:
        return "it contains a backslash"
    if SLASH_LOOKALIKES & set(name) or unicodedata.normalize("NFKC", name) != unicodedata.normalize("NFC", name):
        return "it contains characters that look like others"
    if not name.strip(". ") or name[-1] in ". ":
        return "it is, or ends like, '.' or '..'"
    if re.match(r"[A-Za-z]:", name):
        return "it names a drive"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"one of its names is longer than {MAX_NAME_BYTES} bytes"
    return None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: Path) -> str:
    """SHA-256 over the sorted relative names and contents of all files below `path`, in hexadecimal.

    Links to files count as the files they lead to (a hub's snapshot is made of them); times and permissions do not.
    """
    steps = hashing_folder(path)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def hashing_folder(path: Path) -> Generator[float, Any, str]:
    """`sha256_folder` in steps of less than a tenth of a second; yields the share that is done."""
    files = sorted(each for each in Path(path).rglob("*") if each.is_file())
    n_bytes, n_done = sum(file.stat().st_size for file in files), 0
    whole = hashlib.sha256()
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while block := content.read(HASHED_AT_ONCE):
                digest.update(block)
                n_done += len(block)
                yield min(1.0, n_done / n_bytes)
        whole.update(f"{file.relative_to(path).as_posix()}\0{digest.hexdigest()}\n".encode())
    return whole.hexdigest()


def free_bytes(path: Path) -> int:
    """Free space for us on the disk where `path` is or would be."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(path: Path, n_bytes: int, what: str) -> None:
    """Raises DiskFull when fewer than `n_bytes` are free where `path` is; `what` begins the sentence."""
    free = free_bytes(path)
    if free < n_bytes:
        raise DiskFull.of(what, n_bytes, free)


def disk_full(what: str, path: Path, needed: int = 0) -> DiskFull:
    """The error for a disk that was full; `needed` are the bytes that were wanted, 0 when nobody knows."""
    free = free_bytes(path)
    if needed > free:
        return DiskFull.of(what, needed, free)
    return DiskFull(
        f"{what} needs more than the {human_bytes(free)} that are free on its disk, or its quota is used up.",
        fix=DiskFull.of(what, needed, free).fix,
    )


def is_disk_full(error: BaseException) -> bool:
    """Does the operating system say with this error that a disk or a quota is exhausted?"""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def slugify(text: str) -> str:
    """A readable slug: ASCII, lower case, `[a-z0-9][a-z0-9._-]{0,79}`; text without any such character gets a hash."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9._-]+", "-", plain)
    slug = re.sub(r"\.{2,}", ".", slug).lstrip("._-")[:80].rstrip("._-")
    if slug.endswith(PART):
        slug = slug.removesuffix(PART)[:75] + "-part"  # `sweep_parts` takes names that end in .part for garbage
    return slug or "x-" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def sweep_parts(root: Path, *, older_than_seconds: float = 0.0) -> list[Path]:
    """Removes every `*.part` below `root` that nothing has touched for so long; links are not followed.

    For the start of the engine, while it alone holds the directory: then whatever is partial was left by a crash.
    Returns what was removed.
    """
    swept: list[Path] = []
    newest = time.time() - older_than_seconds
    for folder, folders, files in os.walk(root):
        for name in [each for each in (*folders, *files) if each.endswith(PART)]:
            path = Path(folder, name)
            if path.lstat().st_mtime > newest:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            swept.append(path)
        folders[:] = [name for name in folders if not name.endswith(PART)]
    return swept


def _require_absent(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise Conflict(f"{path.name!r} exists already.", fix="Choose another name, or delete it first.")


def _sync(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_full(path: Path, what: str, needed: int = 0) -> Iterator[None]:
    """Turns the operating system's "no space left" into DiskFull."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise disk_full(what, path, needed) from error
