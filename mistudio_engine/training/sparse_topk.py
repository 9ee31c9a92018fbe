"""TopK's forward and backward pass that touch only the k active features of each token.

Beside the one dense product that finds the k largest, the cost is proportional to k and not to d_sae: decoding gathers
k decoder rows, and both weight gradients are sums over the tokens on which a feature was active. The result is that of
the dense computation in saes/topk.py within rounding. It knows no loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mistudio_engine.saes.topk import TopKSAE

__all__ = ["SparseOutput", "sparse_forward"]


class SparseOutput(NamedTuple):
    """What one pass gives."""

    sae_out: Tensor
    """(batch, d_in), with gradient."""

    values: Tensor
    """(batch, k): relu'd pre-activations *without* decoder norms, no gradient."""

    indices: Tensor
    """(batch, k)."""


def sparse_forward(sae: TopKSAE, z: Tensor) -> SparseOutput:
    """Reconstruct z (batch, d_in), chosen by pre-activation times decoder norm where the config says so.

    The activation p·n is divided by n when it is decoded, so n cancels out of the reconstruction and of its gradient:
    it only takes part in the choice.
    """
    sae_out, values, indices = _SparseTopK.apply(  # pyright: ignore[reportGeneralTypeIssues]
        z, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.cfg.k,
        sae.cfg.rescale_acts_by_decoder_norm, sae.cfg.apply_b_dec_to_input,
    )  # fmt: skip
    return SparseOutput(sae_out, values, indices)


class _SparseTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        k: int,
        rescale: bool,
        centre: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred = z - b_dec if centre else z
        hidden_pre = torch.addmm(b_enc, centred, W_enc)  # (batch, d_sae), the only one
        if rescale:
            norms = W_dec.norm(dim=-1)
            top = torch.topk(hidden_pre.mul_(norms), k, dim=-1, sorted=False)
            values = top.values.relu().div_(norms[top.indices].clamp_min_(torch.finfo(norms.dtype).tiny))
        else:
            top = torch.topk(hidden_pre, k, dim=-1, sorted=False)
            values = top.values.relu()
        sae_out = functional.embedding_bag(top.indices, W_dec, per_sample_weights=values, mode="sum") + b_dec
        ctx.save_for_backward(centred, W_enc, W_dec, values, top.indices)
        ctx.centre = centre
        ctx.mark_non_differentiable(values, top.indices)
        return sae_out, values, top.indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_out = grads[0].contiguous()
        centred, W_enc, W_dec, values, indices = ctx.saved_tensors
        # d loss/d value = ⟨gradient, decoder row⟩: embedding_bag's own backward computes just these dot products.
        with torch.enable_grad():
            leaf = values.detach().requires_grad_()
            decoded = functional.embedding_bag(indices, W_dec.detach(), per_sample_weights=leaf, mode="sum")
            (grad_values,) = torch.autograd.grad(decoded, leaf, grad_out)
        grad_values = grad_values * (values > 0)

        # The pairs (token, feature) sorted by feature: each feature's gradient is then one bag, summed in token order.
        flat = indices.reshape(-1)
        order = torch.argsort(flat, stable=True)
        tokens = order // indices.shape[1]
        offsets = torch.zeros(W_dec.shape[0] + 1, dtype=torch.long, device=flat.device)
        torch.cumsum(torch.bincount(flat, minlength=W_dec.shape[0]), 0, out=offsets[1:])

        def per_feature(rows: Tensor, weights: Tensor) -> Tensor:
            weights = weights.reshape(-1)[order]
            return functional.embedding_bag(tokens, rows, offsets[:-1], per_sample_weights=weights, mode="sum")

        grad_W_dec = per_feature(grad_out, values)  # (d_sae, d_in)
        grad_W_enc = per_feature(centred, grad_values).T  # (d_in, d_sae)
        grad_b_enc = per_feature(torch.ones_like(grad_out[:, :1]), grad_values).squeeze(1)
        grad_b_dec = grad_out.sum(dim=0)
        if ctx.centre:
            grad_b_dec = grad_b_dec - W_enc @ grad_b_enc
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None, None
