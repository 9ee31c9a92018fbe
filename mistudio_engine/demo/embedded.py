"""The embedded default: where the demo model lies, which text belongs to it, and settings that are known to work.

The folder is an ordinary Hugging Face one, so everything that loads a model loads this one. Nothing here loads it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from mistudio_engine.demo.concepts import CONCEPTS
from mistudio_engine.demo.grammar import Document, corpus

__all__ = [
    "CONCEPTS",
    "DEMO_HOOK",
    "DEMO_SAE",
    "HELD_OUT_SEED",
    "MODEL_FOLDER",
    "SAE_SEED",
    "TRAIN_SEED",
    "Document",
    "corpus",
    "manifest",
    "model_folder",
    "sha256",
]

MODEL_FOLDER = Path(__file__).parent / "model"

TRAIN_SEED = 1
"""The corpus that the language model was trained on."""

SAE_SEED = 11
"""The corpus to train dictionaries on."""

HELD_OUT_SEED = 2
"""The corpus for scores: neither the model nor a dictionary has seen it."""

DEMO_HOOK = "blocks.2.hook_resid_post"
"""Where the demo dictionary reads: the residual stream after block 2, which is `hidden_states[3]`."""

DEMO_SAE: dict[str, Any] = {
    "architecture": "topk",
    "d_sae": 128,
    "k": 8,
    "lr": 3e-2,
    "n_tokens": 500_000,
    "batch_size": 2048,
}
"""Settings of a dictionary that finds the known concepts."""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest() -> dict[str, Any]:
    """What the model was made of: seeds, steps, versions, losses and the hash of its weights."""
    return json.loads((MODEL_FOLDER / "manifest.json").read_text())


@cache
def model_folder() -> Path:
    """The folder of the demo model, its weights checked once a process against the manifest.

    Raises `ValueError` if they are not those that the manifest names.
    """
    weights = MODEL_FOLDER / "model.safetensors"
    found, expected = sha256(weights), manifest()["sha256"]
    if found != expected:
        raise ValueError(
            f"{weights} has sha256 {found} and its manifest says {expected}. "
            "Install mistudio again, or make the model again with python -m mistudio_engine.demo.build_model."
        )
    return MODEL_FOLDER
