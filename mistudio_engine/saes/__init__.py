"""Sparse autoencoders: one file an architecture, one a file format. They know no training and no language model."""

from __future__ import annotations

from mistudio_engine.saes.architectures import ARCHITECTURES, new_sae
from mistudio_engine.saes.base import SAE
from mistudio_engine.saes.folding import fold_decoder_norms, fold_normalization
from mistudio_engine.saes.formats import FORMATS, detect_format, format_for, load_sae, save_sae
from mistudio_engine.saes.saelens import read_sparsity

__all__ = [
    "ARCHITECTURES",
    "FORMATS",
    "SAE",
    "detect_format",
    "fold_decoder_norms",
    "fold_normalization",
    "format_for",
    "load_sae",
    "new_sae",
    "read_sparsity",
    "save_sae",
]
