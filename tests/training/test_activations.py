"""The stream of activations: what is in it, what is not, and that it repeats bit for bit."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from training_data import HOOK, config, packed, run, settings

from mistudio_engine.api.errors import BadInput, EmptyData, UnknownHook
from mistudio_engine.models.hooks import activations
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens
from mistudio_engine.training import ActivationStream, Trainer, train


def stream_of(lm: LanguageModel, tokens: PackedTokens, **more: Any) -> ActivationStream:
    values: dict[str, Any] = {"batch_size": 8, "buffer_tokens": 80, "seed": 0}
    return ActivationStream(lm, tokens, HOOK, **(values | more))


def take(stream: ActivationStream, n: int) -> list[Tensor]:
    return list(islice((batch for batch in stream.batches() if batch is not None), n))


def rows(batches: list[Tensor]) -> Counter[bytes]:
    """Activations as a multiset, rounded: batches of other sizes round differently."""
    return Counter((row * 1000).round().int().numpy().tobytes() for batch in batches for row in batch)


def expected_rows(lm: LanguageModel, tokens: PackedTokens, *, special: bool) -> Counter[bytes]:
    acts = activations(lm, tokens.ids.long(), [HOOK])[HOOK]
    return rows([acts[tokens.mask(slice(None), special=special)]])


def test_an_epoch_has_every_real_token_once_and_no_bos_eos_or_padding(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=8, n_last=4)  # 8 contexts fill one buffer
    n_usable = int(tokens.mask(slice(None), special=False).sum())
    stream = stream_of(lm, tokens, batch_size=1)
    assert rows(take(stream, n_usable)) == expected_rows(lm, tokens, special=False)
    assert rows(take(stream, n_usable)) == expected_rows(lm, tokens, special=False)


def test_special_tokens_can_be_let_in_and_padding_cannot(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=8, n_last=4)
    stream = stream_of(lm, tokens, batch_size=1, exclude_special=False)
    assert rows(take(stream, tokens.info.n_tokens)) == expected_rows(lm, tokens, special=True)


def test_batches_are_shuffled_across_contexts_and_differ_from_epoch_to_epoch(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=8)
    stream = stream_of(lm, tokens, batch_size=8)
    per_epoch = int(tokens.mask(slice(None), special=False).sum()) // 8
    first, second = take(stream, per_epoch), take(stream, per_epoch)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(lm: LanguageModel) -> None:
    def batches(seed: int) -> Tensor:
        return torch.cat(take(stream_of(lm, packed(), seed=seed), 40))

    assert torch.equal(batches(1), batches(1))
    assert not torch.equal(batches(1), batches(2))


@pytest.mark.parametrize("at", [0, 1, 7, 8, 9, 30])
def test_a_restored_stream_goes_on_with_the_same_bits(lm: LanguageModel, at: int) -> None:
    stream = stream_of(lm, packed())
    expected = take(stream, 45)[at:]
    fresh = stream_of(lm, packed())
    take(fresh, at)
    state = fresh.state()
    assert set(state) == {"seed", "refill", "batch"}
    restored = stream_of(lm, packed(), seed=99)
    restored.restore(state)
    assert all(torch.equal(a, b) for a, b in zip(take(restored, 45 - at), expected, strict=True))


def test_the_buffer_is_allocated_once_and_never_copied(lm: LanguageModel) -> None:
    stream = stream_of(lm, packed())
    take(stream, 1)
    before = stream.buffer.data_ptr()
    take(stream, 40)
    assert stream.buffer.data_ptr() == before


def test_filling_goes_in_steps_with_no_hook_left_in_between(lm: LanguageModel) -> None:
    batches = stream_of(lm, packed()).batches()
    assert next(batches) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.hf.modules())


def test_a_dataset_shorter_than_a_batch_says_how_many_tokens_there_are(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=2, n_last=4)  # 2·10 − 6 padding − 2 BOS − 1 EOS
    with pytest.raises(EmptyData, match=r"There are 11 tokens to train on, less than one batch of 64.*at most 11"):
        stream_of(lm, tokens, batch_size=64)


def test_tokens_that_are_all_special_are_nothing_to_train_on(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=1, n_last=1)
    with pytest.raises(EmptyData, match=r"There are 0 tokens.*Tokenise text"):
        stream_of(lm, tokens, batch_size=1)


def test_a_buffer_that_never_holds_a_batch_is_said_and_does_not_loop(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=30)
    tokens.n_real.fill_(3)  # two usable tokens a context, ten contexts a buffer
    stream = stream_of(lm, tokens, batch_size=60, buffer_tokens=100)
    with pytest.raises(EmptyData, match="No buffer of 100 tokens ever had 60 to train on"):
        take(stream, 1)


def test_a_buffer_smaller_than_a_batch_or_a_context_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(BadInput, match="buffer of 7 tokens is too small"):
        stream_of(lm, packed(), buffer_tokens=7)


def test_a_hook_outside_the_model_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(UnknownHook, match="outside tiny"):
        ActivationStream(lm, packed(), "blocks.7.hook_resid_post", batch_size=8, buffer_tokens=80, seed=0)


def test_a_training_runs_from_tokens_to_an_sae_that_says_what_it_was_trained_on(lm: LanguageModel) -> None:
    hp = settings()
    stream = stream_of(lm, packed(), batch_size=hp.batch_size, buffer_tokens=hp.buffer_tokens)
    progress, sae = run(train(Trainer(config("topk"), hp), stream))
    assert progress[-1].fraction == 1
    assert (sae.cfg.model_name, sae.cfg.hook_name, sae.cfg.prepend_bos, sae.cfg.context_size) == (
        "tiny",
        HOOK,
        True,
        10,
    )
