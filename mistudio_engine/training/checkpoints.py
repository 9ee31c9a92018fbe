"""A training's states on disk: folders that are there whole or not at all, and that notice a flipped bit.

A state is two files: `state.safetensors` holds tensors, `state.json` everything else, the tensors' sha256 and its own.
A checkpoint is a folder `step-…` with one state a member and, in `training/`, where its data stood. It does not know
what a state means (trainer.py does).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput, CorruptFile, JobFailed, MistudioError, Unsupported
from mistudio_engine.saes.folders import new_folder
from mistudio_engine.saes.tensor_file import is_finite, read_json, read_tensors, write_tensors

if TYPE_CHECKING:
    from mistudio_engine.training.loop import Member, Stream

__all__ = [
    "Checkpoint",
    "Latest",
    "State",
    "checkpoints",
    "latest_good",
    "read_state",
    "restore_checkpoint",
    "save_checkpoint",
    "write_state",
]

TENSOR_FILE = "state.safetensors"
JSON_FILE = "state.json"
COMMON = "training"
"""The state that all members of a checkpoint share."""

_FORMAT = "mistudio-training-state"
_VERSION = 2
_NAME = re.compile(r"step-(\d{9})")


class State(NamedTuple):
    """What two files hold."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Checkpoint(NamedTuple):
    """A checkpoint on disk, as far as its folder says; it may be damaged."""

    folder: Path
    step: int

    score: float | None
    """What it is judged by, less is better; None where that was not measured."""

    members: tuple[str, ...]


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
        BadInput: a tensor has NaN or infinite values; such states are never saved.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise BadInput(f"{name} has NaN or infinite values, and such a state is never saved.")
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
        Unsupported: another version of miStudio wrote it.
    """
    values = _read_values(folder)
    tensors_sha256 = values.pop("tensors_sha256")
    if not (folder / TENSOR_FILE).is_file() or _file_hash(folder / TENSOR_FILE) != tensors_sha256:
        raise _torn(folder, TENSOR_FILE)
    return State(read_tensors(folder / TENSOR_FILE), values["values"])


def save_checkpoint(
    root: Path, members: Sequence[Member], stream: Stream, *, keep: int = 2, score: float | None = None
) -> Path:
    """Write the state of a training and its data under `root`, and remove all but the newest `keep` and the best.

    Args:
        root: holds a training's checkpoints.
        members: of the training.
        stream: where its data stands.
        keep: how many of the newest stay.
        score: what this one is judged by, less is better; None where nothing was measured.

    Returns:
        The checkpoint's folder, `step-` and the number of steps done.

    Raises:
        DiskFull: there is no room; the earlier ones are still there.
    """
    n_steps = max(member.trainer.n_steps_done for member in members)
    folder = root / f"step-{n_steps:09d}"
    with new_folder(folder, replace=True) as part:
        for member in members:
            member.trainer.save_state(part / member.name)
        common = {
            "stream": stream.state(),
            "n_steps_done": n_steps,
            "score": score,
            "members": {
                member.name: member.failure.body.model_dump() if member.failure else None for member in members
            },
        }
        write_state(part / COMMON, {"nothing": torch.zeros(0)}, common)
    found = checkpoints(root)
    judged = [each for each in found if each.score is not None]
    best = min(judged, key=lambda each: each.score or 0.0, default=None)
    for old in found[keep:]:
        if best is None or old.folder != best.folder:
            shutil.rmtree(old.folder)
    return folder


def restore_checkpoint(folder: Path, members: Sequence[Member]) -> dict[str, Any]:
    """Take over the states of all members.

    Returns:
        The state of the stream, for its `restore`.

    Raises:
        CorruptFile: it is torn or flipped.
        BadInput: it belongs to a training with other settings, or other members.
    """
    common = read_state(folder / COMMON).values
    ours = {member.name for member in members}
    if ours != set(common["members"]):
        raise BadInput(
            f"The checkpoint {folder.name} belongs to a training of other SAEs.",
            why=f"It has {', '.join(sorted(common['members']))}; this one has {', '.join(sorted(ours))}.",
            fix="Resume with the settings of the training, or start a new one.",
        )
    for member in members:
        member.trainer.restore(folder / member.name)
        failure = common["members"][member.name]
        member.failure = JobFailed(failure["what"], why=failure["why"], fix=failure["fix"]) if failure else None
    return common["stream"]


def checkpoints(root: Path) -> list[Checkpoint]:
    """The checkpoints under `root`, newest first; unreadable ones have no score and no members."""
    if not root.is_dir():
        return []
    found = []
    for folder in sorted((each for each in root.iterdir() if _NAME.fullmatch(each.name)), reverse=True):
        try:
            values = _read_values(folder / COMMON)["values"]
            score, members = values["score"], tuple(values["members"])
        except (MistudioError, OSError):
            score, members = None, ()
        found.append(Checkpoint(folder, int(folder.name.removeprefix("step-")), score, members))
    return found


def latest_good(root: Path) -> Latest:
    """The newest checkpoint under `root` that reads without an error; passes over those that do not, and says so."""
    warnings = []
    for checkpoint in checkpoints(root):
        try:
            for name in (COMMON, *read_state(checkpoint.folder / COMMON).values["members"]):
                read_state(checkpoint.folder / name)
        except MistudioError as error:
            warnings.append(f"The checkpoint {checkpoint.folder.name} was passed over: {error.what}")
            continue
        return Latest(checkpoint.folder, warnings)
    return Latest(None, warnings)


def _read_values(folder: Path) -> dict[str, Any]:
    content = read_json(folder / JSON_FILE)
    said = content.pop("sha256", None)
    if said != _json_hash(content) or content.get("format") != _FORMAT:
        raise _torn(folder, JSON_FILE)
    if content["version"] != _VERSION:
        raise Unsupported(
            f"The checkpoint {folder.parent.name} has version {content['version']}; "
            f"this miStudio reads version {_VERSION}.",
            fix="Continue it with the miStudio that wrote it, or start the training anew.",
        )
    return content


def _torn(folder: Path, name: str) -> CorruptFile:
    return CorruptFile(
        f"{name} of {folder.name} in the checkpoint {folder.parent.name} is damaged: its hash is not the one recorded.",
        fix="Continue from an earlier checkpoint; latest_good() finds the last one that is whole.",
    )


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
