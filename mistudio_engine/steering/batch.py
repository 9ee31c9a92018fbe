"""A batch: rows of tokens of different lengths, read by the model a few columns at a time.

It keeps the padding, the positions and the keys and values, so that a row in a batch is computed as it would be alone.
It does not choose tokens, and knows no text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mistudio_engine.models.hooks import edit
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.steering.interventions import Intervention, Window, applied

__all__ = ["Batch"]


class Batch:
    """Left-padded rows of tokens and the keys and values that the model keeps of them.

    Args:
        rows: each row's tokens.
        cache: whether keys and values are kept.
    """

    def __init__(self, lm: LanguageModel, rows: Sequence[Sequence[int]], *, cache: bool = True) -> None:
        self._lm = lm
        self.prompt_width = max(len(row) for row in rows)
        # A row is padded with its own first token: the mask hides it, and a repetition penalty learns nothing from it.
        self.tokens = torch.tensor([[row[0]] * (self.prompt_width - len(row)) + list(row) for row in rows])
        n_padding = torch.tensor([[self.prompt_width - len(row)] for row in rows])
        self.real = torch.arange(self.prompt_width) >= n_padding  # (rows, columns)
        self._past = DynamicCache(config=lm.hf.config) if cache else None
        self._n_read = 0
        self._accepts = inspect.signature(lm.hf.forward).parameters.keys()

    @torch.no_grad()
    def read(
        self,
        until: int,
        interventions: Sequence[Intervention] = (),
        *,
        keep: int = 1,
        watch: Sequence[tuple[str, Callable[[Tensor], Tensor]]] = (),
    ) -> Tensor:
        """Run the model over the columns not read yet, up to `until`.

        Args:
            keep: for how many of the last columns logits are wanted.
            watch: hook points and edits that see what the interventions made of the activation.

        Returns:
            Logits in fp32, (rows, keep, d_vocab).
        """
        start = self._n_read if self._past is not None else 0
        device = self._lm.device
        real = self.real[:, :until]
        arguments: dict[str, Any] = {
            "input_ids": self.tokens[:, start:until].to(device),
            "attention_mask": real.long().to(device),
            # Counted over real tokens, so that padding moves nothing: a learned position is looked up by it.
            "position_ids": (real.long().cumsum(1) - 1).clamp(min=0)[:, start:].to(device),
            "use_cache": self._past is not None,
            "past_key_values": self._past,
            "logits_to_keep": keep,
        }
        window = Window(start, self.prompt_width, self.real)
        with applied(self._lm, interventions, window), ExitStack() as watched:
            for hook_name, look in watch:
                watched.enter_context(edit(self._lm, hook_name, look))
            logits = self._lm.hf(**{k: v for k, v in arguments.items() if k in self._accepts}).logits
        self._n_read = until
        return logits[:, -keep:].float()

    def append(self, token_ids: Tensor) -> None:
        """More tokens after the prompt's, (rows, n)."""
        self.tokens = torch.cat([self.tokens, token_ids.cpu()], dim=1)
        self.real = torch.cat([self.real, torch.ones(token_ids.shape, dtype=torch.bool)], dim=1)
