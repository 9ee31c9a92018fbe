"""Features on a text: the strongest first, where they peak, against a contrast, without the dense ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from discovery_data import HOOK
from transformers import LlamaConfig, LlamaForCausalLM

from mistudio_engine.api.errors import BadInput, EmptyData, UnknownHook, WrongShape
from mistudio_engine.api.sae_config import parse_sae_config
from mistudio_engine.discovery.on_text import features_on_text
from mistudio_engine.models.hooks import activations
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.saes import ARCHITECTURES


@pytest.fixture
def lm(tokenizer) -> LanguageModel:
    """A random Llama of two layers, read before the first."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return LanguageModel(LlamaForCausalLM(config), tokenizer, name="random", folder=Path("random"))


def random_sae(architecture: str, d_in: int, d_sae: int):
    """An SAE of random tensors that fires on some tokens."""
    torch.manual_seed(1)
    extra = {"k": 7} if architecture == "topk" else {}
    cfg = parse_sae_config(
        {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "hook_name": HOOK, "model_name": "random", **extra}
    )
    tensors = {name: torch.randn(shape) * 0.5 for name, shape in cfg.tensor_shapes().items()}
    tensors |= {name: tensor.abs() * 0.01 for name, tensor in tensors.items() if name == "threshold"}
    return ARCHITECTURES[architecture](cfg, tensors)


@pytest.fixture
def animals(planted, tokenizer):
    """Feature 0: cats (strongly), 1: dogs, 2: every token, 3: BOS, 4: nothing."""

    def ids(*words):
        return [tokenizer(word, add_special_tokens=False).input_ids[-1] for word in words]

    table = torch.zeros(len(tokenizer), 5)
    table[ids(" cat"), 0] = 9.0
    table[ids(" dog"), 1] = 4.0
    table[:, 2] = 1.0
    table[tokenizer.bos_token_id, 3] = 50.0
    return planted(table)


def test_the_strongest_feature_comes_first_and_says_where_it_peaks(animals):
    found = features_on_text(*animals, HOOK, "A dog ran to the cat")
    assert [f.feature for f in found.features] == [0, 1, 2]
    cat, dog, _ = found.features
    assert found.tokens[cat.position] == " cat"
    assert found.tokens[dog.position] == " dog"
    assert (cat.max, dog.max) == (9.0, 4.0)
    assert cat.values.tolist() == [9.0 if token == " cat" else 0.0 for token in found.tokens]
    assert cat.difference is None
    assert found.n_active == 3


def test_special_tokens_are_shown_but_never_count(animals):
    found = features_on_text(*animals, HOOK, "A dog")
    assert found.tokens[0] == "<s>"
    assert 3 not in [f.feature for f in found.features]
    assert all(f.values[0] == 0 for f in found.features)


def test_a_contrast_text_ranks_by_the_difference_in_either_direction(animals):
    found = features_on_text(*animals, HOOK, "The cat ran", "The dog ran")
    assert [(f.feature, f.difference) for f in found.features] == [(0, 9.0), (2, 0.0), (1, -4.0)]
    assert found.features[-1].max == 0.0
    two = features_on_text(*animals, HOOK, "The cat ran", "The dog ran", k=2)
    assert [f.feature for f in two.features] == [0, 1]


def test_what_is_left_out_is_counted_once_for_its_first_reason(animals):
    leave_out = {"dense": [False, False, True, True, False], "badly_scored": [False, True, True, False, True]}
    found = features_on_text(*animals, HOOK, "A dog ran to the cat", leave_out=leave_out)
    assert [f.feature for f in found.features] == [0]
    assert (found.n_active, found.left_out) == (3, {"dense": 1, "badly_scored": 1})


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_the_sparse_way_finds_what_the_dense_activations_hold(architecture, lm, tokenizer):
    sae = random_sae(architecture, lm.d_model, 96)
    text, contrast = "The red dog ran to the cat and said no", "Tom and Anna did not see the red house"
    found = features_on_text(lm, sae, HOOK, text, contrast, k=96)
    ids = lm.encode(text, bos=True)
    counted = torch.tensor([each not in lm.special_ids for each in ids])
    acts = sae.encode(activations(lm, torch.tensor([ids]), [HOOK])[HOOK][0]) * counted[:, None]
    others = lm.encode(contrast, bos=True)
    peak = sae.encode(activations(lm, torch.tensor([others]), [HOOK])[HOOK][0])[1:].amax(0)
    fires = acts.amax(0) > 0
    assert found.n_active == int(fires.sum()) > 0
    assert {f.feature for f in found.features} == set((fires | (peak > 0)).nonzero().squeeze(1).tolist())
    for each in found.features:
        np.testing.assert_allclose(each.values, acts[:, each.feature].numpy(), rtol=1e-5, atol=1e-6)
        assert each.position == int(acts[:, each.feature].argmax())
        assert each.difference == pytest.approx(float(acts[:, each.feature].max() - peak[each.feature]), abs=1e-5)
    differences = [each.difference for each in found.features]
    assert differences == sorted(differences, reverse=True)


def test_what_cannot_be_answered_says_why(animals):
    with pytest.raises(EmptyData, match="no tokens"):
        features_on_text(*animals, HOOK, "")
    with pytest.raises(BadInput, match="context of"):
        features_on_text(*animals, HOOK, "cat " * 1000)
    with pytest.raises(UnknownHook):
        features_on_text(*animals, "blocks.0.hook_mlp", "cat")
    with pytest.raises(WrongShape, match="there are 5 features"):
        features_on_text(*animals, HOOK, "cat", leave_out={"dense": [False] * 3})
    with pytest.raises(BadInput, match="k is 0"):
        features_on_text(*animals, HOOK, "cat", k=0)
