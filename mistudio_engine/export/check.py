"""Does a zip hold what the documents say it must? Structure, names, payloads and their agreement with each other.

A zip may come from anywhere: nothing is unpacked, sizes are capped before anything is read, JSON is strict.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from mistudio_engine.api.errors import CorruptFile
from mistudio_engine.export.schema import Feature, Metadata

__all__ = ["ZipReport", "check_zip"]

M = TypeVar("M", bound=BaseModel)

MAX_JSON_BYTES = 64 << 20
"""No JSON of ours comes near: more is a bomb."""

NAMES = re.compile(
    r"metadata\.json|README\.md|features/(?P<index>0|[1-9][0-9]{0,9})\.json|explanations/explanations\.json"
    r"|saelens/(cfg\.json|sae_weights\.safetensors)"
)


class ZipReport(NamedTuple):
    """What a good zip holds."""

    n_features: int
    n_labelled: int
    n_examples: int
    includes: dict[str, bool]
    n_bytes: int


def check_zip(path: Path) -> ZipReport:
    """Read a whole zip and compare it with the documents' schema.

    Raises:
        CorruptFile: names the entry and what is wrong with it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _checked(archive, path.stat().st_size)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise CorruptFile(f"{path.name} is not a whole zip: {error}.", fix="Export again.") from error


def _checked(archive: zipfile.ZipFile, n_bytes: int) -> ZipReport:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        _refuse("the zip", "holds two entries of one name")
    for name, entry in entries.items():
        if not NAMES.fullmatch(name):
            _refuse(name, "does not belong into this zip")
        if not stat.S_ISREG(entry.external_attr >> 16) or entry.flag_bits & 1:
            _refuse(name, "is not a plain file")
        is_weights = name == "saelens/sae_weights.safetensors"
        if entry.compress_type != zipfile.ZIP_STORED if is_weights else entry.file_size > MAX_JSON_BYTES:
            _refuse(name, f"would unpack to {entry.file_size} bytes")
    if damaged := archive.testzip():
        _refuse(damaged, "has a wrong checksum")
    if "README.md" not in entries:
        _refuse("README.md", "is missing")
    metadata = _parse(Metadata, "metadata.json", _json(archive, "metadata.json"))
    features = sorted(int(match["index"]) for name in entries if (match := NAMES.fullmatch(name)) and match["index"])
    if len(features) != metadata.feature_count:
        _refuse("metadata.json", f"counts {metadata.feature_count} features and there are {len(features)}")
    if features and features[-1] >= metadata.d_sae:
        _refuse(f"features/{features[-1]}.json", f"lies beyond d_sae = {metadata.d_sae}")
    labels: dict[str, str | None] = {}
    n_examples = 0
    for index in features:
        feature = _check_feature(archive, index, metadata)
        labels[str(index)] = feature.label
        n_examples += len(feature.activations)
    _check_explanations(archive, entries, labels, metadata)
    _check_weights(archive, entries, metadata)
    n_labelled = sum(label is not None for label in labels.values())
    return ZipReport(len(features), n_labelled, n_examples, metadata.includes.model_dump(), n_bytes)


def _check_feature(archive: zipfile.ZipFile, index: int, metadata: Metadata) -> Feature:
    name = f"features/{index}.json"
    data = _json(archive, name)
    feature = _parse(Feature, name, data)
    if feature.feature_index != index:
        _refuse(name, f"is of feature {feature.feature_index}")
    for key, included in (
        ("logit_lens", metadata.includes.logit_lens),
        ("histogram", metadata.includes.histograms),
        ("top_tokens", metadata.includes.top_tokens),
    ):
        if (key in data) != included:
            _refuse(name, f"{'lacks' if included else 'has'} {key}, which metadata.json says is {included}")
    if not metadata.includes.explanations and (feature.label is not None or feature.category is not None):
        _refuse(name, "has a label though explanations are left out")
    _check_histogram(name, feature, metadata.settings.histogram_bins)
    if lens := feature.logit_lens:
        _check_sorted(name, "logit_lens", [t.value for t in lens.top_positive], metadata.settings.logit_lens_k)
        _check_sorted(name, "logit_lens", [-t.value for t in lens.top_negative], metadata.settings.logit_lens_k)
    if len(feature.top_tokens or ()) > metadata.settings.top_tokens_k:
        _refuse(name, f"has more than {metadata.settings.top_tokens_k} top tokens")
    for n, one in enumerate(feature.activations):
        if len(one.tokens) != len(one.values) or one.token_index >= len(one.tokens):
            _refuse(name, f"has {len(one.tokens)} tokens and {len(one.values)} values in activation {n}")
        if one.token != one.tokens[one.token_index] or one.value != one.values[one.token_index]:
            _refuse(name, f"names another prime token than it marks in activation {n}")
    return feature


def _check_histogram(name: str, feature: Feature, n_bins: int) -> None:
    histogram = feature.histogram
    if histogram is None:
        return
    edges, counts = histogram.bin_edges, histogram.counts
    if sum(counts) != histogram.non_zero_count or histogram.non_zero_count > histogram.total_activations:
        _refuse(name, "counts other activations in its histogram than it says there are")
    if histogram.non_zero_count == 0:
        if (edges, counts) != ([0.0], [0]):
            _refuse(name, "never fires and has a histogram with bins")
    elif len(counts) != n_bins or len(edges) != n_bins + 1 or sorted(edges) != edges:
        _refuse(name, f"has {len(counts)} bins and {len(edges)} edges where {n_bins} bins in order were asked for")


def _check_sorted(name: str, what: str, strengths: list[float], k: int) -> None:
    if len(strengths) > k:
        _refuse(name, f"has more than {k} tokens in {what}")
    if sorted(strengths, reverse=True) != strengths:
        _refuse(name, f"does not have the strongest tokens first in {what}")


def _check_explanations(
    archive: zipfile.ZipFile, entries: Mapping[str, Any], labels: Mapping[str, str | None], metadata: Metadata
) -> None:
    name = "explanations/explanations.json"
    if (name in entries) != metadata.includes.explanations:
        _refuse(name, f"is {'there' if name in entries else 'missing'}, against metadata.json")
    if metadata.includes.explanations and _json(archive, name) != dict(labels):
        _refuse(name, "has other labels than the features")


def _check_weights(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], metadata: Metadata) -> None:
    cfg_name, weights_name = "saelens/cfg.json", "saelens/sae_weights.safetensors"
    for name in (cfg_name, weights_name):
        if (name in entries) != metadata.includes.saelens_weights:
            _refuse(name, f"is {'there' if name in entries else 'missing'}, against metadata.json")
    if not metadata.includes.saelens_weights:
        return
    cfg = _json(archive, cfg_name)
    if not isinstance(cfg, dict) or (cfg.get("d_in"), cfg.get("d_sae")) != (metadata.d_in, metadata.d_sae):
        _refuse(cfg_name, f"is of another size than metadata.json's {metadata.d_in} → {metadata.d_sae}")
    with archive.open(weights_name) as weights:
        n_header = struct.unpack("<Q", weights.read(8).ljust(8, b"\0"))[0]
        if n_header > min(MAX_JSON_BYTES, entries[weights_name].file_size - 8):
            _refuse(weights_name, "is torn")
        header = _strict(weights_name, weights.read(n_header))
    shapes = {name: tensor.get("shape") for name, tensor in header.items() if name != "__metadata__"}
    ends = [tensor.get("data_offsets", [0, -1])[1] for name, tensor in header.items() if name != "__metadata__"]
    if max(ends, default=0) + 8 + n_header != entries[weights_name].file_size:
        _refuse(weights_name, "is torn")
    if shapes.get("W_enc") != [metadata.d_in, metadata.d_sae] or (shapes.get("W_dec") or [0])[0] != metadata.d_sae:
        _refuse(weights_name, f"has tensors of another size than metadata.json's {metadata.d_in} → {metadata.d_sae}")


def _json(archive: zipfile.ZipFile, name: str) -> Any:
    try:
        entry = archive.getinfo(name)
    except KeyError:
        _refuse(name, "is missing")
    return _strict(name, archive.read(entry))


def _strict(name: str, data: bytes) -> Any:
    def refuse_constant(constant: str) -> NoReturn:
        _refuse(name, f"holds {constant}, which is not JSON")

    def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            _refuse(name, "has a key twice")
        return dict(pairs)

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refuse_constant(number)

    try:
        text = data.decode()
        found = json.loads(text, parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=refuse_repeated)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptFile(f"{name} is not JSON: {error}.", fix="Export again.") from error
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            _refuse(name, "holds half a surrogate pair")
    return found


def _parse(kind: type[M], name: str, data: Any) -> M:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptFile(
            f"{name} does not follow the documents' schema: {where}: {first['msg']}.",
            why=f"{error.error_count()} places differ.",
            fix="Export again.",
        ) from error


def _refuse(name: str, what: str) -> NoReturn:
    raise CorruptFile(f"{name} {what}.", fix="Export again.")
