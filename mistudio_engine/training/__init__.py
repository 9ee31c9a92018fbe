"""Training SAEs and measuring them. It knows language models and SAEs, and neither jobs nor where anything is kept."""

from __future__ import annotations

from mistudio_engine.training.activations import ActivationStream
from mistudio_engine.training.checkpoints import Latest, latest_good, save_checkpoint
from mistudio_engine.training.evaluation import evaluate
from mistudio_engine.training.loop import train
from mistudio_engine.training.trainer import StepMetrics, Trainer

__all__ = [
    "ActivationStream",
    "Latest",
    "StepMetrics",
    "Trainer",
    "evaluate",
    "latest_good",
    "save_checkpoint",
    "train",
]
