"""The logit lens of an SAE on disk: one safetensors file beside its extraction, read lazily a feature at a time.

It knows files and arrays; how they come about is logit_lens.py's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mistudio_engine.api.errors import CorruptFile
from mistudio_engine.discovery.logit_lens import LogitLens

__all__ = ["LogitEffects", "LogitReader", "read_logits", "write_logits"]


class LogitEffects(NamedTuple):
    """What one feature does to the logits."""

    promoted_ids: NDArray[np.int32]
    """(k,) largest first."""

    promoted_values: NDArray[np.float32]
    suppressed_ids: NDArray[np.int32]
    """(k,) smallest first."""

    suppressed_values: NDArray[np.float32]


def write_logits(path: Path, lens: LogitLens) -> None:
    """Write a lens; the file appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    save_file({name: np.ascontiguousarray(value) for name, value in lens._asdict().items()}, part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)


@contextmanager
def read_logits(path: Path) -> Iterator[LogitReader]:
    """The lens in a file, open while the block runs.

    Raises:
        CorruptFile: it is torn.
    """
    try:
        with safe_open(path, framework="np") as file:
            yield LogitReader(file)
    except SafetensorError as error:
        raise CorruptFile(f"{path.name} cannot be read: {error}.", fix="Run the extraction again.") from error


class LogitReader:
    """An open file of logit effects."""

    def __init__(self, file: Any) -> None:
        self._slices = {name: file.get_slice(name) for name in LogitEffects._fields}

    def feature(self, row: int, k: int) -> LogitEffects:
        """The k strongest effects of the feature in a row, fewer where fewer were kept."""
        return LogitEffects(*(self._slices[name][row : row + 1, :k][0] for name in LogitEffects._fields))
