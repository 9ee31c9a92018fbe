"""One feature on many texts: the numbers of each text alone, and verdicts as scikit-learn gives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from discovery_data import HOOK
from discovery_data import drain as drained
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from mistudio_engine.api.errors import BadInput, EmptyData
from mistudio_engine.discovery import feature_test as module
from mistudio_engine.discovery.feature_test import feature_on_texts, verdict
from mistudio_engine.models.hooks import activations

TEXTS = [
    "The cat sat on the mat.",
    "dog",
    "In 1984 there were 42 horses, not 17.",
    "Привет мир. 你好世界。",
    "cats cats",
]


def random_planted(planted, tokenizer):
    table = torch.rand(len(tokenizer), 6, generator=torch.Generator().manual_seed(0))
    table[table < 0.4] = 0
    return planted(table), table


def test_each_text_has_the_values_that_it_has_alone(planted, tokenizer):
    (lm, sae), table = random_planted(planted, tokenizer)
    found, steps = drained(feature_on_texts(lm, sae, HOOK, 3, TEXTS))
    assert steps[-1] == len(TEXTS)
    for text, on_text in zip(TEXTS, found, strict=True):
        ids = lm.encode(text, bos=True)
        assert on_text.token_ids == ids
        alone = sae.encode(activations(lm, torch.tensor([ids]), [HOOK])[HOOK])[0, :, 3]
        np.testing.assert_allclose(on_text.values[1:], alone[1:], atol=1e-6)
        np.testing.assert_allclose(on_text.values[1:], table[ids[1:], 3], atol=1e-6)
        assert on_text.values[0] == 0, "BOS does not count"
        assert on_text.max == on_text.values.max()
        assert on_text.position == 1 + int(np.argmax(on_text.values[1:]))


def test_batches_do_not_matter(planted, tokenizer, monkeypatch):
    (lm, sae), _ = random_planted(planted, tokenizer)
    together, _ = drained(feature_on_texts(lm, sae, HOOK, 2, TEXTS))
    monkeypatch.setattr(module, "_STEP_TOKENS", 1)
    alone, steps = drained(feature_on_texts(lm, sae, HOOK, 2, TEXTS))
    assert steps == [1, 2, 3, 4, 5]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_a_feature_that_fires_nowhere_peaks_at_the_first_token_that_counts(planted, tokenizer):
    lm, sae = planted(torch.zeros(len(tokenizer), 4))
    found, _ = drained(feature_on_texts(lm, sae, HOOK, 1, ["The cat"]))
    assert (found[0].max, found[0].position) == (0.0, 1)


def test_a_verdict_is_scikit_learns():
    generator = np.random.default_rng(0)
    expected = generator.random(40) < 0.4
    maxima = np.where(generator.random(40) < 0.7, expected, ~expected) * generator.integers(0, 4, 40).astype(float)
    found = verdict(maxima.tolist(), (maxima > 0).tolist(), expected.tolist())
    assert found.auroc == pytest.approx(roc_auc_score(expected, maxima))
    assert found.confusion.precision == pytest.approx(precision_score(expected, maxima > 0))
    assert found.confusion.recall == pytest.approx(recall_score(expected, maxima > 0))
    assert (found.n, found.n_expected) == (40, int(expected.sum()))


def test_one_class_alone_has_no_auroc():
    assert verdict([1.0, 0.0], [True, False], [True, True]).auroc is None


def test_a_model_that_overflows_does_not_pass_for_a_silent_feature(planted, tokenizer):
    table = torch.zeros(len(tokenizer), 4)
    table[tokenizer("dog")["input_ids"][0]] = float("nan")
    lm, sae = planted(table)
    drained(feature_on_texts(lm, sae, HOOK, 1, ["The cat"]))
    with pytest.raises(BadInput, match="NaN or infinite"):
        drained(feature_on_texts(lm, sae, HOOK, 1, ["The cat", "dog"]))


def test_what_cannot_be_tested_is_refused(planted, tokenizer):
    lm, sae = planted(torch.zeros(len(tokenizer), 4))
    with pytest.raises(EmptyData, match="Text 1 has no tokens"):
        drained(feature_on_texts(lm, sae, HOOK, 0, ["cat", ""]))
    with pytest.raises(BadInput, match="Text 0 has"):
        drained(feature_on_texts(lm, sae, HOOK, 0, ["cat " * 300]))
    with pytest.raises(EmptyData):
        drained(feature_on_texts(lm, sae, HOOK, 0, []))
    with pytest.raises(BadInput, match="1 expectations for 2 texts"):
        verdict([0.0, 1.0], [False, True], [True])
