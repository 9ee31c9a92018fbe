"""Which files a dataset consists of: one file, a folder that `datasets` saved, or a folder as the hub lays it out.

A folder that was downloaded describes itself, and what it says is not trusted: nothing outside the folder is opened.
The formats of the files are in readers.py; what is done with their rows is in datasets.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from mistudio_engine.api.errors import BadInput, CorruptFile, EmptyData, NotFound
from mistudio_engine.models.readers import ArrowReader, Reader, reader_for

__all__ = ["open_readers"]


def open_readers(source: Path, *, split: str | None = None, config: str | None = None) -> list[Reader]:
    """A reader for each file of a dataset, in order.

    Args:
        source: a file, a folder that `datasets` saved, or a folder of data files as the hub lays them out.
        split: "train" unless given; where there is none, the first.
        config: of a hub folder with several configurations.

    Raises:
        NotFound: there is no such file or folder.
        BadInput: the split or configuration does not exist, or a file lies outside the folder.
        Unsupported: a format that is not read here.
        CorruptFile: the folder's own description cannot be read.
        EmptyData: the folder has no data files.
    """
    if not source.exists():
        raise NotFound(f"There is no file or folder {str(source)!r}.", fix="Check the path.")
    if source.is_file():
        return [reader_for(source)]
    if (source / "dataset_dict.json").is_file() or (source / "state.json").is_file():
        return [ArrowReader(_saved(source, split))]
    return [reader_for(path) for path in _data_files(source, split, config)]


def _saved(source: Path, split: str | None) -> Any:
    """A folder written by `save_to_disk`."""
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(source))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{source.name!r} is no whole `datasets` folder: {error}.", fix="Save it again.") from error
    chosen = (
        saved[_choose_split([str(name) for name in saved], split, source)] if isinstance(saved, DatasetDict) else saved
    )
    _check_inside(source, [file["filename"] for file in chosen.cache_files])
    return chosen


def _data_files(source: Path, split: str | None, config: str | None) -> list[Path]:
    """The data files of a split, as `datasets` finds them from the README and the file names of a hub folder.

    Only its search is used: reading through it would copy the data into its cache and stop at the first bad byte.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    _check_card(source)
    try:
        with tempfile.TemporaryDirectory() as cache:
            builder = load_dataset_builder(str(source), config, cache_dir=cache)
    except (DataFilesNotFoundError, DatasetNotFoundError, FileNotFoundError) as error:
        raise EmptyData(f"There are no data files in {source.name!r}.", fix="Give a folder that has some.") from error
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise BadInput(f"The folder {source.name!r} cannot be read as a dataset: {error}.") from error
    found: dict[str, Any] = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    files = [str(path) for path in found[_choose_split(list(found), split, source)]]
    _check_inside(source, files)
    return [Path(path) for path in files]


def _check_card(source: Path) -> None:
    """A README names a dataset's files by pattern, and `datasets` follows it anywhere: other folders, the network.

    Raises:
        CorruptFile: its header is not YAML.
        BadInput: a pattern leads out of the folder.
    """
    if (source / ".huggingface.yaml").exists():
        raise BadInput(
            f"{source.name!r} has a .huggingface.yaml, which is not read.", fix="Give its data files one by one."
        )
    card = source / "README.md"
    try:
        header = (metadata_load(card) if card.is_file() else None) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise CorruptFile(f"The header of README.md in {source.name!r} is not YAML: {error}.") from error
    for text in _strings(header.get("configs")):
        if "://" in text or Path(text).is_absolute() or ".." in Path(text).parts:
            raise BadInput(
                f"README.md in {source.name!r} points to {text!r}, outside the dataset.",
                fix="Use files inside the folder; bring in other data as a dataset of its own.",
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _check_inside(source: Path, files: list[str]) -> None:
    root = os.path.abspath(source)
    for file in files:
        if os.path.commonpath([root, os.path.abspath(file)]) != root:
            raise BadInput(
                f"{source.name!r} points to {file!r}, outside the dataset.", fix="Use files inside the folder."
            )


def _choose_split(splits: list[str], split: str | None, source: Path) -> str:
    if not splits:
        raise EmptyData(f"There are no splits in {source.name!r}.", fix="Give a folder that has data files.")
    if split is None:
        return "train" if "train" in splits else splits[0]
    if split not in splits:
        raise BadInput(f"{source.name!r} has no split {split!r}.", fix=f"Use one of: {', '.join(splits)}.")
    return split
