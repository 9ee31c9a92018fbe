"""The documents' zip: one JSON a feature, the labels, the weights as a SAELens folder.

    metadata.json
    README.md
    features/N.json
    explanations/explanations.json
    saelens/cfg.json
    saelens/sae_weights.safetensors

Features come from an iterator and go to the disk one by one. The same input gives the same bytes: dates are the
extraction's, order and permissions are fixed, and no name inside derives from anybody's text. Nothing at Neuronpedia
reads this zip; that tree is neuronpedia.py's. It does not know SQL, extractions or jobs.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound
from mistudio_engine.export.feature_json import ExportOptions, FeatureExport, payload, strict_json
from mistudio_engine.saes.folders import new_file

__all__ = ["WEIGHT_FILES", "ExportProgress", "ExportedFile", "SAEFacts", "estimate_bytes", "write_zip"]

WEIGHT_FILES = ("cfg.json", "sae_weights.safetensors")
"""What of a SAELens folder goes into the zip."""

CHUNK = 4 << 20
FEATURES_PER_STEP = 8


@dataclass(frozen=True)
class SAEFacts:
    """What metadata.json says of the SAE."""

    sae_id: str
    sae_name: str
    model_name: str
    layer: int | None
    d_in: int
    d_sae: int
    architecture: str
    export_date: datetime
    """The extraction's date, not today's: the same export twice is the same bytes."""

    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, hashes, seed, BOS policy: whatever it takes to repeat the extraction."""


class ExportProgress(NamedTuple):
    """One step of writing."""

    stage: str
    """What is being done, in a few words."""

    fraction: float
    """Share done, 0 to 1."""

    n_features: int
    """Features written so far."""


class ExportedFile(NamedTuple):
    """The finished zip."""

    path: Path
    n_bytes: int
    sha256: str
    n_features: int


def write_zip(
    path: Path,
    about: SAEFacts,
    features: Iterable[FeatureExport],
    *,
    n_features: int,
    options: ExportOptions | None = None,
    saelens_folder: Path | None = None,
) -> Generator[ExportProgress, None, ExportedFile]:
    """Write the zip; it appears at `path` once it is whole. Closing the generator leaves nothing behind.

    Args:
        features: in ascending order of index, read once.
        n_features: how many they are.
        saelens_folder: holds the WEIGHT_FILES; needed when they are included.

    Raises:
        EmptyData: no features.
        BadInput: features out of order or not as many as said, numbers that JSON cannot hold, a payload that does not
            fit the options.
        NotFound: the weights are to be included and are not there.
        DiskFull: no space left.
    """
    options = options or ExportOptions()
    weights = _weights(saelens_folder) if options.include_saelens_weights else []
    if n_features < 1:
        raise EmptyData("There are no features to export.", fix="Choose features, or extract some first.")
    return _write(path, about, features, n_features, options, weights)


def _weights(folder: Path | None) -> list[Path]:
    files = [folder / name for name in WEIGHT_FILES] if folder else []
    missing = [file.name for file in files if not file.is_file()] if folder else list(WEIGHT_FILES)
    if missing:
        raise NotFound(
            f"The SAE's {' and '.join(missing)} cannot be found.",
            fix="Save the SAE as a SAELens folder first, or export with include_saelens_weights=False.",
        )
    return files


def _write(
    path: Path,
    about: SAEFacts,
    features: Iterable[FeatureExport],
    n_features: int,
    options: ExportOptions,
    weights: list[Path],
) -> Generator[ExportProgress, None, ExportedFile]:
    date = about.export_date.astimezone(UTC)
    weight_bytes = sum(file.stat().st_size for file in weights)
    with new_file(path) as part, part.open("wb+") as file:
        with zipfile.ZipFile(file, "w") as archive:
            metadata = _metadata(about, n_features, options)
            _add(archive, "metadata.json", strict_json(metadata, "metadata", indent=2), date)
            _add(archive, "README.md", _readme(metadata).encode(errors="replace"), date)
            labels: dict[str, str | None] = {}
            for n, feature in enumerate(_ascending(features), start=1):
                if n > n_features:
                    raise BadInput(f"More than the {n_features} features announced came.", fix="Give their number.")
                data = strict_json(payload(feature, options), f"feature {feature.index}")
                _add(archive, f"features/{feature.index}.json", data, date)
                labels[str(feature.index)] = feature.label
                if n % FEATURES_PER_STEP == 0 or n == n_features:
                    yield ExportProgress(f"Writing features ({n}/{n_features})", 0.8 * n / n_features, n)
            if len(labels) != n_features:
                raise BadInput(f"{len(labels)} of {n_features} features announced came.", fix="Give their number.")
            if options.include_explanations:
                data = strict_json(labels, "explanations", indent=2)
                _add(archive, "explanations/explanations.json", data, date)
            n_copied = 0
            for source in weights:
                for n_bytes in _copy(archive, source, f"saelens/{source.name}", date):
                    n_copied += n_bytes
                    yield ExportProgress("Copying weights", 0.8 + 0.15 * n_copied / weight_bytes, n_features)
        file.flush()
        n_bytes, sha256 = part.stat().st_size, hashlib.sha256()
        file.seek(0)
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            yield ExportProgress("Hashing", 0.95 + 0.05 * file.tell() / n_bytes, n_features)
    return ExportedFile(path, n_bytes, sha256.hexdigest(), n_features)


def _ascending(features: Iterable[FeatureExport]) -> Iterator[FeatureExport]:
    last = -1
    for feature in features:
        if feature.index <= last:
            raise BadInput(
                f"Feature {feature.index} came after feature {last}.",
                fix="Give features in ascending order, each once.",
            )
        last = feature.index
        yield feature


def _entry(name: str, date: datetime) -> zipfile.ZipInfo:
    """A zip entry that depends on its name and the export's date alone."""
    # The format begins in 1980 and knows no seconds but even ones.
    stamp = max(date, datetime(1980, 1, 1, tzinfo=UTC))
    entry = zipfile.ZipInfo(name, (stamp.year, stamp.month, stamp.day, stamp.hour, stamp.minute, stamp.second // 2 * 2))
    entry.create_system = 3  # Unix, whatever this runs on
    entry.external_attr = 0o100644 << 16
    return entry


def _add(archive: zipfile.ZipFile, name: str, data: bytes, date: datetime) -> None:
    archive.writestr(_entry(name, date), data, zipfile.ZIP_DEFLATED, 6)


def _copy(archive: zipfile.ZipFile, source: Path, name: str, date: datetime) -> Iterator[int]:
    """Copy a file piece by piece, uncompressed: weights are noise to a compressor. Yields bytes copied."""
    entry = _entry(name, date)
    entry.file_size = source.stat().st_size  # tells zipfile whether the entry needs 64-bit sizes
    with source.open("rb") as read, archive.open(entry, "w") as write:
        while chunk := read.read(CHUNK):
            write.write(chunk)
            yield len(chunk)


def _metadata(about: SAEFacts, n_features: int, options: ExportOptions) -> dict[str, Any]:
    return {
        "sae_id": about.sae_id,
        "sae_name": about.sae_name,
        "model_name": about.model_name,
        "layer": about.layer,
        "d_in": about.d_in,
        "d_sae": about.d_sae,
        "architecture": about.architecture,
        "export_date": about.export_date.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "feature_count": n_features,
        "includes": {
            "logit_lens": options.include_logit_lens,
            "histograms": options.include_histograms,
            "top_tokens": options.include_top_tokens,
            "explanations": options.include_explanations,
            "saelens_weights": options.include_saelens_weights,
        },
        "settings": {
            "logit_lens_k": options.logit_lens_k,
            "histogram_bins": options.histogram_bins,
            "top_tokens_k": options.top_tokens_k,
        },
        "provenance": dict(about.provenance),
    }


def _readme(metadata: Mapping[str, Any]) -> str:
    def line(value: Any) -> str:
        return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())

    included = metadata["includes"]
    parts = [
        "- `features/N.json`: statistics and examples"
        + "".join(
            f", {name.replace('_', ' ')}" for name in ("logit_lens", "histograms", "top_tokens") if included[name]
        ),
        *(["- `explanations/explanations.json`: the label of each feature"] if included["explanations"] else []),
        *(["- `saelens/`: the weights, for SAELens and miStudio"] if included["saelens_weights"] else []),
    ]
    return f"""# {line(metadata["sae_name"])}

Features of a sparse autoencoder, exported by miStudio.

- **Model:** {line(metadata["model_name"])}
- **Layer:** {"unknown" if metadata["layer"] is None else metadata["layer"]}
- **Dimensions:** {metadata["d_in"]} → {metadata["d_sae"]}
- **Architecture:** {line(metadata["architecture"])}
- **Date of the extraction:** {metadata["export_date"]}
- **Features:** {metadata["feature_count"]}

## Contents

- `metadata.json`: the SAE, what this export includes, how to repeat it
{chr(10).join(parts)}

Each value of an example's `values` is the feature's activation on the token at the same place of `tokens`, and
`token_index` is the place of the token that the example is about. What is not known is `null`.
"""


BYTES_PER_FEATURE = 270
"""A file's two headers in the zip, a feature's label and statistics."""

BYTES_PER_LOGIT, BYTES_PER_BIN, BYTES_PER_TOP_TOKEN, BYTES_PER_EXAMPLE_TOKEN = 19, 13, 33, 4
"""Compressed. Measured on stories with one token in ten active; 3 bytes with one in fifty, 13 with all."""


def estimate_bytes(
    n_features: int,
    options: ExportOptions,
    *,
    weight_bytes: int,
    n_examples: int = 20,
    window_tokens: int = 64,
) -> int:
    """About how large the zip will be, from counts alone.

    Args:
        weight_bytes: of the SAE's weights, which go in uncompressed.
        n_examples: examples per feature.
        window_tokens: tokens per example.
    """
    per_feature = BYTES_PER_FEATURE + n_examples * window_tokens * BYTES_PER_EXAMPLE_TOKEN
    per_feature += 2 * options.logit_lens_k * BYTES_PER_LOGIT * options.include_logit_lens
    per_feature += options.histogram_bins * BYTES_PER_BIN * options.include_histograms
    per_feature += options.top_tokens_k * BYTES_PER_TOP_TOKEN * options.include_top_tokens
    return n_features * per_feature + weight_bytes * options.include_saelens_weights
