"""Embedders that are servers: batches, tries, refusals, and answers that are no vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from embedding_server import EmbeddingServer, serve_embeddings, vector_of

from mistudio_engine.api.errors import BadInput, CorruptFile, MistudioError, Unreachable
from mistudio_engine.discovery import embedding_servers
from mistudio_engine.discovery.embedding_servers import OllamaEmbedder, OpenAIEmbedder

Open = Callable[..., OpenAIEmbedder | OllamaEmbedder]


@pytest.fixture
def server() -> Iterator[EmbeddingServer]:
    with serve_embeddings() as server:
        yield server


@pytest.fixture(params=["openai", "ollama"])
def opened(request: pytest.FixtureRequest, server: EmbeddingServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """`opened()`: an embedder of either protocol, whose waits between tries are short."""
    monkeypatch.setattr(embedding_servers, "FIRST_BACKOFF_SECONDS", 0.01)

    made: list[OpenAIEmbedder | OllamaEmbedder] = []

    def make(model: str = "tiny-embed") -> OpenAIEmbedder | OllamaEmbedder:
        if request.param == "openai":
            made.append(OpenAIEmbedder(model, base_url=f"{server.url}/v1", api_key="sk-mine-0123456789"))
        else:
            made.append(OllamaEmbedder(model, base_url=server.url))
        return made[-1]

    yield make
    for embedder in made:
        embedder.close()


def test_vectors_come_in_the_order_of_the_texts_at_length_one_in_batches(opened: Open, server: EmbeddingServer):
    embedder = opened()
    embedder.embed(["dimension"])
    assert embedder.dimension == 12
    texts = [f"text {at}" for at in range(150)]
    vectors = embedder.embed(texts)
    expected = np.array([vector_of(text, 12) for text in texts])
    np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    assert [len(each) for each in server.inputs] == [1, 64, 64, 22]
    assert embedder.embed([]).shape == (0, 12)


def test_what_fails_in_passing_is_tried_again_and_then_is_an_error(opened: Open, server: EmbeddingServer):
    server.failures = [(500, "broken"), (429, "slow down")]
    assert opened().embed(["cat"]).shape == (1, 12)
    server.failures = [(503, "still loading")] * 3
    with pytest.raises(Unreachable, match="still loading"):
        opened().embed(["cat"])
    assert len(server.inputs) == 6


def test_an_unknown_model_is_said_at_once(opened: Open, server: EmbeddingServer):
    with pytest.raises(BadInput, match="no model 'other'"):
        opened("other").embed(["cat"])
    assert len(server.inputs) == 1


@pytest.mark.parametrize("raw", [b"<html>", b"{}", b'{"data": [], "embeddings": []}', b'{"embeddings": [["a"]]}'])
def test_an_answer_that_is_no_vectors_is_an_error_of_ours(opened: Open, server: EmbeddingServer, raw: bytes):
    server.raw = raw
    with pytest.raises((CorruptFile, Unreachable)):
        opened().embed(["cat"])


def test_vectors_of_another_length_than_before_are_refused(opened: Open, server: EmbeddingServer):
    embedder = opened()
    embedder.embed(["dimension"])
    server.dimension = 5
    with pytest.raises(CorruptFile, match=r"\(1, 5\), not \(…, 12\)"):
        embedder.embed(["cat"])


def test_a_refused_key_is_not_repeated_in_the_error(server: EmbeddingServer):
    server.key = "sk-right-0123456789"
    embedder = OpenAIEmbedder(
        "tiny-embed",
        base_url=f"{server.url}/v1",
        api_key="sk-wrong-0123456789",
        redact=lambda text: text.replace("sk-wrong-0123456789", "[secret]"),
    )
    with pytest.raises(MistudioError) as caught:
        embedder.embed(["cat"])
    assert "refused the key" in str(caught.value)
    assert "sk-wrong" not in str(caught.value)
    embedder.close()
    with pytest.raises(BadInput, match="no key for OpenAI"):
        OpenAIEmbedder("text-embedding-3-small")


def test_nobody_listening_is_said_within_seconds(opened: Open, server: EmbeddingServer):
    with serve_embeddings() as gone:
        url = gone.url
    embedder = OllamaEmbedder("tiny-embed", base_url=url)
    with pytest.raises(Unreachable, match="nobody listens"):
        embedder.embed(["cat"])
    embedder.close()


def test_an_embedder_that_somebody_closed_says_so(opened: Open):
    embedder = opened()
    embedder.embed(["dimension"])
    embedder.close()
    with pytest.raises(Unreachable, match="not asked any more"):
        embedder.embed(["cat"])
