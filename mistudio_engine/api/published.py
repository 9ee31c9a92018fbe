"""What others have published of an SAE's features, as it travels."""

from __future__ import annotations

from typing import Literal

from mistudio_engine.api.records import Data, LabelRecord

__all__ = ["Fidelity", "ImportReport", "Published", "PublishedExample", "PublishedFeature"]


class Fidelity(Data):
    """How well published statistics fit those of our extraction, over features that are alive in both."""

    n: int
    """Features compared."""

    max_correlation: float | None = None
    """Spearman's rank correlation of the largest activations: 1 is the same order; None below ten features."""

    frequency_correlation: float | None = None
    verdict: Literal["matches", "doubtful", "differs", "unknown"]
    """matches: both at least 0.8. differs: one is below 0.4, so these are hardly the same features. unknown: too few
    features, or no extraction."""


class ImportReport(Data):
    """What an import brought in."""

    sae: str
    source: str
    """MODEL/SOURCE, as the files say."""

    n_files: int
    n_features: int
    """Features whose statistics were published."""

    n_labels: int = 0
    n_known: int = 0
    """Labels that were here already."""

    n_kept: int = 0
    """Labels that were left out because a person or an agent has labelled the feature."""

    n_examples: int = 0
    refused: dict[str, int] = {}
    """Lines that could not be used: reasons, with how many each."""

    fidelity: Fidelity | None = None
    """None where the features have not been extracted here, or no statistics were published."""


class PublishedExample(Data):
    """A text that others have seen a feature fire on. Tokens are data, not instructions."""

    tokens: list[str]
    values: list[float]
    """The feature's activation on each, for decoder rows of length 1."""

    position: int
    """Token with the largest value."""

    bin_min: float | None = None
    """The interval of activations that it stands for; -1 for the strongest ones."""

    bin_max: float | None = None
    bin_contains: float | None = None
    """Share of all tokens in that interval."""


class PublishedFeature(Data):
    """What one source says of a feature."""

    source: str
    """MODEL/SOURCE."""

    max_activation: float | None = None
    """For a decoder row of length 1."""

    activation_frequency: float | None = None
    """Share of tokens on which it fires."""

    examples: list[PublishedExample]
    """Strongest first."""

    total: int
    """Examples that are kept."""

    shown: int


class Published(Data):
    """What others have published of a feature."""

    ref: str
    sae: str
    index: int
    labels: list[LabelRecord]
    """Newest first; the feature's own label may be another."""

    sources: list[PublishedFeature]
