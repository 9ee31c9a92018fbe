"""A folder, or a file, that is there whole or not at all.

It is written beside its place under a `.part` name, synced to the disk and renamed: after a crash what has its final
name is complete. It does not know what is in it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mistudio_engine.api.errors import Conflict, DiskFull

__all__ = ["new_file", "new_folder", "take_place"]


@contextmanager
def new_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` when the block ends well, and goes when it does not.

    Args:
        folder: the final name; its parents are made.
        replace: put it in the place of one that exists.

    Raises:
        Conflict: `folder` exists and `replace` is False.
        DiskFull: the disk filled up inside the block.
    """
    if folder.exists() and not replace:
        raise Conflict(f"{folder.name} exists already.", fix="Choose another name, or delete it first.")
    part = folder.with_name(folder.name + ".part")
    _remove(part)
    part.mkdir(parents=True)
    try:
        with _room_for(folder, part):
            yield part
            for file in part.iterdir():
                _sync(file)
            take_place(part, folder)
    finally:
        _remove(part)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` when the block ends well, and goes when it does not.

    Raises:
        DiskFull: the disk filled up inside the block.
    """
    part = path.with_name(path.name + ".part")
    try:
        with _room_for(path, part):
            yield part
            _sync(part)
            part.replace(path)
            _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def take_place(made: Path, folder: Path) -> None:
    """Give a folder whose files are complete and synced the name `folder`, in place of one that has it."""
    _sync(made)
    # Two renames, since none replaces a folder that is not empty; in between the old one waits under `.old`.
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        _remove(old)
        folder.rename(old)
    made.rename(folder)
    _remove(old)
    _sync(folder.parent)


@contextmanager
def _room_for(path: Path, part: Path) -> Iterator[None]:
    """Tells a full disk as such, with what was written so far."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        files = part.iterdir() if part.is_dir() else [part] if part.exists() else []
        written = sum(file.stat().st_size for file in files)
        raise DiskFull.of(f"Writing {path.name}", written, shutil.disk_usage(path.parent).free) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
