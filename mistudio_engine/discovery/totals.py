"""Everything that an extraction adds up over the pass, for all features of one SAE, and its state for a checkpoint.

The accumulators know only blocks; this one holds them together. It knows neither the model nor any file.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.discovery.activation_block import Block, run_starts
from mistudio_engine.discovery.coactivation import CoactivationSample
from mistudio_engine.discovery.examples import ExamplePool
from mistudio_engine.discovery.histogram import LogHistograms
from mistudio_engine.discovery.top_tokens import TopTokens

__all__ = ["FeatureTotals"]


class FeatureTotals:
    """Accumulates blocks.

    Attributes:
        n_tokens: tokens that counted so far.
        n_contexts: contexts so far.
        n_active: (n_features,) tokens on which each feature is active.
        sum: (n_features,) of the activations.
        max: (n_features,) largest activation.
        l0: (n,) tokens on which 0, 1, 2, … features are active.
    """

    def __init__(self, n_features: int, d_vocab: int, examples: ExamplePool) -> None:
        self.n_tokens = self.n_contexts = 0
        self.n_active = np.zeros(n_features, dtype=np.int64)
        self.sum = np.zeros(n_features, dtype=np.float64)
        self.max = np.zeros(n_features, dtype=np.float32)
        self.l0 = np.zeros(n_features + 1, dtype=np.int64)
        self.histograms = LogHistograms(n_features)
        self.top_tokens = TopTokens(n_features, d_vocab)
        self.examples = examples
        self.coactivation = CoactivationSample(n_features)

    def add(self, block: Block, counted: NDArray[np.bool_]) -> None:
        """Take in a block, of whose places (n_contexts * context_size,) the `counted` ones are tokens that count."""
        n_features = len(self.n_active)
        self.n_tokens += int(np.count_nonzero(counted))
        self.n_contexts += len(block.contexts)
        self.n_active += np.bincount(block.feature, minlength=n_features)
        self.sum += np.bincount(block.feature, weights=block.value, minlength=n_features)
        starts = run_starts(block.feature)
        fired = block.feature[starts]
        if len(starts):
            self.max[fired] = np.maximum(self.max[fired], np.maximum.reduceat(block.value, starts))
        self.l0 += np.bincount(np.bincount(block.place, minlength=len(counted))[counted], minlength=n_features + 1)
        self.histograms.add(block.feature, block.value)
        self.top_tokens.add(block)
        self.examples.add(block)
        self.coactivation.add(block, counted)

    def l0_summary(self) -> dict[str, float]:
        """How many features are active on a token: mean, 5th, 50th and 95th percentile, maximum; and on how large a
        share of the tokens none is.
        """
        n = max(self.n_tokens, 1)
        up_to = np.cumsum(self.l0)
        percentiles = {f"p{p}": float(np.searchsorted(up_to, p / 100 * n)) for p in (5, 50, 95)}
        mean = float(self.l0 @ np.arange(len(self.l0))) / n
        largest = float(np.flatnonzero(self.l0).max(initial=0))
        return {"mean": mean, **percentiles, "max": largest, "silent": float(self.l0[0]) / n}

    def state(self) -> dict[str, NDArray]:
        """Arrays from which `restore` goes on, bit for bit."""
        found = {
            "numbers": np.array([self.n_tokens, self.n_contexts], dtype=np.int64),
            "n_active": self.n_active,
            "sum": self.sum,
            "max": self.max,
            "l0": self.l0,
        }
        for name, part in self._parts().items():
            found |= {f"{name}.{key}": value for key, value in part.state().items()}
        return found

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where `state` was taken."""
        self.n_tokens, self.n_contexts = (int(number) for number in state["numbers"])
        self.n_active, self.sum = state["n_active"], state["sum"]
        self.max, self.l0 = state["max"], state["l0"]
        for name, part in self._parts().items():
            start = f"{name}."
            part.restore({key.removeprefix(start): value for key, value in state.items() if key.startswith(start)})

    def _parts(self) -> dict[str, LogHistograms | TopTokens | ExamplePool | CoactivationSample]:
        return {
            "histograms": self.histograms,
            "top_tokens": self.top_tokens,
            "examples": self.examples,
            "coactivation": self.coactivation,
        }
