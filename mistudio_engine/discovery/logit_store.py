"""The logit lens of an SAE on disk: one safetensors file beside its extraction, read lazily a feature at a time.

The folded form, with the final norm's gain, is always there; the plain one, which Neuronpedia shows, stands beside it
under names that begin with `plain.`, except in files of versions that did not keep it. It knows files and arrays; how
they come about is logit_lens.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mistudio_engine.api.errors import CorruptFile, NotFound
from mistudio_engine.discovery.logit_lens import LogitLens
from mistudio_engine.saes.folders import new_file

__all__ = ["LogitDistribution", "LogitEffects", "LogitReader", "read_logits", "write_logits"]

PLAIN = "plain."
"""What the names of the plain form's arrays begin with."""

MOMENTS = ("mean", "std", "skewness", "kurtosis")


class LogitEffects(NamedTuple):
    """What one feature does to the logits."""

    promoted_ids: NDArray[np.int32]
    """(k,) largest first."""

    promoted_values: NDArray[np.float32]
    suppressed_ids: NDArray[np.int32]
    """(k,) smallest first."""

    suppressed_values: NDArray[np.float32]


class LogitDistribution(NamedTuple):
    """One feature's logits over the whole vocabulary."""

    bin_edges: NDArray[np.float64]
    """(n_bins + 1,) from the smallest logit to the largest."""

    counts: NDArray[np.int32]
    """(n_bins,) tokens."""

    mean: float
    std: float
    skewness: float
    kurtosis: float


def write_logits(path: Path, lens: LogitLens, plain: LogitLens | None = None) -> None:
    """Write a lens, and the form without the gain beside it; the file appears whole or not at all."""
    arrays = lens._asdict() | ({PLAIN + name: value for name, value in plain._asdict().items()} if plain else {})
    with new_file(path) as part:
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, part)


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
        self._slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict

    @property
    def has_plain(self) -> bool:
        """Whether the form without the final norm's gain was kept, too."""
        return PLAIN + "promoted_ids" in self._slices

    def feature(self, row: int, k: int, *, plain: bool = False) -> LogitEffects:
        """The k strongest effects of the feature in a row, fewer where fewer were kept.

        Raises:
            NotFound: the plain form was not kept.
        """
        return LogitEffects(*(self._of(name, plain)[row : row + 1, :k][0] for name in LogitEffects._fields))

    def distribution(self, row: int, *, plain: bool = False) -> LogitDistribution:
        """How the logits of the feature in a row are distributed over the vocabulary. Raises as `feature`."""
        low, high = (
            float(self._of(f"{end}_values", plain)[row : row + 1, :1][0, 0]) for end in ("suppressed", "promoted")
        )
        counts = self._of("histogram_counts", plain)[row : row + 1][0]
        moments = (float(self._of(name, plain)[row : row + 1][0]) for name in MOMENTS)
        return LogitDistribution(np.linspace(low, high, len(counts) + 1), counts, *moments)

    def _of(self, name: str, plain: bool) -> Any:
        if plain and not self.has_plain:
            raise NotFound(
                "The logit effects without the final norm's gain were not kept.",
                why="The extraction is of an older version.",
                fix="Run the extraction again.",
            )
        return self._slices[PLAIN + name if plain else name]
