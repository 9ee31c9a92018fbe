"""The embedded default."""
from __future__ import annotations
import hashlib
from pathlib import Path
from mistudio_engine.demo.grammar import corpus
MODEL_FOLDER = Path(__file__).parent / "model"
TRAIN_SEED = 1
HELD_OUT_SEED = 2
def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
def model_folder() -> Path:
    """Where the embedded model lies."""
    return MODEL_FOLDER
