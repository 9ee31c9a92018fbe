"""The shipped model: the bytes it should be, loadable like any other, and a language model worth the name."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from math import log
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from mistudio_engine.demo import embedded
from mistudio_engine.demo.build_model import build, held_out_loss, pack
from mistudio_engine.demo.concepts import CONCEPT_NAMES
from mistudio_engine.demo.embedded import DEMO_HOOK, HELD_OUT_SEED, TRAIN_SEED, corpus, manifest, model_folder, sha256
from mistudio_engine.demo.masks import concept_mask
from mistudio_engine.demo.steering_case import concept_tokens, steering_case


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder(), local_files_only=True).eval()


def test_the_weights_are_those_of_the_manifest() -> None:
    assert sha256(model_folder() / "model.safetensors") == manifest()["sha256"]


def test_other_weights_than_the_manifests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"other")
    (tmp_path / "manifest.json").write_text(json.dumps({"sha256": "0" * 64}))
    monkeypatch.setattr(embedded, "MODEL_FOLDER", tmp_path)
    model_folder.cache_clear()
    try:
        with pytest.raises(ValueError, match="build_model"):
            model_folder()
    finally:
        model_folder.cache_clear()


def test_the_folder_is_small_and_knows_no_machine() -> None:
    files = list(model_folder().iterdir())
    assert sum(file.stat().st_size for file in files) < 4_000_000
    for file in files:
        if file.suffix == ".json":
            assert not [path for path in ("/work", "/tmp", "/home", "/root") if path in file.read_text()], file.name


def test_the_model_is_in_single_precision_and_has_the_demo_hook(model: PreTrainedModel) -> None:
    assert model.dtype == torch.float32
    assert int(DEMO_HOOK.split(".")[1]) < model.config.num_hidden_layers
    assert model.config.max_position_embeddings >= manifest()["context"]


def test_the_held_out_loss_is_the_manifests(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert held_out_loss(model, tokenizer) == pytest.approx(manifest()["held_out_loss"], abs=0.01)


def test_the_model_knows_more_than_pairs_of_words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    train, held_out = (
        pack(tokenizer, [document.text for document in corpus(n, seed)]).flatten().tolist()
        for n, seed in ((2000, TRAIN_SEED), (60, HELD_OUT_SEED))
    )
    words, pairs = Counter(train), Counter(pairwise(train))
    unigram = sum(-log((words[b] + 1) / (len(train) + len(tokenizer))) for b in held_out[1:]) / (len(held_out) - 1)
    bigram = 0.0
    for a, b in pairwise(held_out):
        backing_off = (words[b] + 1) / (len(train) + len(tokenizer))
        bigram -= log((pairs[a, b] + 5 * backing_off) / (words[a] + 5)) / (len(held_out) - 1)
    assert manifest()["held_out_loss"] < bigram - 0.5 < unigram - 1


def test_the_stream_at_the_hook_already_predicts_the_next_word(model: PreTrainedModel, tokenizer) -> None:
    """So that the logit lens of a feature there shows words that the feature makes likely."""
    tokens = pack(tokenizer, [document.text for document in corpus(20, HELD_OUT_SEED)])
    with torch.no_grad():
        stream = model(tokens[:, :-1], output_hidden_states=True).hidden_states[1 + int(DEMO_HOOK.split(".")[1])]
        logits = model.lm_head(model.model.norm(stream))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert loss < manifest()["held_out_loss"] + 0.3


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("The old dog ran to the mill.", "Ünïcode 🦊, tabs\tand x = f(y)!", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def test_nearly_every_word_of_the_corpus_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = corpus(40, HELD_OUT_SEED)
    n_tokens = sum(len(tokenizer(document.text, add_special_tokens=False)["input_ids"]) for document in documents)
    assert n_tokens < 1.02 * sum(len(document.words) for document in documents)


def test_masks_lie_on_the_tokens_of_the_words(tokenizer: PreTrainedTokenizerFast) -> None:
    for document in corpus(20, HELD_OUT_SEED):
        encoded = tokenizer(document.text, return_offsets_mapping=True)
        mask = concept_mask(document, encoded["offset_mapping"])
        assert mask.shape == (len(encoded["input_ids"]), len(CONCEPT_NAMES))
        assert not mask[0].any(), "BOS stands for no text"
        words = {word.start: word for word in document.words}
        for row, (start, end) in enumerate(encoded["offset_mapping"][1:], start=1):
            start += document.text[start:end].startswith(" ")
            if start in words:
                assert {CONCEPT_NAMES[i] for i in mask[row].nonzero().flatten()} == words[start].concepts


def test_a_token_in_the_middle_of_a_word_has_the_words_concepts() -> None:
    document = corpus(1, 0)[0]
    word = next(word for word in document.words if word.concepts and word.end - word.start > 3)
    mask = concept_mask(document, [(0, 0), (word.start + 1, word.start + 2)])
    assert not mask[0].any()
    assert {CONCEPT_NAMES[i] for i in mask[1].nonzero().flatten()} == word.concepts


def test_the_steering_case_names_tokens_and_prompts_of_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    case = steering_case()
    assert case.concept in CONCEPT_NAMES and case.target in CONCEPT_NAMES
    for token in case.tokens:
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1, token
    assert not any(token in f"{prompt} " for prompt in case.prompts for token in case.tokens)


@pytest.mark.parametrize("concept", ["food", "colour", "feeling", "motion", "number"])
def test_lexical_concepts_have_tokens(concept: str) -> None:
    tokens = concept_tokens(concept)
    assert len(tokens) > 10 and all(token.startswith(" ") for token in tokens)


def test_a_contextual_concept_has_no_tokens_of_its_own() -> None:
    with pytest.raises(ValueError, match="lexical"):
        concept_tokens("quotation")


def test_the_script_makes_the_same_bytes_twice(tmp_path: Path) -> None:
    manifests = [build(tmp_path / name, n_documents=40, n_steps=4) for name in ("one", "two")]
    other = build(tmp_path / "other", n_documents=40, n_steps=4, seed=1)
    assert manifests[0] == manifests[1] and other["sha256"] != manifests[0]["sha256"]
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    names = {file.name for file in model_folder().iterdir()}
    assert names == {file.name for file in (tmp_path / "one").iterdir()}
