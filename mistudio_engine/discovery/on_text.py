"""Which features fire on a text, where they peak, and what a contrast text has less of.

One forward pass a text. Dense features fire on nearly every text and say little about this one: they are left out when
their frequencies are known, and counted. It knows no labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mistudio_engine.api.errors import BadInput, EmptyData, WrongShape
from mistudio_engine.discovery.extraction_store import DENSE_ABOVE
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

    values: NDArray
    """(n_tokens,) float32 activation on each token; 0 on special ones, which do not count."""

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
    """Features that fire on the text at all, those hidden included."""

    n_dense_hidden: int
    """Of those, how many were left out because they are dense."""


@torch.no_grad()
def features_on_text(
    lm: LanguageModel,
    sae: SAE,
    hook_name: str,
    text: str,
    contrast_text: str | None = None,
    k: int = 20,
    *,
    frequency: ArrayLike | None = None,
    dense_above: float = DENSE_ABOVE,
) -> FeaturesOnText:
    """The k features that fire most on `text`, or that differ most from `contrast_text`.

    Args:
        lm: the language model.
        sae: reads the activations at `hook_name`.
        hook_name: where the SAE reads.
        text: at most as many tokens as the model's context.
        contrast_text: a text to compare with; the difference of maxima is what is ranked then, by its size.
        k: features to return.
        frequency: (d_sae,) share of tokens on which each feature fires, from an extraction; None hides nothing.
        dense_above: features above this frequency are hidden and counted.

    Raises:
        EmptyData: a text has no token.
        BadInput: a text is longer than the context, or k is below 1.
        UnknownHook, WrongShape: the hook is not the model's, or a width does not fit.
    """
    if k < 1:
        raise BadInput(f"k is {k}.", fix="Ask for at least one feature.")
    check_width(lm, hook_name, sae.cfg.d_in)
    ids, acts = _acts(lm, sae, hook_name, text)
    peak, position = acts.max(dim=0)  # (d_sae,); the earliest of equals
    score = peak
    contrast = None
    if contrast_text is not None:
        contrast = _acts(lm, sae, hook_name, contrast_text)[1].amax(dim=0)
        score = peak - contrast
    fires = peak > 0
    shown = fires if contrast is None else fires | (contrast > 0)
    n_hidden = 0
    if frequency is not None:
        dense = torch.as_tensor(frequency, device=acts.device) > dense_above
        if dense.shape != peak.shape:
            raise WrongShape(f"There are {len(dense)} frequencies for {len(peak)} features.")
        n_hidden = int((fires & dense).sum())
        shown = shown & ~dense
    candidates = torch.nonzero(shown).squeeze(1)
    best = candidates[torch.argsort(score[candidates].abs(), descending=True, stable=True)[:k]]
    best = best[torch.argsort(score[best], descending=True, stable=True)].tolist()
    found = [
        FeatureOnText(
            feature=f,
            max=float(peak[f]),
            position=int(position[f]),
            values=acts[:, f].cpu().numpy(),
            contrast_max=None if contrast is None else float(contrast[f]),
        )
        for f in best
    ]
    return FeaturesOnText(ids, lm.token_strings(ids), found, int(fires.sum()), n_hidden)


def _acts(lm: LanguageModel, sae: SAE, hook_name: str, text: str) -> tuple[list[int], Tensor]:
    """Token ids, and feature activations (n_tokens, d_sae) in fp32 with 0 on special tokens."""
    ids = lm.encode(text, bos=True)
    counts = torch.tensor([i not in lm.special_ids for i in ids], dtype=torch.bool)
    if not counts.any():
        raise EmptyData("The text has no tokens.", why=f"It is {text[:40]!r}.", fix="Give at least one word.")
    x = activations(lm, torch.tensor([ids]), [hook_name])[hook_name][0]
    acts = sae.encode(x.to(sae.device)).float()
    return ids, acts * counts.to(acts)[:, None]
