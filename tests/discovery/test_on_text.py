"""Features on a text: the strongest first, where they peak, against a contrast, without the dense ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from discovery_data import HOOK

from mistudio_engine.api.errors import BadInput, EmptyData, UnknownHook, WrongShape
from mistudio_engine.discovery.on_text import features_on_text


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


def test_dense_features_are_hidden_and_counted(animals):
    frequency = np.array([0.01, 0.1, 0.9, 0.9, 0.0])
    found = features_on_text(*animals, HOOK, "A dog ran to the cat", frequency=frequency)
    assert [f.feature for f in found.features] == [0, 1]
    assert (found.n_active, found.n_dense_hidden) == (3, 1)


def test_what_cannot_be_answered_says_why(animals):
    with pytest.raises(EmptyData, match="no tokens"):
        features_on_text(*animals, HOOK, "")
    with pytest.raises(BadInput, match="context of"):
        features_on_text(*animals, HOOK, "cat " * 1000)
    with pytest.raises(UnknownHook):
        features_on_text(*animals, "blocks.0.hook_mlp", "cat")
    with pytest.raises(WrongShape, match="3 frequencies for 5 features"):
        features_on_text(*animals, HOOK, "cat", frequency=[0, 0, 0])
    with pytest.raises(BadInput, match="k is 0"):
        features_on_text(*animals, HOOK, "cat", k=0)
