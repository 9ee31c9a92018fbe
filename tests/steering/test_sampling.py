"""Sampling draws from transformers' distribution, with random numbers that arms share."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.steering.sampling import Sampler, Sampling, warped


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.4},
        {"temperature": 2.0, "top_k": 10_000, "top_p": 1e-6},
    ],
)
def test_scores_are_those_of_transformers_generate(lm: LanguageModel, settings: dict[str, float]) -> None:
    prompt = torch.tensor([lm.encode("Once upon a time", bos=True)])
    with torch.random.fork_rng():
        theirs = lm.hf.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=1,
            do_sample=True,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **({"top_k": 0} | settings),
        ).scores[0]
    ours = warped(lm.logits(prompt)[:, -1].float(), prompt, Sampling(**settings))
    assert torch.equal(ours.isinf(), theirs.isinf())
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    n = 20_000
    sampler = Sampler(Sampling(temperature=1.0, n=n))
    drawn = sampler.choose(probabilities.log().expand(n, -1), torch.zeros(n, 1, dtype=torch.long))
    shares = torch.bincount(drawn, minlength=5) / n
    # Four standard errors of a share near one half.
    assert torch.allclose(shares, probabilities, atol=4 * 0.5 / n**0.5)
    assert shares[4] == 0


def test_prompts_share_the_random_numbers_of_a_sample_and_samples_do_not() -> None:
    logits = torch.zeros(6, 50)
    drawn = Sampler(Sampling(temperature=1.0, n=3)).choose(logits, torch.zeros(6, 1, dtype=torch.long))
    assert drawn[:3].tolist() == drawn[3:].tolist()
    assert len(set(drawn[:3].tolist())) == 3


def test_similar_distributions_mostly_draw_the_same_token() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 200)
    other = logits + 0.1 * torch.randn(1, 200)
    same = 0
    sampler = Sampler(Sampling(temperature=1.0))
    for _ in range(300):
        a, b = sampler.choose(torch.cat([logits, other]), torch.zeros(2, 1, dtype=torch.long)).tolist()
        same += a == b
    assert same > 250


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"n": 0}, {"stop_sequences": ("",)}):
        with pytest.raises(ValidationError):
            Sampling(**wrong)
