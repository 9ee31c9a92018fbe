"""Data that several tests of discovery share: a hook, a text, packed contexts, and a generator run to its end."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from mistudio_engine.models.tokens import PackedTokens, TokensInfo

HOOK = "blocks.0.hook_resid_pre"

TEXT = (
    "The cat sat on the mat. A dog ran to the cat and said “no”! In 1984 there were 42 horses, not 17. "
    "She was running, jumping and singing; he walked, talked and smiled. Привет мир. 你好世界。 "
    "Tom and Anna did not see the red house. The red dog is not in the red house, said Tom. 3 cats, 5 dogs. "
)


def drain(steps: Generator[Any, Any, Any]) -> tuple[Any, list[Any]]:
    """Run a generator to its end; its result and all its progress."""
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as stop:
            return stop.value, seen


def packed(ids: Tensor, d_vocab: int, n_real: Tensor | None = None) -> PackedTokens:
    """Contexts (n, context_size) as packed tokens; ids 0 and 1 are special."""
    n_contexts, context_size = ids.shape
    n_real = torch.full((n_contexts,), context_size) if n_real is None else n_real
    info = TokensInfo(
        context_size=context_size,
        n_contexts=n_contexts,
        n_tokens=int(n_real.sum()),
        n_documents=1,
        bos_policy="context",
        bos_token_id=0,
        separator_token_id=1,
        pad_token_id=1,
        special_ids=(0, 1),
        d_vocab=d_vocab,
        tokenizer_hash="0" * 64,
    )
    lengths = torch.tensor([info.n_tokens], dtype=torch.int32)
    return PackedTokens(ids.to(torch.int32), n_real.to(torch.int32), lengths, info)
