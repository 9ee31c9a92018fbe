"""Comparisons and sweeps: one batch, shared randomness, and measures that equal their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from steering_runs import run, steps_and_result

from mistudio_engine.api.errors import BadInput
from mistudio_engine.models.hooks import edit
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.saes import SAE
from mistudio_engine.steering.comparison import compare, concept_probability, sweep
from mistudio_engine.steering.controls import control_for, random_direction, random_feature
from mistudio_engine.steering.generation import generate
from mistudio_engine.steering.interventions import Intervention, applied
from mistudio_engine.steering.metrics import kl_divergence, perplexity, probability_of, repetition
from mistudio_engine.steering.sampling import Sampling

HOOK = "blocks.1.hook_resid_post"
SAMPLING = Sampling(max_new_tokens=10, temperature=0.8, n=2)


def promoting(lm: LanguageModel, token_id: int) -> torch.Tensor:
    """The direction that raises a token's logit most, as far as the last layers pass it on."""
    row = lm.hf.get_output_embeddings().weight[token_id].detach().float()
    return row / row.norm()


def test_compare_puts_baseline_and_steered_into_one_batch_with_the_same_random_numbers(stories: LanguageModel) -> None:
    steer = Intervention(HOOK, promoting(stories, 400), 10.0)
    steps, result = steps_and_result(compare(stories, "One day", [steer], sampling=SAMPLING))
    assert len(steps[0].token_ids) == 4
    plain = run(generate(stories, "One day", sampling=SAMPLING))
    steered = run(generate(stories, "One day", interventions=[steer], sampling=SAMPLING))
    assert [g.token_ids for g in result.baseline.generations] == [g.token_ids for g in plain]
    assert [g.token_ids for g in result.steered.generations] == [g.token_ids for g in steered]
    assert {step.stage for step in steps} == {"writing", "scoring"}
    assert result.control is None


def test_steering_with_strength_zero_equals_the_baseline_in_every_measure(lm: LanguageModel) -> None:
    steer = Intervention(HOOK, torch.linspace(-1, 1, lm.d_model), 0.0)
    result = run(compare(lm, "One day", [steer], concept_ids=[5, 6], sampling=SAMPLING))
    assert [g.token_ids for g in result.steered.generations] == [g.token_ids for g in result.baseline.generations]
    assert result.steered.perplexity == result.baseline.perplexity
    assert result.steered.kl_from_baseline == 0
    assert result.steered.concept_probability == result.baseline.concept_probability


def test_the_measures_are_what_a_plain_forward_pass_gives(gpt2: LanguageModel, sae: SAE) -> None:
    steer = Intervention.of_feature(sae, 7, 6.0)
    result = run(compare(gpt2, "ab", [steer], concept_ids=[10, 11], sampling=Sampling(max_new_tokens=6)))

    def logits(g, interventions=()):
        ids = torch.tensor([[*g.prompt_ids, *g.token_ids]])
        with applied(gpt2, interventions):
            return gpt2.logits(ids)[0, len(g.prompt_ids) - 1 : -1].float()

    base, steered = result.baseline.generations[0], result.steered.generations[0]
    log_p, log_q = logits(base, [steer]).log_softmax(-1), logits(base).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert math.isclose(result.steered.kl_from_baseline, kl, rel_tol=1e-3)
    assert math.isclose(result.steered.concept_probability, log_p.exp()[:, [10, 11]].sum(-1).mean(), rel_tol=1e-3)
    assert math.isclose(result.baseline.concept_probability, log_q.exp()[:, [10, 11]].sum(-1).mean(), rel_tol=1e-3)
    chosen = logits(steered).log_softmax(-1).gather(1, torch.tensor(steered.token_ids)[:, None])
    assert math.isclose(result.steered.perplexity[0], (-chosen.mean()).exp(), rel_tol=1e-3)

    acts = []

    def look(h):
        acts.append(sae.encode(h[0, len(steered.prompt_ids) :])[:, 7].max())
        return h

    with applied(gpt2, [steer]), edit(gpt2, HOOK, look):
        gpt2.logits(torch.tensor([[*steered.prompt_ids, *steered.token_ids]]))
    assert math.isclose(result.steered.activation_reached[0], acts[0], rel_tol=1e-3)
    assert result.baseline.activation_reached == ()


def test_a_sweep_has_an_arm_per_strength_in_one_batch_beside_baseline_and_control(
    stories: LanguageModel,
) -> None:
    steer = Intervention(HOOK, promoting(stories, 400))
    strengths = [0.0, 5.0, 40.0]
    work = sweep(
        stories, "One day", steer, strengths, control=control_for(steer, 1), concept_ids=[400], sampling=SAMPLING
    )
    steps, table = steps_and_result(work)
    assert len(steps[0].token_ids) == (1 + 3 + 3) * 2
    assert [arm.strength for arm in table.steered] == strengths == [arm.strength for arm in table.controls]
    assert table.steered[0].generations[0].token_ids == table.baseline.generations[0].token_ids
    kl = [arm.kl_from_baseline for arm in table.steered]
    assert kl[0] == 0 < kl[1] < kl[2]
    assert table.steered[2].concept_probability > 5 * table.baseline.concept_probability
    assert table.controls[2].concept_probability < table.steered[2].concept_probability / 3


def test_steering_towards_a_token_makes_it_probable_and_a_random_direction_does_not(stories: LanguageModel) -> None:
    token = stories.encode(" cat", bos=False)[-1]
    steer = Intervention("blocks.4.hook_resid_post", promoting(stories, token), 8.0)
    prompts = ["Once upon a time there was a", "She saw", "The dog and the"]
    effect = concept_probability(stories, prompts, [token], [steer])
    control = concept_probability(stories, prompts, [token], [control_for(steer, seed=0)])
    assert len(effect.before) == 3
    assert effect.ratio > 5
    assert effect.before == control.before
    assert control.ratio < 2


def test_concept_probability_is_the_next_tokens_after_each_prompt(gpt2: LanguageModel) -> None:
    steer = Intervention(HOOK, torch.linspace(-1, 1, 32), 3.0)
    effect = concept_probability(gpt2, ["ab", "a longer one"], [1, 2, 2], [steer])
    for prompt, before in zip(["ab", "a longer one"], effect.before, strict=True):
        logits = gpt2.logits(torch.tensor([gpt2.encode(prompt, bos=True)]))[0, -1]
        assert math.isclose(before, logits.softmax(-1)[[1, 2]].sum(), rel_tol=1e-3)
    assert effect.mean_after == pytest.approx(sum(effect.after) / 2)


def test_comparisons_that_cannot_be_made_are_refused_at_once(gpt2: LanguageModel) -> None:
    steer = Intervention(HOOK, torch.linspace(-1, 1, 32))
    with pytest.raises(BadInput, match="no interventions"):
        compare(gpt2, "ab", [])
    with pytest.raises(BadInput, match="one strength"):
        compare(gpt2, "ab", [steer.on_rows([1.0, 2.0])])
    with pytest.raises(BadInput, match="no strengths"):
        sweep(gpt2, "ab", steer, [])
    with pytest.raises(BadInput, match="vocabulary"):
        compare(gpt2, "ab", [steer], concept_ids=[999])
    with pytest.raises(BadInput, match="context"):
        sweep(gpt2, [1] * 60, steer, [1.0])


def test_closing_a_comparison_while_it_scores_leaves_the_model_as_it_was(gpt2: LanguageModel, sae: SAE) -> None:
    ids = torch.tensor([[65, 66]])
    before = gpt2.logits(ids)
    work = compare(gpt2, "ab", [Intervention.of_feature(sae, 7, 6.0)], sampling=Sampling(max_new_tokens=2))
    while next(work).stage != "scoring":
        pass
    work.close()
    assert torch.equal(gpt2.logits(ids), before)


def test_a_random_direction_has_the_norm_asked_for_and_follows_its_seed() -> None:
    like = torch.full((500,), 0.3)
    state = torch.get_rng_state()
    one = random_direction(like, 1)
    assert torch.allclose(one.norm(), like.norm())
    assert torch.equal(one, random_direction(like, 1))
    assert abs(float(torch.cosine_similarity(one, random_direction(like, 2), dim=0))) < 0.2
    assert torch.equal(state, torch.get_rng_state())


def test_a_random_feature_is_alive_and_not_excluded(sae: SAE) -> None:
    tensors = dict(sae.named_parameters()) | {"W_dec": sae.W_dec.clone()}
    tensors["W_dec"][5] = 0
    half_dead = type(sae)(sae.cfg, tensors)
    allowed = {5, 6, 7}
    drawn = {random_feature(half_dead, seed, set(range(48)) - allowed) for seed in range(40)}
    assert drawn == {6, 7}
    with pytest.raises(BadInput, match="No feature is left"):
        random_feature(half_dead, 0, range(48))


def test_a_control_differs_in_direction_alone(sae: SAE) -> None:
    steer = Intervention.of_feature(sae, 7, 6.0, positions="generated")
    control = control_for(steer, 3, exclude=[1])
    assert control.feature not in (1, 7)
    assert (control.strength, control.method, control.positions) == (6.0, "add", "generated")
    assert torch.allclose(control.vector.norm(), steer.vector.norm())


def test_metrics_at_their_known_values() -> None:
    uniform = torch.zeros(4, 10)
    assert perplexity(uniform, [0, 3, 5, 9]) == pytest.approx(10)
    assert kl_divergence(uniform, uniform) == 0
    sure = torch.full((4, 10), -100.0)
    sure[:, 2] = 0
    assert perplexity(sure, [2, 2, 2, 2]) == pytest.approx(1)
    assert kl_divergence(sure, uniform) == pytest.approx(math.log(10), rel=1e-5)
    assert probability_of(uniform, [1, 2, 2]) == pytest.approx(0.2)
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1, 1, 1, 1, 1, 1]) == pytest.approx(0.75)
    assert repetition([1, 2]) == 0
