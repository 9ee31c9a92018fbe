"""Features and their examples as one JSON document, plain or gzipped: what is known of an SAE, for other programs.

    {"format": "mistudio-features-1",
     "sae": {…}, "extraction": {…} or null, "options": {…}, "provenance": {…},
     "n_features": 128,
     "features": [
    {"index": 0, "label": …, "labels": […], "statistics": {…}, "histogram": {…}, "top_tokens": […],
     "promoted": […], "suppressed": […], "examples": [{"tokens": […], "token_ids": […], "values": […], …}], …},
    …
    ]}

`FeaturesDocument` is its schema. A feature stands on a line of its own and goes to the disk before the next is asked
for, so memory does not grow with their number, and programs may read it line by line, too. The same input gives the
same bytes. It does not know where features come from.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from mistudio_engine.api.errors import BadInput, EmptyData
from mistudio_engine.api.feature_card import FeatureCard
from mistudio_engine.api.features import Example
from mistudio_engine.api.records import Data
from mistudio_engine.export.feature_json import strict_json
from mistudio_engine.export.studio_zip import ExportedFile, ExportProgress
from mistudio_engine.saes.folders import new_file

__all__ = [
    "FORMAT",
    "ExportedExample",
    "ExportedFeature",
    "FeaturesDocument",
    "estimate_features_bytes",
    "write_features",
]

FORMAT = "mistudio-features-1"

FEATURES_PER_STEP = 8

BYTES_PER_FEATURE, BYTES_PER_EXAMPLE_TOKEN = 12_000, 24
"""As measured: a feature without its examples, and a token with its id, its value and its share of a word."""

COMPRESSION = 6
"""gzip's level; part of what makes the same bytes."""


class ExportedExample(Example):
    """An example with the ids of its tokens, so that nothing depends on how they are written."""

    token_ids: list[int]
    """As many as tokens."""

    quantile: int | None = None
    """In the quantile group: which equal part of [0, maximum] its value lies in, from 0."""


class ExportedFeature(FeatureCard):
    """A feature; what is not known, or was not asked for, is null."""

    examples: list[ExportedExample] | None = None  # type: ignore[assignment]


class FeaturesDocument(Data):
    """The whole document."""

    format: Literal["mistudio-features-1"]
    sae: dict[str, Any]
    """The SAE's slug, model, hook, sizes, architecture, origin and hash."""

    extraction: dict[str, Any] | None
    """Slug, tokens and settings of the extraction that statistics and examples are from."""

    options: dict[str, Any]
    """What was asked for."""

    provenance: dict[str, Any]
    """Versions, hashes, seed and BOS policy: what it takes to repeat it."""

    n_features: int
    features: list[ExportedFeature]


def write_features(
    path: Path,
    head: Mapping[str, Any],
    features: Iterable[Mapping[str, Any]],
    *,
    n_features: int,
    compress: bool = False,
) -> Generator[ExportProgress, None, ExportedFile]:
    """Write the document; it appears at `path` once it is whole. Closing the generator leaves nothing behind.

    Args:
        head: what stands before the features.
        features: each as it is to be written, read once.
        n_features: how many they are.
        compress: gzip it.

    Raises:
        EmptyData: no features.
        BadInput: not as many features as said, or numbers that JSON cannot hold.
        DiskFull: no space left.
    """
    if n_features < 1:
        raise EmptyData("There are no features to export.", fix="Choose features, or extract some first.")
    with new_file(path) as part, part.open("wb") as file:
        hashed = _Hashed(file)
        # Neither name nor time in gzip's header: they would make other bytes of the same content.
        packed = gzip.GzipFile("", "wb", COMPRESSION, hashed, mtime=0) if compress else None  # type: ignore[arg-type]
        out = packed or hashed
        begin = strict_json({"format": FORMAT, **head, "n_features": n_features}, "the head")
        out.write(begin[:-1] + b',"features":[')
        n = 0
        for n, feature in enumerate(features, start=1):
            out.write((b"\n" if n == 1 else b",\n") + strict_json(feature, f"feature {feature.get('index')}"))
            if n % FEATURES_PER_STEP == 0:
                yield ExportProgress(f"Writing features ({n}/{n_features})", min(n / n_features, 1.0), n)
        if n != n_features:
            raise BadInput(f"{n} features came and {n_features} were announced.", fix="Give their number.")
        out.write(b"\n]}\n")
        if packed is not None:
            packed.close()
        n_bytes = file.tell()
    return ExportedFile(path, n_bytes, hashed.sha256.hexdigest(), n_features)


def estimate_features_bytes(n_features: int, *, n_examples: int, window: int) -> int:
    """About how large the document will be before it is gzipped.

    Args:
        n_examples: of all kinds together, of each feature.
        window: tokens before and after the prime one.
    """
    return n_features * (BYTES_PER_FEATURE + n_examples * (2 * window + 1) * BYTES_PER_EXAMPLE_TOKEN)


class _Hashed:
    """A file that hashes what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
