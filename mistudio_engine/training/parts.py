"""A batch worked on in parts, where memory asks for it: its objective put together again, and memory's errors told.

It knows neither the weights nor how a part's objective comes about.
"""

from __future__ import annotations

import torch

from mistudio_engine.training.objectives import Objective

__all__ = ["detached", "is_out_of_memory", "merged"]

_NO_MEMORY = ("can't allocate memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch says it in a plain RuntimeError: the CPU's allocator, a topk's own list of indices, cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room for a tensor, or for what an operation works in."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _NO_MEMORY)


def detached(outcome: Objective) -> Objective:
    """Without the graph."""
    parts = {name: part.detach() for name, part in outcome.parts.items()}
    return outcome._replace(
        loss=outcome.loss.detach(), parts=parts, sae_out=outcome.sae_out.detach(), l1=outcome.l1.detach()
    )


def merged(parts: list[tuple[float, Objective]]) -> Objective:
    """The objective of a batch from those of its parts, each with its share of the tokens."""
    if len(parts) == 1:
        return parts[0][1]
    outcomes = [outcome for _, outcome in parts]
    smallest = [outcome.smallest for outcome in outcomes if outcome.smallest is not None]
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.parts)
    return Objective(
        loss=torch.stack([share * outcome.loss for share, outcome in parts]).sum(),
        parts={
            name: torch.stack([share * outcome.parts[name] for share, outcome in parts if name in outcome.parts]).sum()
            for name in names
        },
        sae_out=torch.cat([outcome.sae_out for outcome in outcomes]),
        n_fired=torch.stack([outcome.n_fired for outcome in outcomes]).sum(dim=0),
        l1=torch.stack([share * outcome.l1 for share, outcome in parts]).sum(),
        smallest=torch.stack(smallest).amin() if smallest else None,
    )
