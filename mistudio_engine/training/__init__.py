"""Training SAEs and measuring them. It knows language models and SAEs, and neither jobs nor where anything is kept."""

from __future__ import annotations

from mistudio_engine.training.activation_cache import CachedActivations, write_cache
from mistudio_engine.training.activations import ActivationStream, LiveActivations
from mistudio_engine.training.checkpoints import Latest, latest_good, restore_checkpoint, save_checkpoint
from mistudio_engine.training.evaluation import evaluate
from mistudio_engine.training.loop import Member, train
from mistudio_engine.training.trainer import StepMetrics, Trainer

__all__ = [
    "ActivationStream",
    "CachedActivations",
    "Latest",
    "LiveActivations",
    "Member",
    "StepMetrics",
    "Trainer",
    "evaluate",
    "latest_good",
    "restore_checkpoint",
    "save_checkpoint",
    "train",
    "write_cache",
]
