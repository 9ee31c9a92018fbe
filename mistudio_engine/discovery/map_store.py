"""Maps on disk: one Parquet file each, a row a feature, with how it was made. It does not know how that is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from mistudio_engine.api.errors import CorruptFile, NotFound
from mistudio_engine.discovery.feature_map import Layout
from mistudio_engine.saes.folders import new_file

__all__ = ["StoredMap", "read_map", "write_map"]


class StoredMap(NamedTuple):
    """A map as it was kept."""

    index: NDArray[np.int64]
    """(n,) features."""

    xy: NDArray[np.float64]
    settings: dict[str, Any]
    explained_variance: list[float] | None


def write_map(path: Path, index: ArrayLike, layout: Layout, settings: dict[str, Any]) -> None:
    """Write a map; the file appears whole or not at all."""
    told = {"settings": settings, "explained_variance": layout.explained_variance}
    table = pa.table(
        {"index": np.asarray(index, dtype=np.int64), "x": layout.xy[:, 0], "y": layout.xy[:, 1]},
        metadata={"mistudio": json.dumps(told)},
    )
    with new_file(path) as part:
        pq.write_table(table, part)


def read_map(path: Path) -> StoredMap:
    """Read a map.

    Raises:
        NotFound: there is none.
        CorruptFile: it is torn.
    """
    if not path.is_file():
        raise NotFound(f"There is no map {path.stem!r}.", fix="Make it with map_features.")
    try:
        table = pq.read_table(path)
        told = json.loads((table.schema.metadata or {})[b"mistudio"])
        xy = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
        return StoredMap(table["index"].to_numpy(), xy, told["settings"], told["explained_variance"])
    except (OSError, KeyError, ValueError) as error:  # what pyarrow raises for a torn file is a ValueError
        raise CorruptFile(f"The map {path.name} cannot be read: {error}.", fix="Make it again.") from error
