"""A feature as the documents' `features/N.json` has it: plain data in, the exact payload out.

The payload is that of the requirements' Feature JSON, with token ids, the histogram's totals and the whole window of
each example beside what is required. It knows neither how a feature was found nor where the file goes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from mistudio_engine.api.errors import BadInput

__all__ = [
    "Activation",
    "ExportOptions",
    "FeatureExport",
    "Histogram",
    "TokenValue",
    "TopToken",
    "payload",
    "strict_json",
]


class ExportOptions(BaseModel):
    """What a zip includes, and how much of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    include_logit_lens: bool = True
    include_histograms: bool = True
    include_top_tokens: bool = True
    include_explanations: bool = True
    """Labels and categories; without, both are null in the features too."""

    include_saelens_weights: bool = True

    logit_lens_k: Annotated[int, Field(ge=1)] = 20
    """At most this many promoted and as many suppressed tokens."""

    histogram_bins: Annotated[int, Field(ge=1)] = 50
    """The histograms given must have this many bins."""

    top_tokens_k: Annotated[int, Field(ge=1)] = 50
    """At most this many top tokens."""


class TokenValue(NamedTuple):
    """A token and its logit effect."""

    token: str
    token_id: int
    value: float


class TopToken(NamedTuple):
    """A token and how the feature fires on it."""

    token: str
    token_id: int
    count: int
    mean_activation: float
    max_activation: float


class Histogram(NamedTuple):
    """Counts of the activations above zero."""

    bin_edges: Sequence[float]
    """One more than counts, ascending."""

    counts: Sequence[int]

    n_tokens: int
    """Tokens looked at, those without activation included: the documents' `total_activations`."""

    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    """These four are of the activations above zero; None where unknown."""


class Activation(NamedTuple):
    """A place in the text where the feature fires."""

    tokens: Sequence[str]
    """The window, token by token."""

    values: Sequence[float]
    """The activation on each of them."""

    position: int
    """Which of them is the prime token."""

    context_before: str | None = None
    """Readable text before the prime token; None: its tokens joined."""

    context_after: str | None = None


@dataclass(frozen=True, slots=True)
class FeatureExport:
    """All that is exported of one feature; None where nothing is known, written as null."""

    index: int
    label: str | None = None
    category: str | None = None
    activation_frequency: float | None = None
    """Share of tokens on which it fires."""

    max_activation: float | None = None
    mean_activation: float | None = None
    """Mean over the tokens on which it fires."""

    top_positive: Sequence[TokenValue] | None = None
    """Promoted tokens, strongest first."""

    top_negative: Sequence[TokenValue] | None = None
    """Suppressed tokens, strongest first; their values are negative."""

    histogram: Histogram | None = None
    top_tokens: Sequence[TopToken] | None = None
    activations: Sequence[Activation] = ()


def payload(feature: FeatureExport, options: ExportOptions) -> dict[str, Any]:
    """The content of `features/N.json`. Parts that the options leave out are absent, unknown ones are null.

    Raises:
        BadInput: a histogram with another number of bins than asked for, tokens and values of unequal length, a prime
            token outside its window.
    """
    told = options.include_explanations
    data: dict[str, Any] = {
        "feature_index": feature.index,
        "label": feature.label if told else None,
        "category": feature.category if told else None,
        "statistics": {
            "activation_frequency": feature.activation_frequency,
            "max_activation": feature.max_activation,
            "mean_activation": feature.mean_activation,
        },
    }
    if options.include_logit_lens:
        data["logit_lens"] = _logit_lens(feature, options.logit_lens_k)
    if options.include_histograms:
        data["histogram"] = _histogram(feature, options.histogram_bins)
    if options.include_top_tokens:
        top = feature.top_tokens
        data["top_tokens"] = None if top is None else [token._asdict() for token in top[: options.top_tokens_k]]
    data["activations"] = [_activation(feature, n, one) for n, one in enumerate(feature.activations)]
    return data


def _logit_lens(feature: FeatureExport, k: int) -> dict[str, Any] | None:
    if feature.top_positive is None or feature.top_negative is None:
        return None
    return {
        "top_positive": [token._asdict() for token in feature.top_positive[:k]],
        "top_negative": [token._asdict() for token in feature.top_negative[:k]],
    }


def _histogram(feature: FeatureExport, n_bins: int) -> dict[str, Any] | None:
    histogram = feature.histogram
    if histogram is None:
        return None
    n_active = int(sum(histogram.counts))
    if len(histogram.bin_edges) != len(histogram.counts) + 1 or (n_active and len(histogram.counts) != n_bins):
        raise BadInput(
            f"The histogram of feature {feature.index} has {len(histogram.counts)} bins and "
            f"{len(histogram.bin_edges)} edges; {n_bins} bins were asked for.",
            fix="Give histograms with histogram_bins bins and one edge more.",
        )
    return {
        # A feature that never fires has nothing to put into bins: the documents have a single zero here.
        "bin_edges": [float(edge) for edge in histogram.bin_edges] if n_active else [0.0],
        "counts": [int(count) for count in histogram.counts] if n_active else [0],
        "total_activations": histogram.n_tokens,
        "non_zero_count": n_active,
        "min": histogram.min,
        "max": histogram.max,
        "mean": histogram.mean,
        "std": histogram.std,
    }


def _activation(feature: FeatureExport, n: int, one: Activation) -> dict[str, Any]:
    if len(one.tokens) != len(one.values) or not 0 <= one.position < len(one.tokens):
        raise BadInput(
            f"Example {n} of feature {feature.index} has {len(one.tokens)} tokens, {len(one.values)} values and its "
            f"prime token at {one.position}.",
            fix="Give one value per token and a position among them.",
        )
    before, after = one.context_before, one.context_after
    return {
        "token": one.tokens[one.position],
        "value": float(one.values[one.position]),
        "context_before": "".join(one.tokens[: one.position]) if before is None else before,
        "context_after": "".join(one.tokens[one.position + 1 :]) if after is None else after,
        "token_index": one.position,
        "tokens": list(one.tokens),
        "values": [float(value) for value in one.values],
    }


def strict_json(data: Any, what: str, *, indent: int | None = None) -> bytes:
    """JSON that every parser reads: UTF-8, no NaN, no Infinity, no lone surrogates (they become U+FFFD).

    Raises:
        BadInput: a number that JSON cannot hold; says where in `what` it stands.
    """
    # Without indent the encoder is the one in C, several times as fast.
    separators = (",", ":") if indent is None else None
    try:
        text = json.dumps(data, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)
    except ValueError as error:
        where, value = next(_not_finite(data, what), (what, error))
        raise BadInput(
            f"{where} is {value}, which JSON cannot hold.", fix="Repair the number, or give None where it is unknown."
        ) from error
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def _not_finite(data: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(data, float) and not math.isfinite(data):
        yield where, data
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _not_finite(value, f"{where}, {key}")
    elif isinstance(data, (list, tuple)):
        for n, value in enumerate(data):
            yield from _not_finite(value, f"{where}[{n}]")
