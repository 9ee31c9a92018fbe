"""One extraction on disk, read lazily: statistics, histograms, top tokens and examples of every feature.

    extraction.json     what was run on what, with hashes (`ExtractionInfo`); written last
    features.parquet    one row a feature: statistics, log histogram, top tokens, partners
    examples.parquet    one row an example: feature, group, context, position, value, and the feature's activations
                        in that context as (positions, values)
    contexts.arrow      token ids of the contexts that examples stand in, memory-mapped

Ids and positions are stored, never text, and windows are cut when somebody looks: tokens and values always have equal
length. It knows no tokenizer and no labels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from mistudio_engine.api.errors import BadInput, CorruptFile, NotFound
from mistudio_engine.discovery.context_store import ContextReader
from mistudio_engine.discovery.histogram import N_LOG_BINS, Histogram, linear_histogram

__all__ = [
    "CONTEXTS_FILE",
    "DENSE_ABOVE",
    "EXAMPLES_FILE",
    "FEATURES_FILE",
    "FORMAT_VERSION",
    "HASHED_AT_ONCE",
    "INFO_FILE",
    "Example",
    "ExtractionInfo",
    "ExtractionStore",
    "FeatureStats",
    "Group",
    "Partner",
    "TokenStats",
    "hashing_file",
    "load_extraction",
]

FORMAT_VERSION = 3
"""1 had no partners, 2 all contexts in one batch; both are read."""

HASHED_AT_ONCE = 16 << 20
"""Bytes to a step of hashing."""

INFO_FILE, FEATURES_FILE, EXAMPLES_FILE = "extraction.json", "features.parquet", "examples.parquet"
CONTEXTS_FILE = "contexts.arrow"

DENSE_ABOVE = 0.1
"""A feature that fires on a larger share of the tokens is called dense: it says little about any one of them."""

Group = Literal["top", "quantile", "random", "zero"]


class ExtractionInfo(BaseModel):
    """What an extraction was run on, and with what."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    created_at: float
    """Seconds since 1970."""

    model: str
    hook_name: str
    d_sae: int
    n_features: int
    """Rows: d_sae, or fewer where features were selected."""

    n_alive: int
    """Features that fired at least once."""

    n_dense: int
    """Features that fired on more than a tenth of the tokens."""

    n_tokens: int
    """Tokens looked at; all frequencies are shares of these."""

    n_contexts: int
    context_size: int
    l0: dict[str, float] = {}
    """Features active on a token: mean, p5, p50, p95, max, and `silent`, the share of tokens on which none is."""

    n_coactivation_tokens: int = 0
    """Tokens on which pairs of features were counted: a sample of all."""

    stopped_early: bool = False
    """It was told to stop: the statistics are of the tokens seen until then."""

    settings: dict[str, Any]
    """Everything that was asked for, the seed included."""

    provenance: dict[str, Any]
    """Versions and hashes of what it was made from."""

    files: dict[str, str]
    """sha256 of each file beside this one."""


@dataclass(frozen=True)
class FeatureStats:
    """Numbers of one feature. Means are over the tokens on which it is active."""

    feature: int
    n_active: int
    """Tokens on which it is active."""

    frequency: float
    """n_active / tokens looked at."""

    max: float
    mean: float
    sum: float
    undercount: int = 0
    """The most that the count of any of its top tokens may be too low; 0 where all are exact."""

    @property
    def dead(self) -> bool:
        """Never active on these tokens."""
        return self.n_active == 0

    @property
    def dense(self) -> bool:
        """Active on more than a tenth of the tokens."""
        return self.frequency > DENSE_ABOVE


@dataclass(frozen=True)
class TokenStats:
    """How a feature behaves on one token id."""

    token_id: int
    count: int
    """Tokens of this id on which it is active; up to `FeatureStats.undercount` more."""

    mean: float
    max: float


@dataclass(frozen=True)
class Partner:
    """Another feature that fires on the same tokens; all numbers are of the sampled tokens."""

    feature: int
    count: int
    """Tokens on which both fire."""

    cosine: float
    """count / √(n · n'), of the tokens on which each of the two fires: 1 is always together, 0 is never."""

    lift: float
    """count · tokens / (n · n'): 1 is what chance would make of two features that have nothing to do with another."""


@dataclass(frozen=True)
class Example:
    """A window of a context, with a feature's activation on each of its tokens."""

    feature: int
    group: Group
    context: int
    """Number of the packed context."""

    position: int
    """Position of the prime token **in the context**: where the feature is strongest; in a zero example, the middle."""

    value: float
    """Activation at the prime token; 0 in a zero example."""

    quantile: int | None
    """In the quantile group: which fifth (or whichever part) of [0, maximum] the value lies in, from 0."""

    start: int
    """Where the window begins in the context."""

    token_ids: NDArray[np.int32]
    """(n,)"""

    values: NDArray[np.float32]
    """(n,) activations; 0 at tokens that were left out of the extraction: nobody knows what they would have been."""

    n_left_out: int = 0
    """Tokens at the beginning that were left out because of their place."""

    left_out_ids: tuple[int, ...] = ()
    """Ids that were left out wherever they stand. Special tokens are not among them: their tokenizer knows those."""

    @property
    def counted(self) -> NDArray[np.bool_]:
        """(n,) False at tokens that were left out, which are neither silent nor firing."""
        if self.left_out_ids:
            counted = ~np.isin(self.token_ids, self.left_out_ids)
        else:
            counted = np.ones(len(self.token_ids), dtype=bool)
        counted[: self.n_left_out] = False
        return counted

    @property
    def prime(self) -> int:
        """Index of the prime token in the window."""
        return self.position - self.start


class ExtractionStore:
    """One extraction. Open it with `load_extraction`.

    Attributes:
        folder: where it lies.
        info: what was run.
    """

    def __init__(self, folder: Path, info: ExtractionInfo) -> None:
        self.folder, self.info = folder, info
        # The row group read last of each file: features are mostly asked for in order.
        self._features_part: tuple[int, pa.Table] | None = None
        self._examples_part: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return self.info.n_features

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """(n_features,) which feature each row is of; 0 … d_sae − 1 unless features were selected."""
        return self.column("feature")

    @property
    def n_active(self) -> NDArray[np.int64]:
        """(n_features,) tokens on which each feature is active."""
        return self.column("n_active")

    @property
    def frequency(self) -> NDArray[np.float64]:
        """(n_features,) share of tokens on which each feature is active."""
        return self.column("frequency")

    @property
    def max(self) -> NDArray[np.float32]:
        """(n_features,) largest activation."""
        return self.column("max")

    @property
    def mean(self) -> NDArray[np.float64]:
        """(n_features,) mean activation where active; 0 for dead features."""
        return self.column("mean")

    def column(self, name: str) -> NDArray:
        """A number a feature, for all features: feature, n_active, frequency, max, mean, sum, undercount.

        Raises:
            BadInput: there is no such column.
        """
        if name not in self._columns:
            known = [field.name for field in self._features.schema_arrow if not pa.types.is_nested(field.type)]
            if name not in known:
                raise BadInput(f"An extraction has no column {name!r}.", fix=f"It has {', '.join(known)}.")
            self._columns[name] = self._features.read(columns=[name]).column(0).to_numpy()
            self._columns[name].flags.writeable = False
        return self._columns[name]

    def feature(self, index: int) -> FeatureStats:
        """Statistics of one feature.

        Raises:
            NotFound: the extraction does not cover it.
        """
        row = self._row(index)
        return FeatureStats(
            feature=index,
            n_active=int(self.n_active[row]),
            frequency=float(self.frequency[row]),
            max=float(self.max[row]),
            mean=float(self.mean[row]),
            sum=float(self.column("sum")[row]),
            undercount=int(self.column("undercount")[row]),
        )

    def log_histogram(self, index: int) -> NDArray[np.int64]:
        """(N_LOG_BINS,) exact counts between `histogram.LOG_EDGES`."""
        stored = self._feature_row(index)
        counts = np.zeros(N_LOG_BINS, dtype=np.int64)
        part = np.asarray(stored["histogram_counts"], dtype=np.int64)
        counts[stored["histogram_first"] : stored["histogram_first"] + len(part)] = part
        return counts

    def histogram(self, index: int, n_bins: int = 50) -> Histogram:
        """Linear histogram of [0, maximum] over the active tokens; see `linear_histogram` for how exact it is."""
        return linear_histogram(self.log_histogram(index), self.feature(index).max, n_bins)

    def top_tokens(self, index: int, *, by: Literal["count", "mean", "max"] = "count", n: int = 50) -> list[TokenStats]:
        """The tokens on which a feature fires most often, or most strongly.

        `n` up to the extraction's `n_top_tokens`. `FeatureStats.undercount` says by how much a count may be too low.
        """
        stored = self._feature_row(index)
        columns = (stored["token_ids"], stored["token_counts"], stored["token_means"], stored["token_maxima"])
        tokens = [TokenStats(*row) for row in zip(*columns, strict=True)]
        return sorted(tokens, key=lambda token: (-getattr(token, by), token.token_id))[:n]

    def partners(self, index: int, n: int = 20) -> list[Partner]:
        """The features that fire together with one most, by falling cosine; up to the extraction's `n_partners`.

        Raises:
            NotFound: the extraction does not cover the feature, or was made before partners were counted.
        """
        if self.info.format_version < 2:
            raise NotFound("This extraction counted no pairs of features.", fix="Extract again.")
        stored = self._feature_row(index)
        n_sampled = self.column("n_sampled")
        found = []
        for other, count in zip(stored["partners"][:n], stored["partner_counts"][:n], strict=True):
            product = float(stored["n_sampled"]) * float(n_sampled[self._row(other)])
            lift = count * self.info.n_coactivation_tokens / product
            found.append(Partner(other, count, count / math.sqrt(product), lift))
        return found

    def examples(
        self, index: int, group: Group | None = None, *, window: int | tuple[int, int] | None = None
    ) -> list[Example]:
        """Examples of one feature: top by falling value, quantiles from the highest, then random, then zero.

        Args:
            index: the feature.
            group: only these.
            window: tokens before and after the prime token, one number or two; None shows the whole context.

        Raises:
            NotFound: the extraction does not cover the feature.
            BadInput: there is no such group.
        """
        if group is not None and group not in get_args(Group):
            raise BadInput(f"There is no group of examples {group!r}.", fix=f"Use one of {', '.join(get_args(Group))}.")
        row = self._row(index)
        rows = self._example_rows(row)
        return [self._example(index, row, window) for row in rows if group is None or row["group"] == group]

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            CorruptFile: one differs.
        """
        for name, expected in self.info.files.items():
            with (self.folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise CorruptFile(
                    f"{self.folder / name} is not the file that was written.",
                    why="Its sha256 differs from the one in extraction.json.",
                    fix="Run the extraction again.",
                )

    def _example(self, index: int, row: dict[str, Any], window: int | tuple[int, int] | None) -> Example:
        ids = self._contexts.ids(row["context"])
        values = np.zeros(len(ids), dtype=np.float32)
        values[row["active_positions"]] = row["active_values"]
        start, stop = 0, len(ids)
        if window is not None:
            before, after = (window, window) if isinstance(window, int) else window
            start, stop = max(0, row["position"] - before), min(len(ids), row["position"] + after + 1)
        return Example(
            feature=index,
            group=row["group"],
            context=row["context"],
            position=row["position"],
            value=row["value"],
            quantile=row["quantile"],
            start=start,
            token_ids=ids[start:stop],
            values=values[start:stop],
            n_left_out=max(0, int(self.info.settings.get("exclude_first", 0)) - start),
            left_out_ids=tuple(self.info.settings.get("exclude_token_ids", ())),
        )

    def _row(self, index: int) -> int:
        at = int(np.searchsorted(self.indices, index))
        if at == len(self.indices) or self.indices[at] != index:
            covered = "were selected" if self.info.n_features < self.info.d_sae else "exist, counted from 0"
            raise NotFound(
                f"The extraction has no feature {index}.",
                why=f"{self.info.n_features} features {covered}.",
                fix=f"Use an index between {self.indices[0]} and {self.indices[-1]}.",
            )
        return at

    @cached_property
    def _columns(self) -> dict[str, NDArray]:
        return {}

    @cached_property
    def _features(self) -> pq.ParquetFile:
        return _open_parquet(self.folder / FEATURES_FILE)

    @cached_property
    def _examples(self) -> pq.ParquetFile:
        return _open_parquet(self.folder / EXAMPLES_FILE)

    def _feature_row(self, index: int) -> dict[str, Any]:
        # Every row group but the last has as many features as the first.
        part, row = divmod(self._row(index), self._features.metadata.row_group(0).num_rows)
        if self._features_part is None or self._features_part[0] != part:
            self._features_part = (part, self._features.read_row_group(part))
        return self._features_part[1].slice(row, 1).to_pylist()[0]

    def _example_rows(self, row: int) -> list[dict[str, Any]]:
        begin, end = self._example_offsets[row : row + 2]
        if begin == end:
            return []
        # A feature's examples are all in one row group.
        part = int(np.searchsorted(self._part_offsets, begin, side="right")) - 1
        if self._examples_part is None or self._examples_part[0] != part:
            self._examples_part = (part, self._examples.read_row_group(part))
        return self._examples_part[1].slice(begin - self._part_offsets[part], end - begin).to_pylist()

    @cached_property
    def _example_offsets(self) -> NDArray[np.int64]:
        return np.append(0, np.cumsum(self.column("n_examples")))

    @cached_property
    def _part_offsets(self) -> NDArray[np.int64]:
        groups = self._examples.metadata
        return np.cumsum([0, *(groups.row_group(part).num_rows for part in range(groups.num_row_groups))])

    @cached_property
    def _contexts(self) -> ContextReader:
        path = self.folder / CONTEXTS_FILE
        try:
            return ContextReader(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise _corrupt(path, error) from error


def load_extraction(folder: Path | str) -> ExtractionStore:
    """Open an extraction.

    Raises:
        NotFound: there is none in this folder.
        CorruptFile: a file is missing, torn, or of a newer version.
    """
    folder = Path(folder)
    path = folder / INFO_FILE
    if not path.is_file():
        raise NotFound(f"There is no extraction in {folder}.", why=f"{INFO_FILE} is missing.", fix="Run extract first.")
    try:
        info = ExtractionInfo.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise _corrupt(path, error.errors()[0]["msg"]) from error
    if info.format_version > FORMAT_VERSION:
        raise CorruptFile(
            f"{path} has format {info.format_version} and this version reads up to {FORMAT_VERSION}.",
            fix="Use the miStudio that wrote it, or a newer one.",
        )
    for name in info.files:
        if not (folder / name).is_file():
            raise _corrupt(folder / name, "the file is missing")
    store = ExtractionStore(folder, info)
    if store._features.metadata.num_rows != info.n_features:
        raise _corrupt(folder / FEATURES_FILE, f"{info.n_features} rows were expected")
    return store


def hashing_file(path: Path) -> Generator[None, None, str]:
    """The sha256 of a file, in small steps."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASHED_AT_ONCE):
            digest.update(block)
            yield
    return digest.hexdigest()


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, reason: object) -> CorruptFile:
    return CorruptFile(f"{path} cannot be read: {reason}.", fix="Run the extraction again.")
