"""What a repository of the hub holds, and what of it is wanted.

Plain functions of a list of names: they ask nobody. Only weights, configurations, tokenizers and data are wanted, never
a pickle and never code.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from mistudio_engine.api.errors import EmptyData, NotFound, Unsupported

__all__ = ["PATTERNS", "REPO_TYPES", "Listing", "RemoteFile", "RepoKind", "choose"]

RepoKind = Literal["model", "dataset", "sae"]

REPO_TYPES = {"model": "model", "dataset": "dataset", "sae": "model"}

PATTERNS: dict[str, tuple[str, ...]] = {
    "model": ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*"),
    "sae": ("*.safetensors", "*.npz", "*.json", "*.yaml", "*.txt", "LICENSE*", "NOTICE*"),
    "dataset": ("*.parquet", "*.arrow", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt", "*.md", "*.gz", "*.zst"),
}
"""What is fetched of each kind; a pickle (.bin, .pt, .pkl, .ckpt) or code matches none of them."""

NEVER = ("*.pkl*", "*.pickle*", "*.pt", "*.pth", "*.bin", "*.ckpt", "*.joblib", "*.npy", "*.py", "*.tar*", "*.so")
"""What is not fetched even when a pattern of the caller's asks for it."""


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


def choose(
    repo_id: str,
    commit: str,
    files: Sequence[RemoteFile],
    kind: RepoKind,
    path: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Listing:
    """The files of a repository that are wanted.

    Args:
        path: only what lies in this folder of the repository; of a model only what lies in no folder below it.
        allow_patterns: instead of the kind's own patterns (`fnmatch` on the whole name).

    Raises:
        NotFound: it has no such folder.
        Unsupported: its weights are pickles only.
        EmptyData: nothing in it is wanted.
    """
    wanted = _wanted(files, kind, path, allow_patterns)
    names = {file.name for file in wanted}
    left_out = tuple(file.name for file in files if file.name not in names)
    _require_something(kind, repo_id, path, wanted, left_out)
    return Listing(repo_id, commit, tuple(wanted), left_out)


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
