"""A language model's activations, shuffled, in batches: what SAEs are trained on, any number from one forward pass.

A source answers with the activations of whole contexts: the model itself (LiveActivations) or a cache on disk
(CachedActivations, activation_cache.py). The stream fills one preallocated buffer a hook, reads all of them through one
permutation of rows, and copies none. All of it follows from (seed, refill, batch), so those three numbers are the
state: a stream that is restored computes the same buffers again and goes on with the same batches, bit for bit. It does
not know who trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput, EmptyData, UnknownHook
from mistudio_engine.models.hooks import activations, hook_width
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens

__all__ = ["ActivationStream", "LiveActivations", "Source", "limited"]

_PARAMETER_TOKENS = {"cpu": 5e9, "cuda": 5e12}
"""Parameters times tokens in one forward pass, about 0.2 s of work on two CPU cores and on one large GPU. It depends
on nothing that is measured: the same pass computed in other portions rounds differently, and a restored stream has to
repeat it bit for bit."""

_MOST_TOKENS = 8192
_COUNTED_CONTEXTS = 4096


class Source(Protocol):
    """Whole contexts' activations at some hooks."""

    @property
    def tokens(self) -> PackedTokens:
        """The contexts; also where special tokens and padding stand."""
        ...

    @property
    def n_contexts(self) -> int:
        """Only so many contexts are given, the first ones; the rest is for others, such as an evaluation."""
        ...

    @property
    def widths(self) -> Mapping[str, int]:
        """Numbers per token at each hook, by name."""
        ...

    @property
    def model_name(self) -> str:
        """Whose activations they are."""
        ...

    @property
    def device(self) -> torch.device:
        """Where they come out."""
        ...

    @property
    def contexts_at_once(self) -> int:
        """How many to ask for, so that it does not take long; the same in every process."""
        ...

    def contexts(self, rows: Tensor) -> dict[str, Tensor]:
        """For each hook (n, context_size, width), in the order of `rows` (n,); not to be written into."""
        ...


class LiveActivations:
    """Activations from forward passes that stop after the last of the hooks.

    Args:
        lm: the language model.
        tokens: contexts to run it on.
        hook_names: where to read, at least one; a name that comes twice counts once.
        n_contexts: use the first so many contexts; None for all.

    Raises:
        UnknownHook: the model has no such hook.
        BadInput: no hook is named, or there are not so many contexts.
    """

    def __init__(
        self, lm: LanguageModel, tokens: PackedTokens, hook_names: Sequence[str], n_contexts: int | None = None
    ) -> None:
        self.lm, self.tokens = lm, tokens
        self.widths = {name: hook_width(lm, name) for name in hook_names}
        if not self.widths:
            raise BadInput("No hook was named.", fix="Name at least one, such as 'blocks.0.hook_resid_post'.")
        self.n_contexts = limited(tokens, n_contexts)
        self.model_name, self.device = lm.name, lm.device
        self.contexts_at_once = _contexts_per_forward(lm, tokens.info.context_size)

    def contexts(self, rows: Tensor) -> dict[str, Tensor]:
        """See Source; in the model's dtype."""
        # Padding is on the right and the model causal: no real token sees it, so no attention mask is needed.
        return activations(self.lm, self.tokens.ids[rows].long(), list(self.widths))


class ActivationStream:
    """Batches of activations without end: each epoch is a new permutation of the contexts.

    Args:
        source: gives the activations.
        hook_names: which of the source's hooks; a name that comes twice counts once.
        batch_size: tokens in a batch.
        buffer_tokens: rows of each buffer; more shuffle better and take (bytes of `dtype`) · width each, a hook.
        seed: of all permutations.
        exclude_special: leave BOS, EOS and other special tokens out; padding always is.
        dtype: of the buffers; bfloat16 takes half of float32's memory. Batches come out in fp32 whatever it is.

    Attributes:
        hook_names: in the order of the batches' keys.
        widths: numbers per token at each of them.

    Raises:
        UnknownHook: the source lacks such a hook.
        EmptyData: there are not enough tokens for one batch; says how many there are.
        BadInput: no hook is named; a buffer does not hold a batch, or not one context.
    """

    def __init__(
        self,
        source: Source,
        hook_names: Sequence[str],
        *,
        batch_size: int,
        buffer_tokens: int,
        seed: int,
        exclude_special: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source, self.hook_names = source, tuple(dict.fromkeys(hook_names))
        self.widths = _widths(source, self.hook_names)
        self.batch_size, self.seed, self.exclude_special = batch_size, seed, exclude_special
        context_size = source.tokens.info.context_size
        if buffer_tokens < max(batch_size, context_size):
            raise BadInput(
                f"A buffer of {buffer_tokens} tokens is too small.",
                why=f"It has to hold a batch of {batch_size} and a context of {context_size} tokens.",
                fix="Raise buffer_tokens; 16 batches or more shuffle well.",
            )
        self._check_enough()
        self._contexts_per_refill = min(source.n_contexts, buffer_tokens // context_size)
        self._n_rows = self._contexts_per_refill * context_size
        self._buffers = {
            name: torch.empty(self._n_rows, width, dtype=dtype, device=source.device)
            for name, width in self.widths.items()
        }
        self._n_filled = 0
        self._filled_refill = -1
        self._refill = 0
        self._batch = 0

    @property
    def buffer(self) -> dict[str, Tensor]:
        """This refill's activations by hook, unshuffled, (n, width) each, row i the same token in all of them; empty
        before the first batch. Read them, do not write."""
        return {name: buffer[: self._n_filled] for name, buffer in self._buffers.items()}

    def batches(self) -> Iterator[dict[str, Tensor] | None]:
        """Batches by hook, (batch_size, width) each in fp32 on the source's device, without end.

        Row i is the same token at every hook.

        Yields:
            None after each portion that only fills the buffers; no hook is installed in the model then.
        """
        refills_without_batch = 0
        while True:
            if self._filled_refill != self._refill:
                yield from self._fill()
            n_batches = self._n_filled // self.batch_size
            refills_without_batch = 0 if n_batches else refills_without_batch + 1
            if refills_without_batch * self._contexts_per_refill > self.source.n_contexts:
                raise EmptyData(
                    f"No buffer of {self._n_rows} tokens ever had {self.batch_size} to train on.",
                    why="Padding and special tokens are left out.",
                    fix="Raise buffer_tokens, or lower batch_size.",
                )
            order = torch.randperm(self._n_filled, generator=self._generator(1, self._refill))
            while self._batch < n_batches:
                rows = order[self._batch * self.batch_size : (self._batch + 1) * self.batch_size]
                rows = rows.to(self.source.device)
                self._batch += 1
                yield {name: buffer[rows].float() for name, buffer in self._buffers.items()}
            self._refill += 1
            self._batch = 0

    def state(self) -> dict[str, int]:
        """Where the stream stands: as much as it takes to go on from here."""
        return {"seed": self.seed, "refill": self._refill, "batch": self._batch}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back, or on, to a state; the next batch of a *new* `batches()` is the one that would have come next."""
        self.seed, self._refill, self._batch = int(state["seed"]), int(state["refill"]), int(state["batch"])
        self._filled_refill = -1

    def describe(self, hook_name: str) -> dict[str, Any]:
        """Fields of an SAE's config that say what it was trained on; whether contexts began with BOS is among them."""
        info = self.source.tokens.info
        return {
            "model_name": self.source.model_name,
            "hook_name": hook_name,
            "prepend_bos": info.bos_policy in ("context", "both"),
            "context_size": info.context_size,
        }

    def _fill(self) -> Iterator[None]:
        """Take this refill's contexts from the source, a portion at a time."""
        rows = self._rows(self._refill)
        n_filled = 0
        for chosen in rows.split(self.source.contexts_at_once):
            acts = self.source.contexts(chosen)
            mask = self.source.tokens.mask(chosen, special=not self.exclude_special)  # (n, context_size)
            end = n_filled + int(mask.sum())
            for name, buffer in self._buffers.items():
                buffer[n_filled:end] = acts[name][mask.to(acts[name].device)]
            self._n_filled = n_filled = end
            yield None
        self._filled_refill = self._refill

    def _rows(self, refill: int) -> Tensor:
        """The contexts of a refill: a window on the endless sequence of permutations."""
        n_contexts = self.source.n_contexts
        first = refill * self._contexts_per_refill
        rows = []
        while len(rows) < self._contexts_per_refill:
            epoch, position = divmod(first + len(rows), n_contexts)
            order = torch.randperm(n_contexts, generator=self._generator(0, epoch))
            rows += order[position : position + self._contexts_per_refill - len(rows)].tolist()
        return torch.tensor(rows)

    def _generator(self, purpose: int, number: int) -> torch.Generator:
        """Randomness that depends on the seed, what it is for, and a count, and on nothing that happened before."""
        mixed = (self.seed * 2 + purpose) * 1_000_003 + number
        return torch.Generator().manual_seed(mixed % (1 << 63))

    def _check_enough(self) -> None:
        """Count usable tokens, only as far as needed."""
        n_usable = 0
        for start in range(0, self.source.n_contexts, _COUNTED_CONTEXTS):
            rows = slice(start, min(start + _COUNTED_CONTEXTS, self.source.n_contexts))
            n_usable += int(self.source.tokens.mask(rows, special=not self.exclude_special).sum())
            if n_usable >= self.batch_size:
                return
        raise EmptyData(
            f"There are {n_usable} tokens to train on, less than one batch of {self.batch_size}.",
            why="Padding is left out" + (", and so are special tokens." if self.exclude_special else "."),
            fix=f"Tokenise more text, or set batch_size to at most {n_usable}."
            if n_usable
            else "Tokenise text that has words in it.",
        )


def limited(tokens: PackedTokens, n_contexts: int | None) -> int:
    """`n_contexts`, or all there are.

    Raises:
        BadInput: it is not between 1 and what there is.
    """
    if n_contexts is None:
        return len(tokens)
    if not 1 <= n_contexts <= len(tokens):
        raise BadInput(
            f"n_contexts is {n_contexts}, and there are {len(tokens)} contexts.",
            fix=f"Use 1 to {len(tokens)}, or leave it out to take all.",
        )
    return n_contexts


def _widths(source: Source, hook_names: Sequence[str]) -> dict[str, int]:
    if not hook_names:
        raise BadInput("No hook was named.", fix=f"Name at least one of {', '.join(source.widths)}.")
    for name in hook_names:
        if name not in source.widths:
            raise UnknownHook(
                f"The activations have no {name!r}.",
                why=f"They were taken at {', '.join(source.widths)}.",
                fix="Name one of these, or take the activations at this hook, too.",
            )
    return {name: source.widths[name] for name in hook_names}


def _contexts_per_forward(lm: LanguageModel, context_size: int) -> int:
    n_parameters = sum(parameter.numel() for parameter in lm.hf.parameters())
    n_tokens = min(_PARAMETER_TOKENS.get(lm.device.type, _PARAMETER_TOKENS["cuda"]) / n_parameters, _MOST_TOKENS)
    return max(1, int(n_tokens) // context_size)
