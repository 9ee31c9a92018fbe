"""Runs a language model over contexts, once, and hands the activations of any number of SAEs on as sparse blocks.

It decides in which order contexts are visited, how many go into one forward pass, and which tokens count. It does not
know what becomes of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mistudio_engine.api.errors import BadInput
from mistudio_engine.discovery.activation_block import Block, sparse_acts
from mistudio_engine.models.hooks import activations

if TYPE_CHECKING:
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.models.tokens import PackedTokens
    from mistudio_engine.saes.base import SAE

__all__ = ["Blocks", "ExtractionReader", "Reads", "WhichTokens"]

_STEP_FLOPS_CPU, _STEP_FLOPS_GPU = 5e9, 2e12
"""Arithmetic in one step: about a tenth of a second on two cores, or on a data-centre GPU."""

_BLOCK_TOKENS, _BLOCK_ENTRIES = 8192, 1 << 18
"""Blocks are taken in when they have so many tokens or activations: another tenth of a second."""


class Reads(Protocol):
    """An SAE with where it reads and which of its features are wanted."""

    @property
    def sae(self) -> SAE: ...

    @property
    def hook_name(self) -> str: ...

    @property
    def features(self) -> Sequence[int] | None: ...


class WhichTokens(NamedTuple):
    """Which tokens count; padding never does."""

    exclude_special: bool = True
    """Leave out BOS, EOS and other special tokens."""

    exclude_token_ids: tuple[int, ...] = ()
    exclude_first: int = 0
    """Leave out so many positions at the beginning of each context."""


class Blocks(NamedTuple):
    """The same contexts as all SAEs see them."""

    of_each: tuple[Block, ...]
    """One block for each SAE."""

    counted: NDArray[np.bool_]
    """(n_contexts * context_size,) True at the tokens that count."""


class ExtractionReader:
    """Reads contexts in a random order.

    Args:
        lm: the language model.
        targets: what reads its activations.
        tokens: packed contexts.
        which: tokens that count.
        n_tokens: real tokens to read at most, in whole contexts; None reads all.
        min_activation: smaller activations count as none.
        seed: of the order.

    Attributes:
        selections: for each target (n_features,) the features that are looked at.
        batch_contexts: contexts in one forward pass.
        n_read: real tokens read so far.
    """

    def __init__(
        self,
        lm: LanguageModel,
        targets: Sequence[Reads],
        tokens: PackedTokens,
        which: WhichTokens,
        *,
        n_tokens: int | None,
        min_activation: float,
        seed: int,
    ) -> None:
        self.lm, self.targets, self.tokens, self.which = lm, targets, tokens, which
        self.min_activation = min_activation
        self.selections = [
            np.arange(target.sae.cfg.d_sae) if target.features is None else np.unique(np.array(target.features))
            for target in targets
        ]
        self.order = _visiting_order(tokens, n_tokens, seed)
        self.batch_contexts = _batch_contexts(lm, [target.sae for target in targets], tokens.info.context_size)
        self.n_read = 0
        self._at = 0
        self._waiting: list[list[NDArray]] = [[] for _ in targets]  # feature, place, value, feature, place, value, …
        self._counted: list[NDArray[np.bool_]] = []
        self._begin = 0
        self._n_entries = 0
        self._n_planned = int(tokens.n_real[torch.from_numpy(self.order)].sum())
        self._row_of = [
            _row_of(target.sae.cfg.d_sae, chosen) for target, chosen in zip(targets, self.selections, strict=True)
        ]
        self._excluded = torch.tensor(which.exclude_token_ids, dtype=tokens.ids.dtype)

    @property
    def fraction(self) -> float:
        """Share of the planned tokens that is read."""
        return self.n_read / self._n_planned

    def steps(self) -> Iterator[Blocks | None]:
        """One forward pass a step, which gives None; and in a step of their own the blocks of all SAEs, once full."""
        while True:
            if self._is_full:
                yield self._blocks()
            if self._at >= len(self.order):
                return
            self._read(self.order[self._at : self._at + self.batch_contexts])
            self._at = min(self._at + self.batch_contexts, len(self.order))
            yield None

    @property
    def _is_full(self) -> bool:
        """Is what waits worth being taken in? Asked before each read, so that a restored reader answers alike."""
        n_tokens = (self._at - self._begin) * self.tokens.info.context_size
        is_last = self._at >= len(self.order)
        return n_tokens > 0 and (n_tokens >= _BLOCK_TOKENS or self._n_entries >= _BLOCK_ENTRIES or is_last)

    def state(self) -> dict[str, NDArray]:
        """What `restore` needs to go on, between two steps."""
        found = {
            "numbers": np.array([self._at, self._begin, self.n_read, self._n_entries], dtype=np.int64),
            "counted": _joined(self._counted, bool),
        }
        for number, parts in enumerate(self._waiting):
            for name, offset, dtype in _ENTRY:
                found[f"{name}.{number}"] = _joined(parts[offset::3], dtype)
        return found

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where `state` was taken."""
        self._at, self._begin, self.n_read, self._n_entries = (int(number) for number in state["numbers"])
        self._counted = [state["counted"]]
        self._waiting = [[state[f"{name}.{number}"] for name, *_ in _ENTRY] for number in range(len(self.targets))]

    def _read(self, rows: NDArray[np.int64]) -> None:
        """One forward pass, and what is active in these contexts."""
        which = torch.from_numpy(rows)
        ids = self.tokens.ids[which]
        mask = self._mask(which, ids)
        hooks = list(dict.fromkeys(target.hook_name for target in self.targets))
        # Causal attention never looks at the padding behind the text: no attention mask is needed.
        acts = activations(self.lm, ids, hooks)
        before = sum(len(part) for part in self._counted)
        places = torch.nonzero(mask.reshape(-1)).squeeze(1).numpy() + before
        for target, row_of, waiting in zip(self.targets, self._row_of, self._waiting, strict=True):
            x = acts[target.hook_name]
            x = x[mask.to(x.device)].to(target.sae.device)  # (n_counted, d_in)
            with torch.no_grad():
                token, feature, value = sparse_acts(target.sae, x, self.min_activation)
            place = places[token]
            if row_of is not None:
                feature = row_of[feature]
                kept = feature >= 0
                feature, place, value = feature[kept], place[kept], value[kept]
            waiting += [feature, place, value]
            self._n_entries += len(feature)
        self._counted.append(mask.reshape(-1).numpy())
        self.n_read += int(self.tokens.n_real[which].sum())

    def _mask(self, rows: Tensor, ids: Tensor) -> Tensor:
        """(n_contexts, context_size) True at the tokens that count."""
        mask = self.tokens.mask(rows, special=not self.which.exclude_special)
        if len(self._excluded):
            mask = mask & ~torch.isin(ids, self._excluded)
        mask[:, : self.which.exclude_first] = False
        return mask

    def _blocks(self) -> Blocks:
        """What waits, as blocks."""
        contexts = self.order[self._begin : self._at]
        ids = self.tokens.ids[torch.from_numpy(contexts)].numpy()
        blocks = tuple(
            Block.of(contexts, ids, *(_joined(parts[offset::3], dtype) for _, offset, dtype in _ENTRY))
            for parts in self._waiting
        )
        counted = _joined(self._counted, bool)
        self._begin, self._n_entries = self._at, 0
        self._waiting, self._counted = [[] for _ in self.targets], []
        return Blocks(blocks, counted)


_ENTRY = (("feature", 0, np.int64), ("place", 1, np.int64), ("value", 2, np.float32))
"""Names, places and types of an entry's three columns."""


def _joined(parts: Sequence[NDArray], dtype: type) -> NDArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _row_of(d_sae: int, selection: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Row of each feature in the selection, -1 outside; None where all are selected."""
    if len(selection) == d_sae:
        return None
    row_of = np.full(d_sae, -1, dtype=np.int64)
    row_of[selection] = np.arange(len(selection))
    return row_of


def _visiting_order(tokens: PackedTokens, n_tokens: int | None, seed: int) -> NDArray[np.int64]:
    """Contexts in a random order, as many as n_tokens allows."""
    order = np.random.default_rng(seed).permutation(len(tokens))
    if n_tokens is None:
        return order
    n_contexts = int(np.searchsorted(np.cumsum(tokens.n_real.numpy()[order], dtype=np.int64), n_tokens, side="right"))
    if not n_contexts:
        raise BadInput(
            f"n_tokens {n_tokens} is less than one context.",
            fix=f"Use at least {tokens.info.context_size}, or leave it out.",
        )
    return order[:n_contexts]


def _batch_contexts(lm: LanguageModel, saes: Sequence[SAE], context_size: int) -> int:
    """Contexts in one forward pass: fixed by sizes, never by the clock, so that a run repeats bit for bit."""
    flops = 2 * sum(p.numel() for block in lm.layout.blocks for p in block.parameters())  # a token
    # 64 for looking through its features.
    flops += sum((2 * sae.cfg.d_in + 64) * sae.cfg.d_sae for sae in saes)
    step = _STEP_FLOPS_CPU if lm.device.type == "cpu" else _STEP_FLOPS_GPU
    return max(1, int(min(step / flops, _BLOCK_TOKENS)) // context_size)
