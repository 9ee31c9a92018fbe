"""The interpretability score tells features that the text explains from those that it does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from discovery_data import HOOK, drain, packed

from mistudio_engine.api.errors import NotFound
from mistudio_engine.api.sae_config import StandardConfig
from mistudio_engine.demo.check import held_out_tokens
from mistudio_engine.demo.embedded import DEMO_HOOK, SAE_SEED, corpus, model_folder
from mistudio_engine.demo.truth import linear_probe
from mistudio_engine.discovery.extraction import extract
from mistudio_engine.discovery.extraction_store import Example
from mistudio_engine.discovery.interpretability import interpretability
from mistudio_engine.discovery.labelling.labeller import is_held_out
from mistudio_engine.discovery.scores import auroc
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.saes.standard import StandardSAE

D_VOCAB, N_CONTEXTS, SIZE = 400, 80, 64


class Examples:
    """As much of an extraction as is looked at: example contexts with activations of our own making."""

    def __init__(self, features):
        self.indices = np.arange(len(features))
        self._examples = features
        self.max = np.array([max((e.values.max() for e in each), default=0) for each in features], np.float32)

    def examples(self, index):
        return self._examples[index]


def made(fires, seed=0, special=()):
    """80 contexts of words with natural frequencies, and a feature that fires where `fires(ids, place, rng)` says."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, D_VOCAB + 1)
    examples = []
    for context in range(N_CONTEXTS):
        ids = rng.choice(D_VOCAB, size=SIZE, p=share / share.sum()).astype(np.int32)
        ids[0] = special[0] if special else ids[0]
        values = np.array([fires(ids, place, rng) for place in range(SIZE)], dtype=np.float32)
        if special:
            values[np.isin(ids, special)] = 0
        examples.append(Example(0, "top", context, int(values.argmax()), float(values.max()), None, 0, ids, values))
    return examples


PATTERNS = {
    "a word": (lambda w, i, rng: w[i] == 20, 0.999),
    "six words": (lambda w, i, rng: w[i] in (9, 20, 33, 47, 90, 150), 0.99),
    "after a word": (lambda w, i, rng: i > 0 and w[i - 1] == 20, 0.999),
    "soon after a word": (lambda w, i, rng: bool((w[max(0, i - 4) : i] == 20).any()), 0.97),
    "a word after a word": (lambda w, i, rng: i > 0 and w[i] < 50 and w[i - 1] == 5, 0.97),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_what_the_text_explains_scores_near_one(name):
    fires, at_least = PATTERNS[name]
    found, _ = drain(interpretability(Examples([made(fires)])))
    assert found.score[0] > at_least


def test_activations_that_fall_anywhere_score_one_half_on_average():
    rates = (0.01, 0.05, 0.3)
    features = [made(lambda w, i, rng, rate=rate: rng.random() < rate, seed) for rate in rates for seed in range(20)]
    found, _ = drain(interpretability(Examples(features)))
    scores = found.score.reshape(3, 20)
    standard_error = scores.std(axis=1) / np.sqrt(20)
    assert (np.abs(scores.mean(axis=1) - 0.5) < 3 * standard_error).all()
    assert scores.std(axis=1).max() < 0.08


def test_tokens_left_out_because_of_their_place_are_not_taken_for_silent():
    examples = made(PATTERNS["a word"][0])
    for example in examples:
        example.values[:30] = 0  # as an extraction with exclude_first=30 stores them
    known = [replace(example, n_left_out=30) for example in examples]
    found, _ = drain(interpretability(Examples([known, examples])))
    assert found.score[0] > 0.999 > found.score[1]
    held_out = [example for example in examples if is_held_out(example.context)]
    assert found.n_silent[0] == sum((example.values[30:] == 0).sum() for example in held_out)


def test_shuffling_the_activations_of_a_feature_takes_its_score_away():
    rng = np.random.default_rng(0)
    examples = made(PATTERNS["a word"][0])
    shuffled = [
        Example(0, e.group, e.context, 0, e.value, None, 0, e.token_ids, rng.permutation(e.values)) for e in examples
    ]
    found, _ = drain(interpretability(Examples([examples, shuffled])))
    assert found.score[0] > 0.999 and abs(found.score[1] - 0.5) < 0.1


def test_it_is_the_auroc_of_held_out_tokens_by_the_counts_of_explain_tokens():
    """For a feature of single tokens: the same as a naive Bayes of the token itself, written with loops in float64."""
    from mistudio_engine.discovery import interpretability as module
    from mistudio_engine.discovery.labelling.labeller import is_held_out

    examples = made(lambda w, i, rng: rng.random() < (0.9 if w[i] in (7, 30) else 0.02), seed=4)
    fires, silent = np.zeros(D_VOCAB), np.zeros(D_VOCAB)
    for example in examples:
        if not is_held_out(example.context):
            for token, value in zip(example.token_ids, example.values, strict=True):
                (fires if value > 0 else silent)[token] += 1
    share = (fires + silent) / (fires + silent).sum()
    prior = module._PRIOR
    weights = np.zeros(D_VOCAB)
    for token in range(D_VOCAB):
        if share[token]:
            weights[token] = np.log((fires[token] + prior * share[token]) / (fires.sum() + prior)) - np.log(
                (silent[token] + prior * share[token]) / (silent.sum() + prior)
            )
    held_out = [example for example in examples if is_held_out(example.context)]
    ids = np.concatenate([example.token_ids for example in held_out])
    truth = np.concatenate([example.values for example in held_out]) > 0
    # Words that never fired all have one weight, whatever their number: rounding must not rank them.
    expected = auroc(weights.round(9)[ids], truth)
    module_places = module._PLACES
    try:
        module._PLACES = ((0, 0),)
        found, _ = drain(interpretability(Examples([examples])))
    finally:
        module._PLACES = module_places
    assert found.score[0] == pytest.approx(expected, abs=1e-12)
    assert (found.n_firing[0], found.n_silent[0]) == (truth.sum(), (~truth).sum())


def test_sums_over_a_window_are_those_of_a_loop_and_never_reach_across_contexts_or_special_tokens():
    from mistudio_engine.discovery.interpretability import _Text

    examples = made(lambda w, i, rng: w[i] == 3, special=(D_VOCAB,))[:3]
    examples[1].token_ids[30] = D_VOCAB
    word = np.concatenate([e.token_ids for e in examples]).astype(np.int64)
    text = _Text(examples, word, D_VOCAB)
    for near, far in ((0, 0), (1, 1), (2, 4), (5, 16), (17, 64)):
        begin, stop = text.span(near, far)
        for place in range(len(word)):
            if word[place] == D_VOCAB:
                continue
            expected = []
            for back in range(far + 1):
                at = place - back
                if at < 0 or at // SIZE != place // SIZE or word[at] == D_VOCAB:
                    break
                if back >= near:
                    expected.append(at)
            assert list(range(begin[place], stop[place])) == sorted(expected), (place, near, far)


def test_too_few_examples_have_no_score_and_special_tokens_count_for_nothing():
    dead = made(lambda w, i, rng: False)
    once = made(lambda w, i, rng: False)
    once[0].values[5] = 1
    usual = made(PATTERNS["a word"][0], special=(D_VOCAB,))
    found, _ = drain(interpretability(Examples([dead, once, [], usual]), special_ids=[D_VOCAB]))
    assert np.isnan(found.score[:3]).all() and found.score[3] > 0.999
    n_tokens = sum(SIZE - 1 for example in usual if example.context in held_out_contexts(usual))
    assert found.n_firing[3] + found.n_silent[3] == n_tokens


def held_out_contexts(examples):
    from mistudio_engine.discovery.labelling.labeller import is_held_out

    return {example.context for example in examples if is_held_out(example.context)}


def test_an_extraction_of_token_detectors_and_of_noise_is_told_apart(planted, tmp_path):
    """Through a real model, SAE and extraction: eight features of single words, eight of random halves of all words."""
    torch.manual_seed(0)
    table = torch.zeros(120, 16)
    for feature in range(8):
        table[10 + feature, feature] = 1.0
    lm, sae = planted(table)
    ids = torch.randint(2, 120, (200, 32))
    store, _ = drain(extract(lm, sae, packed(ids, 120), HOOK, tmp_path / "words"))
    found, steps = drain(interpretability(store, special_ids=[0, 1]))
    assert (found.score[:8] > 0.99).all() and np.isnan(found.score[8:]).all()
    assert found.feature.tolist() == list(range(16)) and steps[-1] == 1.0
    part, _ = drain(interpretability(store, [3, 5], special_ids=[0, 1]))
    assert part.score.tolist() == found.score[[3, 5]].tolist()
    with pytest.raises(NotFound):
        drain(interpretability(store, [99]))


def test_concepts_of_the_embedded_model_score_higher_than_random_directions(tmp_path):
    """Features along probes for the known concepts against features along random directions that fire as often."""
    lm = LanguageModel.load(model_folder(), name="embedded")
    held_out = held_out_tokens(lm, DEMO_HOOK, 120)
    x = held_out.sae_in
    generator = torch.Generator().manual_seed(0)
    directions, thresholds = [], []
    for truth in held_out.masks.T:
        probe, _ = linear_probe(x, truth)
        random = torch.randn(x.shape[1], generator=generator)
        for direction in (probe / probe.norm(), random / random.norm()):
            directions.append(direction)
            thresholds.append(torch.quantile(x @ direction, 1 - truth.float().mean()))
    width, n_features = x.shape[1], len(directions)
    cfg = StandardConfig(d_in=width, d_sae=n_features, hook_name=DEMO_HOOK, model_name="embedded")
    W_enc = torch.stack(directions, dim=1)
    tensors = {
        "W_enc": W_enc,
        "W_dec": W_enc.T.clone(),
        "b_enc": -torch.stack(thresholds),
        "b_dec": torch.zeros(width),
    }
    ids = [i for text in corpus(500, SAE_SEED) for i in lm.tokenizer(text.text, add_special_tokens=False)["input_ids"]]
    tokens = packed(torch.tensor(ids[: len(ids) // 64 * 64]).reshape(-1, 64), lm.d_vocab)
    store, _ = drain(extract(lm, StandardSAE(cfg, tensors), tokens, DEMO_HOOK, tmp_path / "concepts"))
    found, _ = drain(interpretability(store, special_ids=lm.special_ids))
    concepts, junk = found.score[0::2], found.score[1::2]
    assert np.median(concepts) > 0.92
    assert np.median(concepts) > np.median(junk) + 0.04
    assert auroc(np.concatenate([concepts, junk]), np.arange(2 * len(junk)) < len(junk)) > 0.7
