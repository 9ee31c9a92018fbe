"""Passages in which a feature is silent: random ones, ones where its decoder neighbours fire, ones of similar text.

An extraction stores each example's activations for that example's feature only, so whether another feature is silent in
it is not known from there. A pool of held-out contexts is therefore run through the model once, for all features at
once; what fires where in it is known, and negatives are taken from nothing else. It knows no judges and no labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_engine.discovery.activation_block import sparse_acts
from mistudio_engine.discovery.labelling.labeller import is_held_out
from mistudio_engine.discovery.labelling.passages import Copies, NegativeKind, Passage
from mistudio_engine.models.hooks import activations
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens
from mistudio_engine.saes.base import SAE

__all__ = ["Firing", "Pool", "RareWords", "decoder_neighbours", "firing", "negatives", "pool_contexts"]

_WIDTH = 1024
"""Numbers in a vector of rare words."""

_PER_NEIGHBOUR = 3
"""Passages of one neighbour before the next one's turn."""


class Firing(NamedTuple):
    """Which features fire in which passages: one entry a pair, no pair twice."""

    feature: NDArray[np.int64]
    context: NDArray[np.int64]
    number: NDArray[np.int64]
    """Of the passage in its context: it begins at number · window."""


def pool_contexts(n_contexts: int, n: int, seed: int = 0) -> NDArray[np.int64]:
    """At most n held-out contexts of `n_contexts`, chosen at random and sorted."""
    chosen: list[int] = []
    for context in np.random.default_rng(seed).permutation(n_contexts).tolist():
        if len(chosen) == n:
            break
        if is_held_out(context):
            chosen.append(context)
    return np.array(sorted(chosen), dtype=np.int64)


def firing(
    lm: LanguageModel, sae: SAE, hook_name: str, tokens: PackedTokens, contexts: NDArray[np.int64], window: int
) -> Firing:
    """One forward pass: which features are above 0 on a token of each passage. Special tokens do not count."""
    rows = torch.from_numpy(contexts)
    mask = tokens.mask(rows, special=False)  # (n, context_size)
    acts = activations(lm, tokens.ids[rows], [hook_name])[hook_name]
    x = acts[mask.to(acts.device)].to(sae.device)  # (n_counted, d_in)
    with torch.no_grad():
        token, feature, _ = sparse_acts(sae, x)
    place = torch.nonzero(mask.reshape(-1)).squeeze(1).numpy()[token]
    row, position = np.divmod(place, tokens.info.context_size)
    entries = np.unique(np.stack([feature, contexts[row], position // window]), axis=1)
    return Firing(*entries)


class Pool:
    """Passages of `window` tokens, side by side in held-out contexts, with what fires in each.

    Args:
        tokens: the packed contexts.
        contexts: those that were looked at, sorted.
        window: tokens in a passage; what is left at the end of a context is left out.
        parts: `firing` of all of them.

    Attributes:
        context: (n_passages,) number of the packed context.
        start: (n_passages,) where the passage begins in it.
    """

    def __init__(self, tokens: PackedTokens, contexts: NDArray[np.int64], window: int, parts: Iterable[Firing]) -> None:
        self.tokens, self.window = tokens, window
        n_passages = tokens.n_real.numpy()[contexts] // window
        first = np.cumsum(n_passages) - n_passages
        self.context = np.repeat(contexts, n_passages)
        self.start = window * (np.arange(len(self.context)) - np.repeat(first, n_passages))
        feature, context, number = (np.concatenate(column) for column in zip(*parts, strict=True))
        row = np.searchsorted(contexts, context)
        whole = number < n_passages[row]
        feature, passage = feature[whole], (first[row] + number)[whole]
        order = np.argsort(feature, kind="stable")
        self._feature, self._passage = feature[order], passage[order]

    def __len__(self) -> int:
        return len(self.context)

    def with_feature(self, feature: int) -> NDArray[np.int64]:
        """Passages in which a feature fires."""
        begin, end = np.searchsorted(self._feature, [feature, feature + 1])
        return self._passage[begin:end]

    def passage(self, number: int, kind: NegativeKind) -> Passage:
        """One of them, for a feature that is silent in it."""
        start = int(self.start[number])
        ids = self.tokens.ids[int(self.context[number]), : start + self.window].numpy()
        return Passage(int(self.context[number]), start, ids, np.zeros(self.window, dtype=np.float32), kind)

    def token_ids(self, numbers: Iterable[int]) -> list[NDArray[np.int32]]:
        """(window,) ids of each of these passages."""
        return [self.passage(number, "random").token_ids for number in numbers]


def negatives(
    pool: Pool,
    feature: int,
    shown: Sequence[Passage],
    n: int,
    kinds: Sequence[NegativeKind],
    *,
    neighbours: Sequence[int] = (),
    likeness: NDArray[np.float32] | None = None,
    copies: Copies | None = None,
    seed: int = 0,
) -> list[Passage]:
    """At most n passages in which the feature is silent, in equal parts of each kind; random ones fill up.

    Args:
        pool: what they are taken from.
        feature: is above 0 on none of their tokens.
        shown: passages that they must not overlap.
        kinds: random; decoder: one of the `neighbours` fires there; similar: with the largest `likeness`.
        neighbours: features, the nearest first.
        likeness: (len(pool),) of each passage to those in which the feature fires; NaN where it is not known.
        copies: what must not come again, whether it was shown with the feature or without.
    """
    copies = copies or Copies()
    generator = np.random.default_rng([seed, feature, 1])
    free = np.ones(len(pool), dtype=bool)
    free[pool.with_feature(feature)] = False
    for passage in shown:
        free &= (pool.context != passage.context) | (np.abs(pool.start - passage.start) >= pool.window)
    chosen: list[Passage] = []

    def take(numbers: Iterable[int], kind: NegativeKind, at_most: int) -> None:
        for number in numbers:
            if at_most <= 0 or len(chosen) == n:
                return
            if free[number]:
                free[number] = False
                passage = pool.passage(number, kind)
                if copies.take(passage):
                    chosen.append(passage)
                    at_most -= 1

    share = -(-n // max(1, len(kinds)))
    if "decoder" in kinds:
        take(_firing_in_turn(pool, neighbours, free, generator), "decoder", share)
    if "similar" in kinds and likeness is not None:
        numbers = np.flatnonzero(~np.isnan(likeness))
        take(numbers[np.argsort(-likeness[numbers], kind="stable")].tolist(), "similar", share)
    if "random" in kinds:
        take(generator.permutation(np.flatnonzero(free)).tolist(), "random", n)
    return chosen


def _firing_in_turn(
    pool: Pool, neighbours: Sequence[int], free: NDArray[np.bool_], generator: np.random.Generator
) -> Iterable[int]:
    """A few passages of each neighbour, the nearest first, and then the rest in the same order."""
    shuffled = [
        generator.permutation(numbers[free[numbers]]).tolist() for numbers in map(pool.with_feature, neighbours)
    ]
    for part in (slice(None, _PER_NEIGHBOUR), slice(_PER_NEIGHBOUR, None)):
        for numbers in shuffled:
            yield from numbers[part]


def decoder_neighbours(W_dec: Tensor, features: Sequence[int], k: int) -> NDArray[np.int64]:
    """(len(features), k) the other features whose decoder directions have the largest cosine, the nearest first."""
    directions = torch.nn.functional.normalize(W_dec.detach().float(), dim=1)  # (d_sae, d_in)
    wanted = torch.tensor(list(features), device=directions.device)
    cosine = directions[wanted] @ directions.T
    cosine[torch.arange(len(wanted)), wanted] = -torch.inf
    return cosine.topk(min(k, len(directions) - 1), dim=1).indices.cpu().numpy()


class RareWords:
    """Passages as vectors whose dot product grows with the rare words that they share: tf-idf without the counts.

    Words are hashed to `_WIDTH` signed places (Weinberger et al. 2009), so that a vector is short whatever the
    vocabulary; different words meet in a place now and then, and cancel as often as they add.

    Args:
        passages: ids of the passages that say which words are rare.
        key: (d_vocab,) the same number for ids that are one word; -1 for ids that stand for no text.
    """

    def __init__(self, passages: Sequence[NDArray[np.int32]], key: NDArray[np.int64]) -> None:
        self._key = key
        n_keys = int(key.max(initial=0)) + 1
        _, keys = self._pairs(passages)
        self._weight = np.log((1 + len(passages)) / (1 + np.bincount(keys, minlength=n_keys)))
        generator = np.random.default_rng(0)
        self._place = generator.integers(_WIDTH, size=n_keys)
        self._weight *= generator.choice([-1.0, 1.0], size=n_keys)

    def vectors(self, passages: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """(n, _WIDTH), each row of L2 norm 1, or 0 where no word is known to be rare."""
        row, keys = self._pairs(passages)
        summed = np.bincount(
            row * _WIDTH + self._place[keys], weights=self._weight[keys], minlength=len(passages) * _WIDTH
        ).reshape(len(passages), _WIDTH)
        norm = np.linalg.norm(summed, axis=1, keepdims=True)
        return (summed / np.where(norm > 0, norm, 1)).astype(np.float32)

    def _pairs(self, passages: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Passage and key of each word, once a passage."""
        row = np.repeat(np.arange(len(passages)), [len(ids) for ids in passages])
        keys = self._key[np.concatenate(passages)] if passages else np.zeros(0, dtype=np.int64)
        known = keys >= 0
        n_keys = int(self._key.max(initial=0)) + 1
        return np.divmod(np.unique(row[known] * n_keys + keys[known]), n_keys)
