"""The health of a dictionary, as it travels."""

from __future__ import annotations

from mistudio_engine.api.records import Data

__all__ = ["DictionaryHealth"]


class DictionaryHealth(Data):
    """What is known of all features of an SAE together. Quantiles are n, mean, p5, p25, p50, p75 and p95."""

    sae: str
    extraction: str
    """The extraction that the numbers are from."""

    n_tokens: int
    n_features: int
    n_alive: int
    n_dead: int
    """Features that never fired on these tokens."""

    n_dense: int
    """Features that fire on a larger share of the tokens than `dense_above`."""

    dense_above: float
    n_rare: int
    """Features that fired, but fewer than ten times."""

    l0: dict[str, float] = {}
    """Features active on a token: mean, p5, p50, p95, max, and `silent`, the share of tokens on which none is."""

    density_histogram: list[int]
    """How many features fire how often, in 32 bins: bin i has −8 + i/4 ≤ log10(share of tokens) < −8 + (i + 1)/4, the
    first also what is rarer, the last what always fires. The dead are in none of them."""

    interpretability: dict[str, float] | None = None
    """Quantiles of how well the text alone tells where a feature fires: 1 is always, 0.5 is chance."""

    n_labelled: int = 0
    confidence: dict[str, float] | None = None
    """Quantiles of the labels' confidence."""

    nearest_cosine: dict[str, float] | None = None
    """Quantiles of each feature's largest decoder cosine with another living one."""

    n_compared: int = 0
    """Features that this was measured of: a sample where there are many."""

    n_near_duplicates: int = 0
    """Of those, how many have a cosine above 0.9 with another."""

    findings: list[str] = []
    """What to know before trusting it, in sentences; empty where all is well."""
