"""How healthy a dictionary is: what is worth knowing of all its features together before one of them is trusted.

Functions of arrays that an extraction or an SAE already has. They know neither records nor where the arrays lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["DUPLICATE_ABOVE", "Duplicates", "findings", "nearest_cosines", "quantiles"]

DUPLICATE_ABOVE = 0.9
"""Two features whose decoder directions have a larger cosine say nearly the same."""

_AT_ONCE = 4096
"""Directions that the others are compared with at a time."""


class Duplicates(NamedTuple):
    """How alike decoder directions are."""

    cosine: NDArray[np.float32]
    """(n,) largest cosine of each looked-at feature with any other feature."""

    looked_at: NDArray[np.int64]
    """(n,) their indices: a sample where there are many."""


def nearest_cosines(
    rows: NDArray[np.float32], among: NDArray[np.int64], n_looked_at: int = 1024, seed: int = 0
) -> Duplicates:
    """The largest cosine of some features with any other.

    Args:
        rows: (d_sae, d_out) decoder directions of length 1.
        among: features that count, such as those that live: dead ones are alike by accident of their beginning.
        n_looked_at: features to look at, drawn at random where there are more; each is compared with all of `among`.
        seed: of the draw.
    """
    if len(among) < 2:
        return Duplicates(np.zeros(0, np.float32), np.zeros(0, np.int64))
    rng = np.random.default_rng(seed)
    places = np.arange(len(among)) if len(among) <= n_looked_at else np.sort(rng.permutation(len(among))[:n_looked_at])
    looked_at = np.ascontiguousarray(rows[among[places]])
    found = np.full(len(places), -np.inf, dtype=np.float32)
    for at in range(0, len(among), _AT_ONCE):  # the rows may be in a file, and too many for the memory
        others = among[at : at + _AT_ONCE]
        cosine = looked_at @ rows[others].T
        cosine[among[places][:, None] == others] = -np.inf
        np.maximum(found, cosine.max(axis=1), out=found)
    return Duplicates(found, among[places])


def quantiles(values: ArrayLike) -> dict[str, float] | None:
    """5, 25, 50, 75 and 95 % of the values that are numbers, and how many there are; None where there is none."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return None
    at = {f"p{p}": float(np.quantile(known, p / 100)) for p in (5, 25, 50, 75, 95)}
    return {"n": float(len(known)), "mean": float(known.mean()), **at}


def findings(numbers: Mapping[str, float | None]) -> list[str]:
    """What a reader should know, in sentences; nothing where all is well.

    Args:
        numbers: shares from 0 to 1, None or missing where one is not known: `dead` and `dense` of the features,
            `rare` of the living ones, `silent` of the tokens, `duplicates` of the looked-at features,
            `interpretability` (a median).
    """
    said = []
    for name, above, sentence in (
        ("dead", 0.1, "{:.0%} of the features never fired on these tokens."),
        ("dense", 0.02, "{:.1%} of the features fire on over a tenth of the tokens: they say little about any one."),
        ("rare", 0.3, "{:.0%} of the living fired fewer than ten times: their examples are few. Use more tokens."),
        ("silent", 0.05, "No feature fires on {:.0%} of the tokens."),
        (
            "duplicates",
            0.1,
            "{:.0%} of the features have a near twin: their decoder directions have a cosine above 0.9.",
        ),
    ):
        value = numbers.get(name)
        if value is not None and value > above:
            said.append(sentence.format(value))
    score = numbers.get("interpretability")
    if score is not None and score < 0.7:
        said.append(f"The text alone tells poorly where features fire: the median score is {score:.2f}, 0.5 is chance.")
    return said
