"""A passage: the piece of a context that a judge is shown, with what the feature does on it; and which ones to show.

Passages with the feature are cut from held-out examples, spread over the strengths at which it fires. Those without it
are the business of negatives.py. Ids only: it knows no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.discovery.extraction_store import Example

__all__ = ["NegativeKind", "Passage", "positives"]

NegativeKind = Literal["random", "decoder", "similar"]

_BEFORE = 0.75
"""Share of a passage that stands before the strongest token: a causal model has looked at nothing after it."""


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

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """(n,) the tokens that are shown."""
        return self.context_ids[self.start :]

    @property
    def fires(self) -> bool:
        """Whether the feature fires in it."""
        return self.kind is None


def positives(examples: Sequence[Example], n: int, window: int, seed: int) -> list[Passage]:
    """At most n passages of `window` tokens in which the feature fires, the groups of examples taken in turn.

    The groups are the parts of [0, maximum] that the strongest activation lies in, and the top and random examples:
    a label must hold for weak activations as well.

    Args:
        examples: held-out ones, whole contexts, each context once; those in which it is silent are passed over.
    """
    groups: dict[tuple[str, int], list[Example]] = {}
    for example in examples:
        if example.value > 0:
            groups.setdefault((example.group, example.quantile or 0), []).append(example)
    generator = np.random.default_rng([seed, examples[0].feature if examples else 0])
    shuffled = [[group[i] for i in generator.permutation(len(group))] for _, group in sorted(groups.items())]
    longest = max(map(len, shuffled), default=0)
    in_turn = [group[i] for i in range(longest) for group in shuffled if i < len(group)]
    return [_around_prime(example, window) for example in in_turn[:n]]


def _around_prime(example: Example, window: int) -> Passage:
    length = len(example.token_ids)
    start = max(0, min(example.prime - int(_BEFORE * window), length - window))
    stop = min(length, start + window)
    return Passage(example.context, start, example.token_ids[:stop], example.values[start:stop])
