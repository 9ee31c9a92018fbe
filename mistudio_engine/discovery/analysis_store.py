"""Analyses on disk: one Parquet file beside an extraction, a row a feature, and the parts from which a job makes it.

Each row says with which pipeline it was made, so that analyses of some features can be made anew and stand beside the
others. It knows neither spaCy nor jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mistudio_engine.api.analysis import FeatureAnalysis
from mistudio_engine.api.errors import CorruptFile
from mistudio_engine.saes.folders import new_file

__all__ = ["ANALYSIS_FILE", "join_parts", "part_features", "read_analysis", "write_part"]

ANALYSIS_FILE = "analysis.parquet"

_SCHEMA = pa.schema(
    [("feature", pa.int64()), ("analysis", pa.string())], metadata={"mistudio": '{"format_version": 1}'}
)
_ROWS_TOGETHER = 64
"""Features to a row group: what is read to show one of them."""


def write_part(path: Path, analyses: Sequence[tuple[int, str]]) -> None:
    """Write some features' analyses, (feature, JSON); the file appears whole or not at all."""
    features, texts = zip(*analyses, strict=True) if analyses else ((), ())
    _write(path, [pa.table({"feature": pa.array(features, pa.int64()), "analysis": pa.array(texts, pa.string())})])


def part_features(path: Path) -> list[int]:
    """The features in a part, or in the whole."""
    return pq.read_table(path, columns=["feature"])["feature"].to_pylist() if path.exists() else []


def join_parts(folder: Path, parts: Iterable[Path]) -> None:
    """Put the analyses of some parts into the folder's file, in the place of earlier ones of the same features."""
    paths = sorted(parts)
    new = pa.array([feature for path in paths for feature in part_features(path)], pa.int64())

    def tables() -> Iterator[pa.Table]:
        kept = folder / ANALYSIS_FILE
        if kept.exists():
            for batch in pq.ParquetFile(kept).iter_batches(_ROWS_TOGETHER):
                table = pa.Table.from_batches([batch])
                yield table.filter(pc.invert(pc.is_in(table["feature"], new)))  # type: ignore[attr-defined]
        for path in paths:
            yield pq.read_table(path)

    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / ANALYSIS_FILE, tables())


def read_analysis(folder: Path, index: int) -> FeatureAnalysis | None:
    """A feature's analysis from the folder in which it is kept; None where there is none.

    Raises:
        CorruptFile: the file is torn.
    """
    path = folder / ANALYSIS_FILE
    if not path.exists():
        return None
    try:
        rows = pq.read_table(path, filters=[("feature", "=", index)])["analysis"].to_pylist()
        return FeatureAnalysis.model_validate_json(rows[-1]) if rows else None
    except (OSError, ValueError, KeyError) as error:  # what pyarrow and pydantic raise are ValueErrors
        raise CorruptFile(
            f"The analyses in {ANALYSIS_FILE} cannot be read: {error}.", fix="Make them again with analyse_features."
        ) from error


def _write(path: Path, tables: Iterable[pa.Table]) -> None:
    with new_file(path) as part, pq.ParquetWriter(part, _SCHEMA, compression="zstd") as writer:
        for table in tables:
            if len(table):
                writer.write_table(table.cast(_SCHEMA), row_group_size=_ROWS_TOGETHER)
