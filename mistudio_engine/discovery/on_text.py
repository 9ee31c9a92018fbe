"""Which features fire on a text, where they peak, and what a contrast text has less of.

One forward pass a text, and only the activations that are above zero are looked at. Dense features fire on nearly every
text and say little about this one: whoever knows which those are has them left out, and counted. It knows no labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mistudio_engine.api.errors import BadInput, EmptyData, WrongShape
from mistudio_engine.discovery.activation_block import run_starts, sparse_acts, stable_order
from mistudio_engine.models.hooks import activations, check_width

if TYPE_CHECKING:
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.saes.base import SAE

__all__ = ["FeatureOnText", "FeaturesOnText", "features_on_text"]


class FeatureOnText(NamedTuple):
    """One feature on the text."""

    feature: int
    max: float
    """Largest activation on the text; may be 0 where only the contrast text is asked about."""

    position: int
    """Token on which it is reached; the earliest of equals."""

    values: NDArray[np.float32]
    """(n_tokens,) activation on each token; 0 on special ones, which do not count."""

    contrast_max: float | None
    """Largest activation on the contrast text; None without one."""

    @property
    def difference(self) -> float | None:
        """max − contrast_max; above 0 where the text has more of it."""
        return None if self.contrast_max is None else self.max - self.contrast_max


class FeaturesOnText(NamedTuple):
    """What fires on a text."""

    token_ids: list[int]
    """With BOS in front where the model has one."""

    tokens: list[str]
    """(n_tokens,) as a person reads them."""

    features: list[FeatureOnText]
    """By falling maximum; with a contrast text by falling difference, so what the contrast has more of comes last."""

    n_active: int
    """Features that fire on the text at all, those left out included."""

    left_out: dict[str, int]
    """Of those, how many were left out, by reason."""


class _Acts(NamedTuple):
    """A text's activations above zero, ordered by feature, then by position."""

    ids: list[int]
    feature: NDArray[np.int64]
    position: NDArray[np.int64]
    value: NDArray[np.float32]

    def peaks(self, d_sae: int) -> NDArray[np.float32]:
        """(d_sae,) largest activation of each feature."""
        peaks = np.zeros(d_sae, np.float32)
        starts = run_starts(self.feature)
        if len(starts):
            peaks[self.feature[starts]] = np.maximum.reduceat(self.value, starts)
        return peaks

    def of(self, feature: int) -> NDArray[np.float32]:
        """(n_tokens,) activations of one feature."""
        begin, end = np.searchsorted(self.feature, [feature, feature + 1])
        values = np.zeros(len(self.ids), np.float32)
        values[self.position[begin:end]] = self.value[begin:end]
        return values


@torch.no_grad()
def features_on_text(
    lm: LanguageModel,
    sae: SAE,
    hook_name: str,
    text: str,
    contrast_text: str | None = None,
    k: int = 20,
    *,
    leave_out: Mapping[str, ArrayLike] | None = None,
) -> FeaturesOnText:
    """The k features that fire most on `text`, or that differ most from `contrast_text`.

    Args:
        lm: the language model.
        sae: reads the activations at `hook_name`.
        hook_name: where the SAE reads.
        text: at most as many tokens as the model's context.
        contrast_text: a text to compare with; the difference of maxima is what is ranked then, by its size.
        k: features to return.
        leave_out: by reason, (d_sae,) bool of the features that are not shown; each is counted for the first reason.

    Raises:
        EmptyData: a text has no token.
        BadInput: a text is longer than the context, k is below 1, or an activation is not finite.
        UnknownHook, WrongShape: the hook is not the model's, or a width does not fit.
    """
    if k < 1:
        raise BadInput(f"k is {k}.", fix="Ask for at least one feature.")
    check_width(lm, hook_name, sae.cfg.d_in)
    d_sae = sae.cfg.d_sae
    acts = _acts(lm, sae, hook_name, text)
    peak = acts.peaks(d_sae)
    contrast = None if contrast_text is None else _acts(lm, sae, hook_name, contrast_text).peaks(d_sae)
    score = peak if contrast is None else peak - contrast
    fires = peak > 0
    shown = fires if contrast is None else fires | (contrast > 0)
    counted, left_out = fires.copy(), {}
    for reason, mask in (leave_out or {}).items():
        out = np.asarray(mask, bool)
        if out.shape != (d_sae,):
            raise WrongShape(f"What is {reason} has the shape {out.shape}; there are {d_sae} features.")
        if n_out := int((counted & out).sum()):
            left_out[reason] = n_out
        counted &= ~out
        shown = shown & ~out
    candidates = np.flatnonzero(shown)
    best = candidates[np.argsort(-np.abs(score[candidates]), kind="stable")[:k]]
    best = best[np.argsort(-score[best], kind="stable")]
    found = []
    for feature in best.tolist():
        values = acts.of(feature)
        contrast_max = None if contrast is None else float(contrast[feature])
        found.append(FeatureOnText(feature, float(peak[feature]), int(values.argmax()), values, contrast_max))
    return FeaturesOnText(acts.ids, lm.token_strings(acts.ids), found, int(fires.sum()), left_out)


def _acts(lm: LanguageModel, sae: SAE, hook_name: str, text: str) -> _Acts:
    """What fires on the tokens that are not special."""
    ids = lm.encode(text, bos=True)
    counted = torch.tensor([at for at, each in enumerate(ids) if each not in lm.special_ids], dtype=torch.long)
    if not len(counted):
        raise EmptyData("The text has no tokens.", why=f"It is {text[:40]!r}.", fix="Give at least one word.")
    x = activations(lm, torch.tensor([ids]), [hook_name])[hook_name][0]
    row, feature, value = sparse_acts(sae, x[counted.to(x.device)].to(sae.device))
    position = counted.numpy()[row]
    order = stable_order(feature * np.int64(len(ids)) + position, sae.cfg.d_sae * len(ids))
    return _Acts(ids, feature[order], position[order], value[order])
