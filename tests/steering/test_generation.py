"""Generation equals transformers', streams, stops, and leaves no trace in the model."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from steering_runs import GREEDY, PROMPTS, run, steps_and_result

from mistudio_engine.api.errors import BadInput, EmptyData
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.steering import generation
from mistudio_engine.steering.generation import eos_ids, generate
from mistudio_engine.steering.interventions import Intervention
from mistudio_engine.steering.sampling import Sampling


def by_transformers(lm: LanguageModel, ids: list[int], n: int, **settings) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.random.fork_rng():
        out = lm.hf.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_equals_transformers_generate_token_for_token(lm: LanguageModel, cache: bool) -> None:
    for prompt in PROMPTS:
        (ours,) = run(generate(lm, prompt, sampling=GREEDY, cache=cache))
        assert list(ours.token_ids) == by_transformers(lm, lm.encode(prompt, bos=True), 24)


def test_greedy_with_a_repetition_penalty_equals_transformers_too(lm: LanguageModel) -> None:
    sampling = GREEDY.model_copy(update={"repetition_penalty": 1.3})
    (ours,) = run(generate(lm, PROMPTS[0], sampling=sampling))
    expected = by_transformers(lm, lm.encode(PROMPTS[0], bos=True), 24, repetition_penalty=1.3)
    assert list(ours.token_ids) == expected


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_prompts_of_different_lengths_in_one_batch_continue_as_each_does_alone(
    lm: LanguageModel, cache: bool, penalty: float
) -> None:
    sampling = GREEDY.model_copy(update={"repetition_penalty": penalty})
    together = run(generate(lm, PROMPTS, sampling=sampling, cache=cache))
    alone = [run(generate(lm, prompt, sampling=sampling, cache=cache))[0] for prompt in PROMPTS]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert [g.text for g in together] == [g.text for g in alone]
    assert [g.prompt for g in together] == [0, 1, 2]


def test_a_long_prompt_is_read_in_several_steps_with_the_same_continuation(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(generate(lm, PROMPTS, sampling=GREEDY))
    monkeypatch.setattr(generation, "N_READ_TOKENS", 9)
    steps, result = steps_and_result(generate(lm, PROMPTS, sampling=GREEDY))
    assert result == expected
    assert sum(step.stage == "reading" for step in steps) > 1


def test_token_ids_are_continued_as_they_are(stories: LanguageModel) -> None:
    ids = stories.encode("Once upon a time", bos=True)
    assert run(generate(stories, ids, sampling=GREEDY)) == run(generate(stories, "Once upon a time", sampling=GREEDY))
    without = run(generate(stories, "Once upon a time", sampling=GREEDY, bos=False))[0]
    assert list(without.prompt_ids) == ids[1:]


def test_a_story_reads_as_one(stories: LanguageModel) -> None:
    (story,) = run(generate(stories, "Once upon a time, there was", sampling=GREEDY))
    assert story.text.startswith(" a little girl named")


def test_the_pieces_of_the_steps_make_the_text(lm: LanguageModel) -> None:
    sampling = Sampling(temperature=1.5, max_new_tokens=40, n=3)
    steps, result = steps_and_result(generate(lm, PROMPTS[:2], sampling=sampling))
    for row, one in enumerate(result):
        writing = [step for step in steps if step.stage == "writing"]
        assert "".join(step.pieces[row] for step in writing) == one.text
        assert tuple(t for step in writing if (t := step.token_ids[row]) is not None) == one.token_ids
    assert "�" not in steps[0].pieces


def test_the_same_seed_gives_the_same_text_and_another_seed_another(stories: LanguageModel) -> None:
    def text(seed: int) -> str:
        return run(generate(stories, "One day", sampling=Sampling(seed=seed, temperature=1.0)))[0].text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(stories: LanguageModel) -> None:
    three = run(generate(stories, ["One day", "A bird"], sampling=Sampling(n=3, temperature=1.0)))
    one = run(generate(stories, "A bird", sampling=Sampling(n=1, temperature=1.0)))
    assert three[3].token_ids == one[0].token_ids
    assert len({g.token_ids for g in three}) == 6


def test_generating_leaves_every_global_random_state_alone(stories: LanguageModel) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    run(generate(stories, "One day", sampling=Sampling(max_new_tokens=4)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_the_end_of_text_ends_a_row_and_the_others_go_on(gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = run(generate(gpt2, ["ab", "xyz"], sampling=GREEDY))
    eos = longer[0].token_ids[5]
    n_first = longer[0].token_ids.index(eos) + 1
    monkeypatch.setattr(gpt2.hf.generation_config, "eos_token_id", [eos, 256])
    assert eos_ids(gpt2) == {eos, 256}
    ended, other = run(generate(gpt2, ["ab", "xyz"], sampling=GREEDY))
    assert (ended.token_ids, ended.finish_reason) == (longer[0].token_ids[:n_first], "eos")
    assert list(ended.token_ids) == by_transformers(gpt2, gpt2.encode("ab", bos=True), 24)
    assert other.token_ids == longer[1].token_ids[: len(other.token_ids)]
    assert len(other.token_ids) > n_first


def test_a_stop_sequence_cuts_the_text_and_nothing_of_it_is_streamed(stories: LanguageModel) -> None:
    (whole,) = run(generate(stories, "Once upon a time", sampling=Sampling(temperature=0, max_new_tokens=40)))
    stop = whole.text[30:36]
    sampling = Sampling(temperature=0, max_new_tokens=40, stop_sequences=("never in it", stop))
    steps, (cut,) = steps_and_result(generate(stories, "Once upon a time", sampling=sampling))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert "".join(step.pieces[0] for step in steps) == cut.text
    assert len(cut.token_ids) < len(whole.token_ids)


def test_a_context_that_is_too_short_is_refused_before_anything_runs(gpt2: LanguageModel) -> None:
    with pytest.raises(BadInput, match=r"61 tokens and 4 new ones .* context of 64"):
        generate(gpt2, [65] * 61, sampling=Sampling(max_new_tokens=4))
    with pytest.raises(BadInput, match="70 tokens does not fit"):
        generate(gpt2, [65] * 70)
    (full,) = run(generate(gpt2, [65] * 61, sampling=Sampling(max_new_tokens=3)))
    assert len(full.token_ids) <= 3


def test_prompts_that_cannot_be_read_are_refused(gpt2: LanguageModel) -> None:
    with pytest.raises(EmptyData):
        generate(gpt2, [])
    with pytest.raises(EmptyData):
        generate(gpt2, "", bos=False)
    with pytest.raises(BadInput, match="257 is outside the vocabulary"):
        generate(gpt2, [1, 257])
    assert len(run(generate(gpt2, "", sampling=Sampling(max_new_tokens=2)))) == 1


def test_logits_that_are_not_numbers_end_the_generation(gpt2: LanguageModel) -> None:
    steer = Intervention("blocks.1.hook_resid_post", torch.ones(32), strength=3e38)
    with pytest.raises(BadInput, match="not numbers"):
        run(generate(gpt2, "ab", interventions=[steer], sampling=GREEDY))


def test_closing_midway_leaves_no_hook_and_the_logits_bit_equal(lm: LanguageModel) -> None:
    ids = torch.tensor([lm.encode("Once upon a time", bos=True)])
    before = lm.logits(ids)
    steer = Intervention("blocks.1.hook_resid_post", torch.ones(lm.d_model), strength=5.0)
    work = generate(lm, "Once upon", interventions=[steer], sampling=GREEDY)
    for _ in range(3):
        next(work)
        assert torch.equal(lm.logits(ids), before)
    work.close()
    assert torch.equal(lm.logits(ids), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.hf.modules())


def test_steered_and_plain_generations_may_take_turns(lm: LanguageModel) -> None:
    steer = Intervention("blocks.1.hook_resid_post", torch.linspace(-1, 1, lm.d_model), strength=4.0)
    sampling = Sampling(max_new_tokens=12, temperature=0.8)
    apart = [run(generate(lm, "One day", interventions=i, sampling=sampling)) for i in ([], [steer])]
    running = [generate(lm, "One day", interventions=i, sampling=sampling) for i in ([], [steer])]
    results: list = [None, None]
    while None in results:
        for index, work in enumerate(running):
            if results[index] is None:
                try:
                    next(work)
                except StopIteration as done:
                    results[index] = done.value
    assert results == apart
    assert apart[0][0].token_ids != apart[1][0].token_ids
