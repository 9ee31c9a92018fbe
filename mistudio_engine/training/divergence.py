"""Tells when a training must end before a step is taken: numbers that are not finite, or a loss that has exploded.

It sees what a step measured, and knows no optimizer.
"""

from __future__ import annotations

import math

from torch import Tensor

from mistudio_engine.api.errors import JobFailed
from mistudio_engine.api.training_config import Hyperparameters

__all__ = ["Divergence"]

_EXPLODED_FVU = 100.0
_EXPLODED_STEPS = 20
"""A hundred times worse than the mean for this many steps in a row does not come back."""


class Divergence:
    """Watches over the steps of one SAE.

    Args:
        hp: what the advice names.
    """

    def __init__(self, hp: Hyperparameters) -> None:
        self.hp = hp
        self.n_exploded = 0
        """Steps in a row with an exploded loss; part of a training's state."""

    def check(self, step: int, numbers: dict[str, float], fvu: float, z: Tensor, y: Tensor) -> None:
        """Let a step pass.

        Args:
            step: its number.
            numbers: what has to be finite, by its name.
            fvu: of this step.
            z: its inputs and
            y: its targets, looked at only to say whose fault it is.

        Raises:
            JobFailed: with advice.
        """
        for what, number in numbers.items():
            if not math.isfinite(number):
                raise self._failure(step, f"The {what} is {number}", z, y)
        self.n_exploded = self.n_exploded + 1 if fvu > _EXPLODED_FVU else 0
        if self.n_exploded >= _EXPLODED_STEPS:
            raise self._failure(step, f"The reconstruction error has been {fvu:.3g} times the variance for long", z, y)

    def _failure(self, step: int, what: str, z: Tensor, y: Tensor) -> JobFailed:
        if not bool(z.isfinite().all()) or not bool(y.isfinite().all()):
            return JobFailed(
                f"The activations at step {step} have NaN or infinite values.",
                why="The language model overflows in this precision.",
                fix="Load the model in fp32 or bf16, then resume from the last checkpoint.",
            )
        return JobFailed(
            f"{what} at step {step}: training has diverged.",
            why=f"lr is {self.hp.lr:g}, the gradient is clipped at {self.hp.clip_grad_norm:g}.",
            fix="Start again with a lower lr (a third) or a longer lr_warm_up_fraction; the last checkpoint is finite.",
        )
