"""What one source has published of an SAE's features, on disk: statistics in one Parquet file, examples in several.

    published.json          which source
    features.parquet        a row a feature
    activations-N.parquet   a row an example, as they came

It knows neither where that was published nor what the SAE itself does.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mistudio_engine.api.errors import CorruptFile
from mistudio_engine.api.published import PublishedExample, PublishedFeature
from mistudio_engine.saes.folders import new_file

__all__ = ["EXAMPLES_SCHEMA", "FEATURES_SCHEMA", "finish_source", "read_source", "write_statistics"]

INFO_FILE, FEATURES_FILE = "published.json", "features.parquet"

FEATURES_SCHEMA = pa.schema([("index", pa.int64()), ("max", pa.float64()), ("frequency", pa.float64())])
EXAMPLES_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("tokens", pa.list_(pa.string())),
        ("values", pa.list_(pa.float32())),
        ("position", pa.int32()),
        ("bin_min", pa.float64()),
        ("bin_max", pa.float64()),
        ("bin_contains", pa.float64()),
    ]
)


def write_statistics(path: Path, statistics: pa.Table) -> None:
    """Write statistics of some features; the file appears whole or not at all."""
    with new_file(path) as part:
        pq.write_table(statistics.cast(FEATURES_SCHEMA), part)


def finish_source(folder: Path, source: str, statistics: pa.Table) -> None:
    """Put beside the examples of a folder what makes it a source."""
    write_statistics(folder / FEATURES_FILE, statistics)
    with new_file(folder / INFO_FILE) as part:
        part.write_text(json.dumps({"source": source}), encoding="utf-8")


def read_source(folder: Path, index: int, n: int) -> PublishedFeature | None:
    """What a source says of a feature, with its n strongest examples; None for nothing.

    Raises:
        CorruptFile: a file is missing or torn.
    """
    try:
        source = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))["source"]
        statistics = pq.read_table(folder / FEATURES_FILE, filters=[("index", "==", index)]).to_pylist()
        rows = [
            row
            for piece in sorted(folder.glob("activations-*.parquet"))
            for row in pq.read_table(piece, filters=[("index", "==", index)]).to_pylist()
        ]
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise CorruptFile(f"{folder.name} cannot be read: {error}.", fix="Import it again.") from error
    if not statistics and not rows:
        return None
    rows.sort(key=lambda row: -row["values"][row["position"]])
    examples = [PublishedExample(**{key: row[key] for key in row if key != "index"}) for row in islice(rows, n)]
    return PublishedFeature(
        source=source,
        max_activation=statistics[0]["max"] if statistics else None,
        activation_frequency=statistics[0]["frequency"] if statistics else None,
        examples=examples,
        total=len(rows),
        shown=len(examples),
    )
