"""Controls: what steering does by its size alone, whatever the direction.

A claim about a feature needs the same steering along a direction that means nothing. Both kinds here are seeded and
leave the global random state alone. It knows no model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput
from mistudio_engine.saes import SAE
from mistudio_engine.steering.interventions import Intervention, feature_direction

__all__ = ["control_for", "random_direction", "random_feature"]


def random_direction(like: Tensor, seed: int) -> Tensor:
    """A direction drawn uniformly from the sphere, with the norm, shape, dtype and device of `like` (width,)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    norm = like.detach().double().norm().cpu()
    return (drawn * (norm / drawn.norm())).to(like.device, like.dtype)


def random_feature(sae: SAE, seed: int, exclude: Collection[int] = ()) -> int:
    """The index of a feature drawn uniformly from those with a decoder row that is not zero, `exclude` left out.

    Raises:
        BadInput: nothing is left to draw from.
    """
    allowed = sae.W_dec.detach().norm(dim=1).cpu() > 0  # (d_sae,)
    allowed[list(exclude)] = False
    candidates = allowed.nonzero().flatten()
    if len(candidates) == 0:
        raise BadInput(
            f"No feature is left to draw a control from: {len(allowed)} features, {len(exclude)} excluded.",
            fix="Exclude fewer features, or use random_direction.",
        )
    generator = torch.Generator().manual_seed(seed)
    return int(candidates[torch.randint(len(candidates), (1,), generator=generator)])


def control_for(it: Intervention, seed: int, exclude: Collection[int] = ()) -> Intervention:
    """The same change with a random feature of the same SAE, or along a random direction where there is no SAE.

    The length is the same: a feature's direction has length 1, a random one the length of `it.vector`.

    Args:
        exclude: features that are no control, beside the intervention's own: its near-duplicates, say.
    """
    if it.sae is None or it.feature is None:
        return replace(it, vector=random_direction(it.vector, seed))
    feature = random_feature(it.sae, seed, {it.feature, *exclude})
    direction, _ = feature_direction(it.sae, feature)
    return replace(it, vector=direction, feature=feature)
