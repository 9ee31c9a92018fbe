"""A training's state on disk: two files that are there whole or not at all, and that notice a flipped bit.

`state.safetensors` holds tensors, `state.json` everything else, the tensors' sha256 and its own. It does not know what
the state means (trainer.py does).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from mistudio_engine.api.errors import CorruptFile, MistudioError, Unsupported
from mistudio_engine.saes.folders import new_folder
from mistudio_engine.saes.tensor_file import read_json, read_tensors, write_tensors

if TYPE_CHECKING:
    from mistudio_engine.training.activations import ActivationStream
    from mistudio_engine.training.trainer import Trainer

__all__ = ["Latest", "State", "latest_good", "read_state", "save_checkpoint", "write_state"]

TENSOR_FILE = "state.safetensors"
JSON_FILE = "state.json"

_FORMAT = "mistudio-training-state"
_VERSION = 1
_NAME = re.compile(r"step-(\d{9})")


class State(NamedTuple):
    """What a checkpoint holds."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Latest(NamedTuple):
    """The newest checkpoint that can be used."""

    folder: Path | None
    """None when there is none."""

    warnings: list[str]
    """One sentence for each newer one that had to be passed over."""


def write_state(folder: Path, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
    """Write a state; the folder appears whole or not at all, in the place of one of that name.

    Raises:
        DiskFull: there is no room.
    """
    with new_folder(folder, replace=True) as part:
        write_tensors(part / TENSOR_FILE, tensors)
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "tensors_sha256": _file_hash(part / TENSOR_FILE),
            "values": values,
        }
        content["sha256"] = _json_hash(content)
        (part / JSON_FILE).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def read_state(folder: Path) -> State:
    """The state in a folder.

    Raises:
        NotFound: there is none.
        CorruptFile: a file is torn, or a bit of it flipped.
        Unsupported: a newer miStudio wrote it.
    """
    content = read_json(folder / JSON_FILE)
    said = content.pop("sha256", None)
    if said != _json_hash(content) or content.get("format") != _FORMAT:
        raise _torn(folder, JSON_FILE)
    if content["version"] != _VERSION:
        raise Unsupported(
            f"The checkpoint {folder.name} has version {content['version']}; this miStudio reads version {_VERSION}.",
            fix="Continue it with the miStudio that wrote it, or start the training anew.",
        )
    if not (folder / TENSOR_FILE).is_file() or _file_hash(folder / TENSOR_FILE) != content["tensors_sha256"]:
        raise _torn(folder, TENSOR_FILE)
    return State(read_tensors(folder / TENSOR_FILE), content["values"])


def save_checkpoint(root: Path, trainer: Trainer, stream: ActivationStream, *, keep: int = 2) -> Path:
    """Write the state of a training and its data under `root`, and remove all but the newest `keep`.

    Returns:
        The checkpoint's folder, `step-` and the number of steps done.

    Raises:
        DiskFull: there is no room; the earlier ones are still there.
    """
    folder = root / f"step-{trainer.n_steps_done:09d}"
    trainer.save_state(folder, stream_state=stream.state())
    for old in _newest_first(root)[keep:]:
        shutil.rmtree(old)
    return folder


def latest_good(root: Path) -> Latest:
    """The newest checkpoint under `root` that reads without an error; passes over those that do not, and says so."""
    warnings = []
    for folder in _newest_first(root):
        try:
            read_state(folder)
        except MistudioError as error:
            warnings.append(f"The checkpoint {folder.name} was passed over: {error.what}")
            continue
        return Latest(folder, warnings)
    return Latest(None, warnings)


def _newest_first(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted((folder for folder in root.iterdir() if _NAME.fullmatch(folder.name)), reverse=True)


def _torn(folder: Path, name: str) -> CorruptFile:
    return CorruptFile(
        f"{name} of the checkpoint {folder.name} is damaged: its hash is not the one that was recorded.",
        fix="Continue from an earlier checkpoint; latest_good() finds the last one that is whole.",
    )


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
