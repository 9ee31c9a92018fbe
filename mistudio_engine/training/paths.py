"""Dense or sparse: which way a batch's code is computed, and the code made that way.

Both give the same objective (within rounding); which is faster depends on how many features take part. The choice
follows from the data alone and is part of a training's state, so a training that is resumed chooses the same. It knows
no loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mistudio_engine.api.sae_config import SAEConfig
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.saes import SAE
from mistudio_engine.training.codes import Code, DenseCode, SparseCode
from mistudio_engine.training.selection import Selector

__all__ = ["Paths", "computes_in_bf16"]

_SPARSE_PAYS = 4
"""With k fixed, the sparse path is taken where d_sae is more than this many times k."""

_TRY_SPARSE = 64
"""Otherwise it is tried where at most one feature in this many was active (measured: it breaks even near one in 50)."""

_MOST_PAIRS = 32
"""And given up for a batch in which more than one in this many takes part: JumpReLU's windows count, too."""

_REST = 16
"""Steps until it is tried again after that."""

_DENSE_BYTES = 16 << 20
"""Of one dense (tokens, d_sae) matrix on a CPU: larger ones are fresh pages from the system each time, which costs
more than the arithmetic."""

_FEWEST_ROWS = 256

_BF16_PAYS = 1 << 19
"""Below this size of W_enc a product in bfloat16 wins nothing."""


def computes_in_bf16(cfg: SAEConfig, hp: Hyperparameters, device: torch.device) -> bool:
    """Whether the large products are made in bfloat16: by `hp.precision`, or where the machine is fast at it."""
    if hp.precision != "auto":
        return hp.precision == "bf16"
    if cfg.d_in * cfg.d_sae < _BF16_PAYS:
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


class Paths:
    """Makes the codes of one SAE in training.

    Args:
        cfg: its config.
        hp: `path` and what the choice needs.
        bf16: make large products in bfloat16.
    """

    def __init__(self, cfg: SAEConfig, hp: Hyperparameters, bf16: bool) -> None:
        self.cfg, self.hp, self.bf16 = cfg, hp, bf16
        self._selector = Selector(bf16)
        self._k = int(getattr(cfg, "k", 0))
        self._rest = 0
        self._n_active: float | None = None

    def code(self, sae: SAE, x: Tensor) -> Code:
        """The code of centred inputs x (n_tokens, d_in)."""
        if self._k:
            return self._with_k(sae, x)
        chosen = self._chosen_above(sae, x) if self._tries_sparse() else None
        if chosen is None:
            return DenseCode(sae, x, self.bf16)
        return SparseCode(sae, x, chosen.pairs, chosen.projection, self.bf16)

    def codes(self, sae: SAE, x: Tensor, rows: int) -> Iterator[Code]:
        """The codes of so many tokens at a time; BatchTopK chooses among all of x, however it is cut."""
        if self.cfg.activation != "batchtopk" or rows >= len(x):
            yield from (self.code(sae, part) for part in x.split(rows))
            return
        chosen = self._selector.batch_top_k(x, sae.W_enc.detach(), *self._edges(sae), self._k, rows)
        for start in range(0, len(x), rows):
            part = x[start : start + rows]
            pairs, where = chosen.pairs.between(start, start + len(part))
            if self._is_sparse_with_k():
                yield SparseCode(sae, part, pairs, chosen.projection[where], self.bf16)
            else:
                yield DenseCode(sae, part, self.bf16, pairs.mask())

    def rows_at_once(self, n_tokens: int, device: torch.device) -> int:
        """How many tokens of a batch to work on at a time, for memory's and for speed's sake."""
        if self._is_sparse_with_k() or (not self._k and self._tries_sparse()) or device.type != "cpu":
            return n_tokens
        if self.cfg.activation == "batchtopk":
            return n_tokens  # in parts, its choice over the whole batch would be a pass of its own
        return min(n_tokens, max(_FEWEST_ROWS, _DENSE_BYTES // ((2 if self.bf16 else 4) * self.cfg.d_sae)))

    def learn(self, l0: float) -> None:
        """Take note of a step's mean number of active features."""
        self._n_active = l0
        self._rest = max(0, self._rest - 1)

    def state(self) -> dict[str, Any]:
        """What the choice depends on."""
        return {"n_active": self._n_active, "rest": self._rest}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        self._n_active, self._rest = state["n_active"], state["rest"]

    def _is_sparse_with_k(self) -> bool:
        return bool(self._k) and (
            self.hp.path == "sparse" or (self.hp.path == "auto" and self.cfg.d_sae > _SPARSE_PAYS * self._k)
        )

    def _tries_sparse(self) -> bool:
        if self.hp.path != "auto":
            return self.hp.path == "sparse"
        return self._n_active is not None and not self._rest and self._n_active * _TRY_SPARSE <= self.cfg.d_sae

    def _edges(self, sae: SAE) -> tuple[Tensor, Tensor | None]:
        """What makes of projections the scores that are chosen by: b_enc and decoder norms, None for ones."""
        norms = sae.W_dec.detach().norm(dim=-1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", True) else None
        return sae.get_parameter("b_enc").detach(), norms

    def _with_k(self, sae: SAE, x: Tensor) -> Code:
        b_enc, norms = self._edges(sae)
        over_batch = self.cfg.activation == "batchtopk"
        if self._is_sparse_with_k():
            find = self._selector.batch_top_k if over_batch else self._selector.top_k
            chosen = find(x, sae.W_enc.detach(), b_enc, norms, self._k)
            return SparseCode(sae, x, chosen.pairs, chosen.projection, self.bf16)
        code = DenseCode(sae, x, self.bf16)
        with torch.no_grad():
            scores = (code.projection.detach() + code.of(b_enc)).float()
            scores = scores if norms is None else scores * norms
            flat = scores.relu().view(1, -1) if over_batch else scores
            k = self._k * len(x) if over_batch else self._k
            top = torch.topk(flat, k, dim=-1, sorted=False).indices
            code.mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, top, True).view_as(scores)
        return code

    def _chosen_above(self, sae: SAE, x: Tensor) -> Any:
        """The pairs that are active, or near enough to a threshold to move it; None where they are too many."""
        edge: Tensor | float = 0.0
        bias = sae.get_parameter("b_gate" if self.cfg.activation == "gated" else "b_enc").detach()
        if self.cfg.activation == "jumprelu":
            edge = sae.get_parameter("threshold").detach() - self.hp.jumprelu_bandwidth / 2
        most = len(x) * self.cfg.d_sae
        if self.hp.path == "auto":
            most //= _MOST_PAIRS
        chosen = self._selector.above(x, sae.W_enc.detach(), bias, edge, most)
        if chosen is None:
            self._rest = _REST
        return chosen
