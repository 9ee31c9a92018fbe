"""Sampling: from logits to the next token, row by row, with random numbers of its own.

The distribution is transformers' (its processors, in its order: repetition penalty, temperature, top-k, top-p). The
draw is ours: one noise vector per sample and step, shared by all prompts of the batch, so that steered and baseline
texts of one sample differ by the steering and not by luck. It knows no model and no text.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

__all__ = ["Sampler", "Sampling", "warped"]


class Sampling(BaseModel):
    """How continuations are drawn; seed and temperature default to Neuronpedia's."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """At most this many tokens."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """0 is greedy: always the most probable token."""

    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from the k most probable tokens only; 0: from all."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the fewest tokens that together have this probability; 1: from all."""

    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Above 1 makes tokens that the row already holds, prompt included, less probable (arXiv 1909.05858)."""

    stop_sequences: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A text ends before the first of these."""

    seed: int = 16
    """The same seed gives the same text."""

    n: Annotated[int, Field(ge=1)] = 1
    """Samples per prompt."""


def warped(logits: Tensor, ids: Tensor, sampling: Sampling) -> Tensor:
    """The scores that a token is drawn from, −inf where it cannot be: transformers' processors in transformers' order.

    Args:
        logits: (rows, d_vocab) fp32.
        ids: the tokens so far, (rows, n_tokens), for the repetition penalty.
    """
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        if sampling.temperature != 1.0:
            steps.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            steps.append(TopPLogitsWarper(sampling.top_p))
    return steps(ids, logits)  # pyright: ignore[reportArgumentType]


class Sampler:
    """Draws the next token of every row; rows are prompt-major, `sampling.n` samples a prompt.

    Sample j's random numbers depend on the seed, j and the step alone, not on the batch.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generators = [torch.Generator().manual_seed(_seed_of(sampling.seed, j)) for j in range(sampling.n)]

    def choose(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Token ids (rows,) from logits (rows, d_vocab) after the tokens ids (rows, n_tokens)."""
        scores = warped(logits, ids, self.sampling)
        if self.sampling.temperature == 0:
            return scores.argmax(dim=-1)
        # argmax(log p − log e) with e ~ Exp(1) is a draw from p (the Gumbel-max trick, Gumbel 1954): the same e for two
        # distributions gives two draws that agree as far as these overlap, which inverting two CDFs does not.
        # Drawn on the CPU, so that one seed means one text on every device.
        d_vocab = scores.shape[-1]
        noise = torch.stack([torch.empty(d_vocab).exponential_(generator=g) for g in self._generators])
        gumbel = -noise.log().to(scores.device)  # (n, d_vocab)
        return (scores.view(-1, self.sampling.n, d_vocab) + gumbel).argmax(dim=-1).flatten()


def _seed_of(seed: int, sample: int) -> int:
    """A generator's seed for one sample: neighbouring seeds share no sample."""
    return int.from_bytes(blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()) >> 1
