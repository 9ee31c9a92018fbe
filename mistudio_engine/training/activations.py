"""A language model's activations at one hook, shuffled, in batches: what an SAE is trained on.

One preallocated buffer is filled by forward passes over whole contexts, then read through a permutation of its rows,
and never copied. All of it follows from (seed, refill, batch), so those three numbers are the state: a stream that is
restored computes the same buffer again and goes on with the same batches, bit for bit. It does not know who trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput, EmptyData
from mistudio_engine.models.hooks import activations, hook_width
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens

__all__ = ["ActivationStream"]

_PARAMETER_TOKENS = {"cpu": 5e9, "cuda": 5e12}
"""Parameters times tokens in one forward pass, about 0.2 s of work on two CPU cores and on one large GPU. It depends
on nothing that is measured: the same pass computed in other portions rounds differently, and a restored stream has to
repeat it bit for bit."""

_MOST_TOKENS = 8192
_COUNTED_CONTEXTS = 4096


class ActivationStream:
    """Batches of activations without end: each epoch is a new permutation of the contexts.

    Args:
        lm: the language model; each forward pass stops after the hook.
        tokens: contexts to run it on.
        hook_name: where to read.
        batch_size: tokens in a batch.
        buffer_tokens: rows of the buffer; more shuffle better and take 4 · width bytes each.
        seed: of all permutations.
        exclude_special: leave BOS, EOS and other special tokens out; padding always is.

    Raises:
        UnknownHook: the model has no such hook.
        EmptyData: there are not enough tokens for one batch; says how many there are.
        BadInput: the buffer does not hold a batch, or not one context.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokens: PackedTokens,
        hook_name: str,
        *,
        batch_size: int,
        buffer_tokens: int,
        seed: int,
        exclude_special: bool = True,
    ) -> None:
        self.lm, self.tokens, self.hook_name = lm, tokens, hook_name
        self.batch_size, self.seed, self.exclude_special = batch_size, seed, exclude_special
        self.d_in = hook_width(lm, hook_name)
        context_size = tokens.info.context_size
        if buffer_tokens < max(batch_size, context_size):
            raise BadInput(
                f"A buffer of {buffer_tokens} tokens is too small.",
                why=f"It has to hold a batch of {batch_size} and a context of {context_size} tokens.",
                fix="Raise buffer_tokens; 16 batches or more shuffle well.",
            )
        self._check_enough(batch_size)
        self._contexts_per_refill = min(len(tokens), buffer_tokens // context_size)
        self._contexts_per_forward = _contexts_per_forward(lm, context_size)
        self._buffer = torch.empty(self._contexts_per_refill * context_size, self.d_in, device=lm.device)
        self._n_filled = 0
        self._filled_refill = -1
        self._refill = 0
        self._batch = 0

    @property
    def buffer(self) -> Tensor:
        """This refill's activations, unshuffled, (n, d_in); empty before the first batch. Read it, do not write."""
        return self._buffer[: self._n_filled]

    def batches(self) -> Iterator[Tensor | None]:
        """Batches (batch_size, d_in) in fp32 on the model's device, without end.

        Yields:
            None after each forward pass that fills the buffer, with nothing to train on yet; no hook is installed then.
        """
        refills_without_batch = 0
        while True:
            if self._filled_refill != self._refill:
                yield from self._fill()
            n_batches = self._n_filled // self.batch_size
            refills_without_batch = 0 if n_batches else refills_without_batch + 1
            if refills_without_batch * self._contexts_per_refill > len(self.tokens):
                raise EmptyData(
                    f"No buffer of {len(self._buffer)} tokens ever had {self.batch_size} to train on.",
                    why="Padding and special tokens are left out.",
                    fix="Raise buffer_tokens, or lower batch_size.",
                )
            order = torch.randperm(self._n_filled, generator=self._generator(1, self._refill))
            while self._batch < n_batches:
                rows = order[self._batch * self.batch_size : (self._batch + 1) * self.batch_size]
                self._batch += 1
                yield self._buffer[rows.to(self._buffer.device)]
            self._refill += 1
            self._batch = 0

    def state(self) -> dict[str, int]:
        """Where the stream stands: as much as it takes to go on from here."""
        return {"seed": self.seed, "refill": self._refill, "batch": self._batch}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back, or on, to a state; the next batch of a *new* `batches()` is the one that would have come next."""
        self.seed, self._refill, self._batch = int(state["seed"]), int(state["refill"]), int(state["batch"])
        self._filled_refill = -1

    def describe(self) -> dict[str, Any]:
        """Fields of an SAE's config that say what it was trained on."""
        info = self.tokens.info
        return {
            "model_name": self.lm.name,
            "hook_name": self.hook_name,
            "prepend_bos": info.bos_policy in ("context", "both"),
            "context_size": info.context_size,
        }

    def _fill(self) -> Iterator[None]:
        """Run the model over this refill's contexts, a forward pass at a time."""
        rows = self._rows(self._refill)
        n_filled = 0
        for start in range(0, len(rows), self._contexts_per_forward):
            chosen = rows[start : start + self._contexts_per_forward]
            # Padding is on the right and the model causal: no real token sees it, so no attention mask is needed.
            acts = activations(self.lm, self.tokens.ids[chosen].long(), [self.hook_name])[self.hook_name]
            mask = self.tokens.mask(chosen, special=not self.exclude_special).to(acts.device)
            kept = acts[mask]  # (n, d_in)
            self._buffer[n_filled : n_filled + len(kept)] = kept
            n_filled += len(kept)
            self._n_filled = n_filled
            yield None
        self._filled_refill = self._refill

    def _rows(self, refill: int) -> Tensor:
        """The contexts of a refill: a window on the endless sequence of permutations."""
        first = refill * self._contexts_per_refill
        rows = []
        while len(rows) < self._contexts_per_refill:
            epoch, position = divmod(first + len(rows), len(self.tokens))
            order = torch.randperm(len(self.tokens), generator=self._generator(0, epoch))
            rows += order[position : position + self._contexts_per_refill - len(rows)].tolist()
        return torch.tensor(rows)

    def _generator(self, purpose: int, number: int) -> torch.Generator:
        """Randomness that depends on the seed, what it is for, and a count, and on nothing that happened before."""
        mixed = (self.seed * 2 + purpose) * 1_000_003 + number
        return torch.Generator().manual_seed(mixed % (1 << 63))

    def _check_enough(self, batch_size: int) -> None:
        """Count usable tokens, only as far as needed."""
        n_usable = 0
        for start in range(0, len(self.tokens), _COUNTED_CONTEXTS):
            rows = slice(start, start + _COUNTED_CONTEXTS)
            n_usable += int(self.tokens.mask(rows, special=not self.exclude_special).sum())
            if n_usable >= batch_size:
                return
        raise EmptyData(
            f"There are {n_usable} tokens to train on, less than one batch of {batch_size}.",
            why="Padding is left out" + (", and so are special tokens." if self.exclude_special else "."),
            fix=f"Tokenise more text, or set batch_size to at most {n_usable}."
            if n_usable
            else "Tokenise text that has words in it.",
        )


def _contexts_per_forward(lm: LanguageModel, context_size: int) -> int:
    n_parameters = sum(parameter.numel() for parameter in lm.hf.parameters())
    n_tokens = min(_PARAMETER_TOKENS.get(lm.device.type, _PARAMETER_TOKENS["cuda"]) / n_parameters, _MOST_TOKENS)
    return max(1, int(n_tokens) // context_size)
