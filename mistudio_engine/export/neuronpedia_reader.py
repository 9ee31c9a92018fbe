"""Reads what Neuronpedia has published of an SAE: features, explanations and activations as gzipped lines of JSON.

    {modelId}/{sourceId}/features/batch-N.jsonl.gz       statistics
                         explanations/batch-N.jsonl.gz   labels
                         activations/batch-N.jsonl.gz    examples

The files are other people's and are taken as hostile: sizes are bounded before anything is unpacked or parsed, a line
that is not what it should be is refused with a reason and the others go on, and text is made plain. It knows neither
where the files come from nor what becomes of them.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike

from mistudio_engine.api.errors import BadInput, CorruptFile, WrongShape

__all__ = [
    "KINDS",
    "Fidelity",
    "FileName",
    "Identity",
    "Kind",
    "PublishedExample",
    "PublishedExplanation",
    "PublishedFeature",
    "Refused",
    "check_identity",
    "fidelity",
    "model_names",
    "parse_file_name",
    "read_examples",
    "read_explanations",
    "read_features",
]

Kind = Literal["features", "explanations", "activations"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_LINE_BYTES = 4 << 20
"""A feature with its vector and histograms takes about 50 KB."""

MAX_LINES = 1_000_000
MAX_UNPACKED_BYTES = 4 << 30
MAX_RATIO, FREE_BYTES = 200, 64 << 20
"""Text packs to a tenth; what unpacks to 200 times its size, beyond the first 64 MiB, is a bomb."""

MAX_LABEL, MAX_TOKENS, MAX_TOKEN, MAX_NAME = 300, 4096, 512, 64
"""Characters of a label, tokens of an example, characters of a token and of a name."""

_FILE = re.compile(r"(features|explanations|activations)/batch-(\d{1,6})\.jsonl\.gz")

_ALIASES = {"gpt2": "gpt2-small"}
"""Models that Neuronpedia calls otherwise than their makers."""

T = TypeVar("T")


class FileName(NamedTuple):
    """One file of the tree."""

    kind: Kind
    batch: int

    @property
    def path(self) -> str:
        """Within the source's folder."""
        return f"{self.kind}/batch-{self.batch}.jsonl.gz"


class Identity(NamedTuple):
    """What a row says that it is of."""

    model_id: str
    """Such as `gpt2-small`."""

    source_id: str
    """`{layer}-{set}`, such as `8-res-jb`; the files call it layer."""

    @property
    def layer(self) -> int | None:
        """The number in front of the set; None where there is none."""
        match = re.match(r"(\d{1,4})-", self.source_id)
        return int(match[1]) if match else None


class PublishedFeature(NamedTuple):
    """Statistics of one feature."""

    index: int
    of: Identity
    max: float | None
    """maxActApprox, in units of unit decoder rows."""

    frequency: float | None
    """frac_nonzero, a share of tokens."""

    hook_name: str | None


class PublishedExplanation(NamedTuple):
    """A label."""

    index: int
    of: Identity
    label: str
    author: str
    """authorId, or the author's name."""

    method: str
    """Type and model that explained, such as `oai_token-act-pair/gpt-4o-mini`."""

    scores: dict[str, float]
    """scoreV1 and scoreV2, where there are any."""

    id: str


class PublishedExample(NamedTuple):
    """A text on which a feature fires."""

    index: int
    of: Identity
    tokens: list[str]
    values: list[float]
    position: int
    """Where the value is largest."""

    bin_min: float | None
    """The interval of activations that it stands for; -1 for the strongest ones."""

    bin_max: float | None
    bin_contains: float | None
    """Share of all tokens in that interval."""


class Refused(NamedTuple):
    """A line that cannot be used."""

    reason: str


class Fidelity(NamedTuple):
    """How well published statistics fit ours."""

    n: int
    """Features compared: those that are alive in both."""

    max_correlation: float | None
    """Spearman's rank correlation of the maxima: 1 is the same order, 0 none; None below ten features."""

    frequency_correlation: float | None
    verdict: Literal["matches", "doubtful", "differs", "unknown"]
    """matches from 0.8 in both, differs below 0.4 in either; unknown where there is too little to compare."""


def parse_file_name(path: str) -> FileName | None:
    """`features/batch-3.jsonl.gz` taken apart; None for any other name."""
    match = _FILE.fullmatch(path)
    return FileName(match[1], int(match[2])) if match else None  # type: ignore[arg-type]


def read_features(path: Path) -> Iterator[tuple[float, PublishedFeature | Refused]]:
    """Each feature, or why it cannot be used, with the share of the file that is read.

    Raises:
        CorruptFile: the file is torn, a bomb, or has lines beyond all reason.
    """
    return _rows(path, _feature)


def read_explanations(path: Path) -> Iterator[tuple[float, PublishedExplanation | Refused]]:
    """Each explanation; as `read_features`."""
    return _rows(path, _explanation)


def read_examples(path: Path) -> Iterator[tuple[float, PublishedExample | Refused]]:
    """Each activation; as `read_features`."""
    return _rows(path, _example)


def model_names(*names: str | None) -> set[str]:
    """What Neuronpedia may call a model that is known by these names."""
    plain = {name.rpartition("/")[2].lower() for name in names if name}
    return plain | {_ALIASES[name] for name in plain if name in _ALIASES}


def check_identity(
    found: Identity,
    *,
    expected: Identity | None,
    models: set[str],
    layer: int | None,
    hook_name: str | None = None,
    published_hook: str | None = None,
) -> None:
    """Refuse published data that is not of our SAE.

    Args:
        found: what the files say.
        expected: what was asked for; None takes what the files say.
        models: names that the SAE's model has; empty to take any.
        layer: of the SAE; None if it is not known.
        hook_name: of the SAE.
        published_hook: what the files say, where they do.

    Raises:
        WrongShape: another source, model, layer or hook.
    """
    if expected is not None and found != expected:
        raise WrongShape(
            f"The files are of {'/'.join(found)} and {'/'.join(expected)} was asked for.",
            fix="Ask for the source that they are of.",
        )
    if models and found.model_id not in models:
        raise WrongShape(
            f"The published features are of {found.model_id!r} and the SAE's model is {' or '.join(sorted(models))}.",
            fix="Use the SAE that they are of; if it is this one under another name, set check_model=false.",
        )
    if layer is not None and found.layer is not None and found.layer != layer:
        raise WrongShape(
            f"{found.source_id!r} is of layer {found.layer} and the SAE reads layer {layer}.",
            fix="Use the source of that layer.",
        )
    if hook_name and published_hook and published_hook != hook_name:
        raise WrongShape(
            f"The published features are of {published_hook} and the SAE reads {hook_name}.",
            fix="Use the SAE that they are of.",
        )


def fidelity(published_max: ArrayLike, our_max: ArrayLike, published_freq: ArrayLike, our_freq: ArrayLike) -> Fidelity:
    """Do published statistics rank features as ours do? All (n,); what is not known is NaN.

    Ranks, because the tokens differ. Both maxima are for decoder rows of length 1: in other units they rank otherwise.

    Raises:
        BadInput: the lengths differ.
    """
    columns = [np.asarray(each, dtype=np.float64) for each in (published_max, our_max, published_freq, our_freq)]
    if len({len(each) for each in columns}) != 1:
        raise BadInput("Published and own statistics differ in length.", fix="Give the same features.")
    alive = np.all([np.isfinite(each) & (each > 0) for each in columns], axis=0)
    n = int(alive.sum())
    if n < 10:
        return Fidelity(n, None, None, "unknown")
    maxima, frequencies = (_spearman(one[alive], other[alive]) for one, other in (columns[:2], columns[2:]))
    worst = min(maxima, frequencies)
    return Fidelity(n, maxima, frequencies, "matches" if worst >= 0.8 else "doubtful" if worst >= 0.4 else "differs")


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    ranks = [_mid_ranks(values) for values in (one, other)]
    centred = [each - each.mean() for each in ranks]
    norms = math.prod(float(np.linalg.norm(each)) for each in centred)
    return float(centred[0] @ centred[1]) / norms if norms else 0.0


def _mid_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _rows(path: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[tuple[float, T | Refused]]:
    n_packed = max(1, path.stat().st_size)
    for share, line in _lines(path, n_packed):
        if line is None:
            yield share, Refused("longer than any line should be")
            continue
        try:
            row = json.loads(line)
            yield share, parse(row) if isinstance(row, dict) else Refused("not a JSON object")
        except _Unusable as error:
            yield share, Refused(str(error))
        except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError, too
            yield share, Refused("not JSON")


def _lines(path: Path, n_packed: int) -> Iterator[tuple[float, bytes | None]]:
    """The lines of a gzipped file, None for one that is too long, within the bounds above."""
    n_bytes = n_lines = 0
    bound = min(MAX_UNPACKED_BYTES, max(FREE_BYTES, MAX_RATIO * n_packed))
    too_long = False
    try:
        with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as file:
            while line := file.readline(MAX_LINE_BYTES):
                n_bytes += len(line)
                n_lines += 1
                if n_bytes > bound or n_lines > MAX_LINES:
                    raise _corrupt(
                        path, f"it unpacks to more than {min(n_bytes, bound):,} bytes or {MAX_LINES:,} lines"
                    )
                ended = line.endswith(b"\n")
                if len(line) == MAX_LINE_BYTES and not ended:
                    too_long = True  # its rest follows
                    continue
                if too_long:
                    too_long = False
                    yield packed.tell() / n_packed, None
                elif line.strip():
                    yield packed.tell() / n_packed, line
            if too_long:
                yield 1.0, None
    except (OSError, EOFError, zlib.error) as error:
        raise _corrupt(path, str(error) or "it ends too soon") from error


def _corrupt(path: Path, why: str) -> CorruptFile:
    return CorruptFile(
        f"{path.name} is not a file of lines as Neuronpedia publishes them: {why}.",
        fix="Fetch it again, or leave it out.",
    )


class _Unusable(Exception):
    """Why a row cannot be used."""


def _feature(row: dict[str, Any]) -> PublishedFeature:
    hook_name = row.get("hookName")
    return PublishedFeature(
        index=_index(row),
        of=_identity(row),
        max=_number(row, "maxActApprox"),
        frequency=_number(row, "frac_nonzero"),
        hook_name=_name(hook_name) if isinstance(hook_name, str) and hook_name else None,
    )


def _explanation(row: dict[str, Any]) -> PublishedExplanation:
    label = _plain(row.get("description"))
    if not label:
        raise _Unusable("no description")
    author = row.get("authorId") or row.get("authorName") or row.get("author")
    how = [
        _name(row[key]) for key in ("typeName", "explanationModelName") if isinstance(row.get(key), str) and row[key]
    ]
    scores = {key: _number(row, key) for key in ("scoreV1", "scoreV2")}
    return PublishedExplanation(
        index=_index(row),
        of=_identity(row),
        label=label,
        author=_name(author) if isinstance(author, str) and author else "unknown",
        method="/".join(how) or "unknown",
        scores={key: value for key, value in scores.items() if value is not None},
        id=_name(row["id"]) if isinstance(row.get("id"), str) else "",
    )


def _example(row: dict[str, Any]) -> PublishedExample:
    tokens, values = row.get("tokens"), row.get("values")
    if not isinstance(tokens, list) or not isinstance(values, list) or not 0 < len(tokens) == len(values) <= MAX_TOKENS:
        raise _Unusable(f"not 1 to {MAX_TOKENS} tokens with a value each")
    if not all(isinstance(token, str) and len(token) <= MAX_TOKEN for token in tokens):
        raise _Unusable("a token is not a short text")
    numbers = [_finite(value) for value in values]
    if None in numbers:
        raise _Unusable("a value is not a number")
    activations = [value for value in numbers if value is not None]
    return PublishedExample(
        index=_index(row),
        of=_identity(row),
        tokens=[_whole(token) for token in tokens],
        values=activations,
        position=activations.index(max(activations)),
        bin_min=_number(row, "binMin"),
        bin_max=_number(row, "binMax"),
        bin_contains=_number(row, "binContains"),
    )


def _index(row: dict[str, Any]) -> int:
    index = row.get("index")
    if isinstance(index, str) and index.isascii() and index.isdigit() and len(index) <= 9:
        return int(index)
    if type(index) is int and 0 <= index < 10**9:
        return index
    raise _Unusable("its index is not a number from 0 on")


def _identity(row: dict[str, Any]) -> Identity:
    model_id, source_id = row.get("modelId"), row.get("layer")
    if not (isinstance(model_id, str) and isinstance(source_id, str) and 0 < len(model_id) + len(source_id) <= 200):
        raise _Unusable("it does not say which model and source it is of")
    return Identity(_name(model_id), _name(source_id))


def _number(row: dict[str, Any], key: str) -> float | None:
    return None if row.get(key) is None else _finite(row[key])


def _finite(value: Any) -> float | None:
    """The number as a float that float32 can hold, else None."""
    if type(value) not in (int, float):
        return None
    return float(value) if -3e38 < value < 3e38 else None


def _name(text: str) -> str:
    """A name as plain characters: letters, digits, dots, dashes and the like."""
    return re.sub(r"[^A-Za-z0-9._/@:-]", "_", text[:MAX_NAME])


def _plain(text: Any) -> str:
    """A label as one line of printable text; "" for what is none. Control and bidirectional marks become spaces."""
    if not isinstance(text, str):
        return ""
    text = "".join(character if character.isprintable() else " " for character in _whole(text[: 4 * MAX_LABEL]))
    return " ".join(text.split())[:MAX_LABEL].strip()


def _whole(text: str) -> str:
    """Text with lone surrogates replaced: neither UTF-8 nor a parquet file can hold them."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
