"""How activations are brought to the scale that coefficients are written for: estimated once, at the start.

z = (x − mean)·scale has mean norm √d. What is estimated is folded into the finished SAE (saes/folding.py). It does not
know the trainer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput

__all__ = ["DeadForecast", "Scaling", "dead_forecast", "mean_and_spread"]

_ROWS = 8192


class Scaling(NamedTuple):
    """z = (x − mean)·scale."""

    scale: float = 1.0
    mean: Tensor | None = None
    """(d,), or None for none."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (…, d) in normalised space."""
        centred = x if self.mean is None else x - self.mean
        return centred if self.scale == 1.0 else centred * self.scale

    @classmethod
    def estimate(cls, x: Tensor, *, scale: bool, centre: bool) -> Scaling:
        """From the first activations x (n, d).

        Raises:
            BadInput: they are not finite, or all zero.
        """
        mean, _ = mean_and_spread(x)
        total = sum(
            float((rows.float() - mean if centre else rows.float()).norm(dim=-1).double().sum())
            for rows in x.split(_ROWS)  # x may be the whole buffer: it is not copied
        )
        mean_norm = total / len(x)
        if not math.isfinite(mean_norm) or mean_norm == 0:
            raise BadInput(
                f"The activations cannot be trained on: their mean norm is {mean_norm}.",
                why="The language model overflows in this precision, or the hook carries nothing.",
                fix="Load the model in fp32 or bf16, or choose another hook.",
            )
        factor = math.sqrt(x.shape[-1]) / mean_norm if scale else 1.0
        return cls(factor, mean if centre else None)


class DeadForecast(NamedTuple):
    """What the activations say, before the first step, about features that will never fire."""

    outlier_ratio: float
    """‖mean‖/‖standard deviation‖: 0 is centred; above 1 the mean outweighs what differs between tokens."""

    dead_fraction: float
    """Share of features that are expected to start dead, 0 to 1."""


def dead_forecast(x: Tensor, centred: bool, window: int) -> DeadForecast:
    """How many features start where they never fire, because they point away from the mean (arXiv 2605.31518).

    Along a random direction the mean is a normal number with standard deviation ‖μ‖/√d and tokens scatter around it
    with ‖σ‖/√d: a feature is dead when its mean is further below zero than the furthest of `window` tokens reaches up.

    Args:
        x: raw activations, (n, d).
        centred: whether the encoder sees them with their mean subtracted.
        window: tokens after which a feature counts as dead.
    """
    mean, spread = mean_and_spread(x)
    ratio = float(mean.norm() / spread.norm().clamp_min(1e-20))
    reach = math.sqrt(2 * math.log(max(window, 2)))
    dead = 0.0 if centred or ratio == 0 else 0.5 * math.erfc(reach / ratio / math.sqrt(2))
    return DeadForecast(ratio, dead)


def mean_and_spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension of x (n, d), summed in float64, in fp32."""
    total = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
    squares = torch.zeros_like(total)
    for rows in x.split(_ROWS):
        total += rows.sum(dim=0, dtype=torch.float64)
    mean = total / len(x)
    for rows in x.split(_ROWS):
        squares += (rows.double() - mean).pow(2).sum(dim=0)
    return mean.float(), (squares / len(x)).sqrt().float()
