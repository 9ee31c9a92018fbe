"""What steering did to a text, in numbers: one function a metric, its body the formula, its range in the docstring.

Logits are fp32, (n_tokens, d_vocab), each row what predicts one token of a completion. It knows neither how a text came
about nor what was steered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["kl_divergence", "perplexity", "probability_of", "repetition"]


def perplexity(logits: Tensor, token_ids: Sequence[int]) -> float:
    """exp of the mean negative log-probability of the tokens; 1 is certain, d_vocab is a uniform guess."""
    chosen = torch.tensor(token_ids, device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits, chosen).exp())


def kl_divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean over tokens of KL(p ‖ q) in nats, p from logits and q from reference; 0 is no difference, no upper bound."""
    log_p, log_q = logits.log_softmax(dim=-1), reference.log_softmax(dim=-1)
    return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0).mean())


def probability_of(logits: Tensor, token_ids: Sequence[int]) -> float:
    """Mean over positions of the probability that the next token is one of token_ids; 0 to 1."""
    wanted = torch.tensor(sorted(set(token_ids)), device=logits.device)
    return float(logits.softmax(dim=-1)[:, wanted].sum(dim=-1).mean())


def repetition(token_ids: Sequence[int], n: int = 3) -> float:
    """Share of n-grams that occurred before: 0 is none, towards 1 all; 0 for a text shorter than n."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
