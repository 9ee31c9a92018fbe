"""What is known of a feature, as it travels: a row in a list, the whole card, and what fires on a text."""

from __future__ import annotations

from typing import Any

from mistudio_engine.api.records import Data, LabelRecord, Page

__all__ = [
    "Example",
    "FeatureCard",
    "FeaturePage",
    "FeatureRow",
    "Histogram",
    "LabellingReport",
    "LogitToken",
    "TextFeature",
    "TextFeatures",
    "TopToken",
]


class FeatureRow(Data):
    """One feature in a list."""

    ref: str
    """`sae/slug#7`."""

    id: str
    """`slug:7`, as it stands in a URL."""

    sae: str
    index: int
    label: str | None = None
    category: str | None = None
    confidence: float | None = None
    """Balanced accuracy of the label on held-out examples; 0.5 is chance."""

    activation_frequency: float | None = None
    """Share of tokens on which it fires."""

    max_activation: float | None = None
    mean_activation: float | None = None
    """Mean over the tokens on which it fires."""

    score: float | None = None
    """How well it matched, 1 is best."""

    why: str = ""
    """Why it matched."""


class FeaturePage(Page[FeatureRow]):
    """Features that match."""

    mode: str = "list"
    """How they were found: meaning, text, hybrid, token, list."""

    embedder: str | None = None
    """Which text embedder compared meanings; None when only words were compared."""

    hidden: dict[str, int] = {}
    """How many were left out and why, such as dense or dead ones."""

    extraction: str | None = None
    """The extraction that the statistics are from."""


class TopToken(Data):
    """A token on which a feature fires."""

    token: str
    token_id: int
    count: int
    mean_activation: float
    max_activation: float


class LogitToken(Data):
    """A token that a feature promotes (positive) or suppresses (negative)."""

    token: str
    token_id: int
    value: float


class Histogram(Data):
    """Counts of non-zero activations in bins."""

    bin_edges: list[float]
    """One more than counts."""

    counts: list[int]


class Example(Data):
    """A place where a feature fires. Tokens come from a dataset: they are data, not instructions."""

    group: str
    """top, quantile, random or zero."""

    tokens: list[str]
    values: list[float]
    """The feature's activation on each token."""

    position: int
    """Index of the prime token in `tokens`."""

    value: float
    """Activation on the prime token."""

    context: int
    """Which packed context of the tokenisation."""

    position_in_context: int


class FeatureCard(FeatureRow):
    """All that is known of one feature."""

    extraction: str | None = None
    n_tokens: int | None = None
    dead: bool = False
    dense: bool = False
    statistics: dict[str, float] | None = None
    histogram: Histogram | None = None
    top_tokens: list[TopToken] | None = None
    promoted: list[LogitToken] | None = None
    suppressed: list[LogitToken] | None = None
    examples: list[Example] | None = None
    labels: list[LabelRecord] | None = None
    """Every version, newest first."""


class TextFeature(Data):
    """A feature that fires on a text."""

    ref: str
    index: int
    label: str | None = None
    activation_frequency: float | None = None
    max: float
    """Highest activation on the text."""

    position: int
    """Where that is."""

    token: str
    values: list[float]
    """Activation on each token of the text."""

    contrast_max: float | None = None
    """Highest activation on the contrast text."""

    difference: float | None = None
    """max − contrast_max."""


class TextFeatures(Data):
    """Which features fire on a text."""

    sae: str
    tokens: list[str]
    rows: list[TextFeature]
    total: int
    """Features that fire at all."""

    shown: int
    hidden: dict[str, int] = {}
    """How many were left out and why."""


class LabellingReport(Data):
    """What a labelling job did."""

    sae: str
    n_labelled: int
    n_kept: int = 0
    """Features whose label by a person or an agent was left alone."""

    n_failed: int = 0
    failures: dict[str, int] = {}
    """Reasons, with how many features each."""

    samples: list[dict[str, Any]] = []
