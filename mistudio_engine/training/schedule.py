"""How the learning rate and the sparsity penalty rise and fall over a run: functions of the step, and of nothing
else."""

from __future__ import annotations

import math

from mistudio_engine.api.training_config import Hyperparameters

__all__ = ["lr_factor", "sparsity_factor"]


def lr_factor(step: int, hp: Hyperparameters) -> float:
    """Share of the learning rate at a step (from 0): linear warm-up, constant, then the fall to lr_end_fraction."""
    warm_up, decay = hp.lr_warm_up_steps, hp.lr_decay_steps
    rising = (step + 1) / warm_up if step < warm_up else 1.0
    left = max(0, hp.n_steps - step) / decay if step > hp.n_steps - decay else 1.0
    if hp.lr_decay == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return min(rising, hp.lr_end_fraction + (1 - hp.lr_end_fraction) * left)


def sparsity_factor(step: int, hp: Hyperparameters) -> float:
    """Share of the L1 or L0 penalty's weight at a step (from 0): linear warm-up from nothing, constant, linear fall."""
    warm_up, decay = hp.sparsity_warm_up_steps, hp.sparsity_decay_steps
    rising = min(1.0, step / warm_up) if warm_up else 1.0
    falling = max(0, hp.n_steps - step) / decay if step > hp.n_steps - decay else 1.0
    return min(rising, falling)
