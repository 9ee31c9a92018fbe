"""A passage: the piece of a context that a judge is shown, with what the feature does on it; and which ones to show.

Passages with the feature are cut from held-out examples, spread over the strengths at which it fires. Those without it
are the business of negatives.py. No passage is a copy of another one, nor of what a label was made from. Ids only: it
knows no text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.discovery.extraction_store import Example

__all__ = ["Copies", "NegativeKind", "Passage", "positives"]

NegativeKind = Literal["random", "decoder", "similar"]

_BEFORE = 0.75
"""Share of a passage that stands before the strongest token: a causal model has looked at nothing after it."""

_COPIED = 16
"""Tokens in a row, or half a passage if that is more, that occur in two texts only where one is a copy of the other."""


class Passage(NamedTuple):
    """Consecutive tokens of a held-out context."""

    context: int
    """Number of the packed context."""

    start: int
    """Where the passage begins in it."""

    context_ids: NDArray[np.int32]
    """The context from its beginning to the passage's end."""

    values: NDArray[np.float32]
    """(n,) the feature's activation on each token of the passage; all 0 where it is silent."""

    kind: NegativeKind | None = None
    """How it was chosen; None where the feature fires."""

    counted: NDArray[np.bool_] | None = None
    """(n,) False at tokens that the extraction left out: nobody knows what the feature does there. None: no such."""

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """(n,) the tokens that are shown."""
        return self.context_ids[self.start :]

    @property
    def fires(self) -> bool:
        """Whether the feature fires in it."""
        return self.kind is None


class Copies:
    """Refuses texts that were there before: datasets hold the same page many times.

    Held-out contexts may repeat the text that a label was made from word for word, and a label from another extraction
    may be from the same text, cut otherwise. A text that is shown twice counts twice and tells nothing new, and where
    what stands before it differs the feature may fire in one and be silent in the other.

    Args:
        explained: ids of the contexts that the label was made from.

    Attributes:
        n_refused: passages that were not taken.
    """

    def __init__(self, explained: Iterable[NDArray[np.int32]] = ()) -> None:
        self._explained = b"\xff\xff\xff\xff".join(np.ascontiguousarray(ids, np.int32).tobytes() for ids in explained)
        self._shown: set[bytes] = set()
        self.n_refused = 0

    def take(self, passage: Passage) -> bool:
        """Whether it is no copy; another one of the same text will be."""
        text = passage.token_ids.tobytes()
        n_tokens = max(_COPIED, -(-len(passage.token_ids) // 2))
        is_new = text not in self._shown and not self._was_explained(passage.context_ids[-n_tokens:].tobytes())
        self._shown.add(text)
        self.n_refused += not is_new
        return is_new

    def _was_explained(self, piece: bytes) -> bool:
        at = self._explained.find(piece)
        while at > 0 and at % 4:  # bytes of two ids may look like those of a third one
            at = self._explained.find(piece, at + 1)
        return at >= 0


def positives(
    examples: Sequence[Example],
    n: int,
    window: int,
    seed: int,
    *,
    special_ids: Collection[int] = (),
    copies: Copies | None = None,
) -> list[Passage]:
    """At most n passages of `window` tokens in which the feature fires, the groups of examples taken in turn.

    The groups are the parts of [0, maximum] that the strongest activation lies in, and the top and random examples:
    a label must hold for weak activations as well.

    Args:
        examples: held-out ones, whole contexts, each context once; those in which it is silent are passed over.
        special_ids: ids that stand for no text: a passage in which it fires on nothing else shows nothing.
        copies: what must not come again.
    """
    copies = copies or Copies()
    groups: dict[tuple[str, int], list[Example]] = {}
    for example in examples:
        if example.value > 0:
            groups.setdefault((example.group, example.quantile or 0), []).append(example)
    generator = np.random.default_rng([seed, examples[0].feature if examples else 0])
    shuffled = [[group[i] for i in generator.permutation(len(group))] for _, group in sorted(groups.items())]
    longest = max(map(len, shuffled), default=0)
    special = np.array(sorted(special_ids), dtype=np.int64)
    found: list[Passage] = []
    for example in (group[i] for i in range(longest) for group in shuffled if i < len(group)):
        if len(found) == n:
            break
        passage = _around_prime(example, window)
        if passage.values[~np.isin(passage.token_ids, special)].max(initial=0) > 0 and copies.take(passage):
            found.append(passage)
    return found


def _around_prime(example: Example, window: int) -> Passage:
    length = len(example.token_ids)
    start = max(0, min(example.prime - int(_BEFORE * window), length - window))
    shown = slice(start, min(length, start + window))
    return Passage(
        example.context,
        start,
        example.token_ids[: shown.stop],
        example.values[shown],
        counted=example.counted[shown],
    )
