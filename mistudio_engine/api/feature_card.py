"""All that is known of one feature, as it travels."""

from __future__ import annotations

from mistudio_engine.api.ablation import FeatureAblation
from mistudio_engine.api.analysis import FeatureAnalysis
from mistudio_engine.api.features import Example, FeatureRow, Histogram, LogitToken, Neighbour, Partner, TopToken
from mistudio_engine.api.records import LabelRecord

__all__ = ["FeatureCard"]


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
    logit_histogram: Histogram | None = None
    """Its effects on the logits of all tokens."""

    partners: list[Partner] | None = None
    """Features that fire together with it most."""

    examples: list[Example] | None = None
    labels: list[LabelRecord] | None = None
    """Every version, newest first."""

    analysis: FeatureAnalysis | None = None
    """What the words that it fires on have in common; only where it was asked for."""

    neighbours: list[Neighbour] | None = None
    """Features with the most alike and the most opposite decoder directions; only where they were asked for."""

    ablation: FeatureAblation | None = None
    """What its latest ablation found; only where it was asked for and there was one."""
