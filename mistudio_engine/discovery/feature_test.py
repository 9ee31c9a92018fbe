"""Where one feature fires on given texts, and how well that fits what somebody expected.

A description of a feature is a claim that can be tested: write texts that should make it fire and texts that should
not, and look. It knows neither labels nor extractions.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mistudio_engine.api.errors import BadInput, EmptyData
from mistudio_engine.discovery.activation_block import check_finite
from mistudio_engine.discovery.scores import Confusion, auroc, confusion
from mistudio_engine.models.hooks import activations, check_width

if TYPE_CHECKING:
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.saes.base import SAE

__all__ = ["OnText", "Verdict", "feature_on_texts", "verdict"]

_STEP_TOKENS = 2048
"""Tokens of one forward pass, padding included, unless a single text has more."""


class OnText(NamedTuple):
    """A feature on one text."""

    token_ids: list[int]
    """With BOS in front where the model has one."""

    values: NDArray[np.float32]
    """(n_tokens,) activation on each; 0 on special tokens, which do not count."""

    max: float
    position: int
    """Token on which the maximum is reached, the earliest of equals; where it never fires, the first that counts."""


class Verdict(NamedTuple):
    """How well the feature's maxima on texts tell those expected to make it fire from the others."""

    n: int
    n_expected: int
    auroc: float | None
    """1 separates perfectly, 0.5 is chance; None when all or none were expected to fire."""

    confusion: Confusion
    """Of "it fired" as a forecast of "it was expected to"."""


@torch.no_grad()
def feature_on_texts(
    lm: LanguageModel, sae: SAE, hook_name: str, feature: int, texts: Sequence[str]
) -> Generator[int, Any, list[OnText]]:
    """The feature on each text; a generator of forward passes that yields how many texts are done.

    Args:
        lm: the language model.
        sae: reads the activations at `hook_name`.
        hook_name: where the SAE reads.
        feature: index, from 0 to d_sae − 1.
        texts: each at most as many tokens as the model's context.

    Raises:
        EmptyData: there are no texts, or one has no token.
        BadInput: a text is longer than the context, or the model overflows on it.
        UnknownHook, WrongShape: the hook is not the model's, or a width does not fit.
    """
    check_width(lm, hook_name, sae.cfg.d_in)
    if not texts:
        raise EmptyData("There is no text to test a feature on.", fix="Give at least one.")
    encoded = [_ids(lm, text, n) for n, text in enumerate(texts)]
    wanted = torch.tensor([feature], device=sae.device)
    found: dict[int, OnText] = {}
    for batch in _batches([len(ids) for ids in encoded]):
        width = max(len(encoded[each]) for each in batch)
        # Causal attention never looks at the padding behind a text.
        ids = torch.tensor([encoded[each] + [0] * (width - len(encoded[each])) for each in batch])
        x = activations(lm, ids, [hook_name])[hook_name]
        acts = sae.feature_acts(x.to(sae.device), wanted)[..., 0].float().cpu()  # (rows, n_tokens)
        for row, each in enumerate(batch):
            counts = np.array([token not in lm.special_ids for token in encoded[each]])
            check_finite("An activation", x[row, : len(counts)][torch.from_numpy(counts).to(x.device)])
            values = np.where(counts, acts[row, : len(counts)].numpy(), np.float32(0))
            position = int(np.argmax(np.where(counts, values, -1.0)))
            found[each] = OnText(encoded[each], values, float(values[position]), position)
        yield len(found)
    return [found[each] for each in range(len(texts))]


def verdict(maxima: Sequence[float], fired: Sequence[bool], expected: Sequence[bool]) -> Verdict:
    """How well a feature's maxima, and whether it fired, fit what was expected of each text.

    Raises:
        BadInput: the three differ in length.
    """
    if not len(maxima) == len(fired) == len(expected):
        raise BadInput(
            f"There are {len(expected)} expectations for {len(maxima)} texts.", fix="Give one for each text."
        )
    n_expected = sum(expected)
    area = auroc(maxima, expected) if 0 < n_expected < len(expected) else None
    return Verdict(len(maxima), n_expected, area, confusion(fired, expected))


def _ids(lm: LanguageModel, text: str, n: int) -> list[int]:
    ids = lm.encode(text, bos=True)
    if all(token in lm.special_ids for token in ids):
        raise EmptyData(f"Text {n} has no tokens.", why=f"It is {text[:40]!r}.", fix="Give at least one word.")
    if len(ids) > lm.n_ctx:
        raise BadInput(
            f"Text {n} has {len(ids)} tokens and {lm.name} takes at most {lm.n_ctx}.", fix="Give a shorter text."
        )
    return ids


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices, texts of like length together, `_STEP_TOKENS` at most with their padding."""
    batches: list[list[int]] = []
    for each in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[each] <= _STEP_TOKENS:
            batches[-1].append(each)
        else:
            batches.append([each])
    return batches
