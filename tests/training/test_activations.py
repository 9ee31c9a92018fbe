"""The stream of activations: what is in it, what is not, and that it repeats bit for bit at one hook and at several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from training_data import D_IN, HOOK, packed

from mistudio_engine.api.errors import BadInput, EmptyData, UnknownHook
from mistudio_engine.models.hooks import activations
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens
from mistudio_engine.training.activations import ActivationStream, LiveActivations

HOOKS = ("blocks.0.hook_mlp_out", HOOK, "blocks.0.attn.hook_z")


def stream_of(
    lm: LanguageModel,
    tokens: PackedTokens,
    hooks: Sequence[str] = (HOOK,),
    n_contexts: int | None = None,
    **more: Any,
) -> ActivationStream:
    values: dict[str, Any] = {"batch_size": 8, "buffer_tokens": 80, "seed": 0}
    return ActivationStream(LiveActivations(lm, tokens, hooks, n_contexts), hooks, **(values | more))


def take_all(stream: ActivationStream, n: int) -> list[dict[str, Tensor]]:
    return list(islice((batch for batch in stream.batches() if batch is not None), n))


def take(stream: ActivationStream, n: int, hook: str = HOOK) -> list[Tensor]:
    return [batch[hook] for batch in take_all(stream, n)]


def rows(batches: list[Tensor]) -> Counter[bytes]:
    """Activations as a multiset, rounded: batches of other sizes round differently."""
    return Counter((row * 1000).round().int().numpy().tobytes() for batch in batches for row in batch)


def expected_rows(lm: LanguageModel, tokens: PackedTokens, *, special: bool, hook: str = HOOK) -> Counter[bytes]:
    acts = activations(lm, tokens.ids.long(), [hook])[hook]
    return rows([acts[tokens.mask(slice(None), special=special)]])


def n_usable(tokens: PackedTokens, contexts: slice = slice(None)) -> int:
    return int(tokens.mask(contexts, special=False).sum())


def test_an_epoch_has_every_real_token_once_and_no_bos_eos_or_padding(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=8, n_last=4)  # 8 contexts fill one buffer
    stream = stream_of(lm, tokens, batch_size=1)
    assert rows(take(stream, n_usable(tokens))) == expected_rows(lm, tokens, special=False)
    assert rows(take(stream, n_usable(tokens))) == expected_rows(lm, tokens, special=False)


def test_special_tokens_can_be_let_in_and_padding_cannot(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=8, n_last=4)
    stream = stream_of(lm, tokens, batch_size=1, exclude_special=False)
    assert rows(take(stream, tokens.info.n_tokens)) == expected_rows(lm, tokens, special=True)


def test_one_forward_pass_feeds_every_hook_with_all_its_tokens(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=8, n_last=4)
    n_passes = 0

    def count(*_: object) -> None:
        nonlocal n_passes
        n_passes += 1

    handle = lm.hf.register_forward_pre_hook(count)
    stream = stream_of(lm, tokens, HOOKS, batch_size=1)
    batches = take_all(stream, n_usable(tokens))
    handle.remove()
    assert n_passes == 1
    assert stream.hook_names == HOOKS
    assert stream.widths == dict.fromkeys(HOOKS, D_IN)
    for hook in HOOKS:
        assert rows([batch[hook] for batch in batches]) == expected_rows(lm, tokens, special=False, hook=hook)


def test_row_i_is_the_same_token_at_every_hook_and_what_one_hook_alone_would_get(lm: LanguageModel) -> None:
    together = take_all(stream_of(lm, packed(), HOOKS), 30)
    for hook in HOOKS:
        alone = take(stream_of(lm, packed(), [hook]), 30, hook)
        assert all(torch.equal(batch[hook], one) for batch, one in zip(together, alone, strict=True))


def test_a_hook_that_is_named_twice_counts_once(lm: LanguageModel) -> None:
    stream = stream_of(lm, packed(), [HOOK, HOOK])
    assert stream.hook_names == (HOOK,)
    assert list(take_all(stream, 1)[0]) == [HOOK]


def test_contexts_after_the_first_n_are_never_touched(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=12)
    first = packed(n_contexts=12)
    first.ids[7:] = -1  # an id outside the vocabulary: a forward pass on it would raise
    stream = stream_of(lm, first, n_contexts=7, buffer_tokens=70, batch_size=1)
    n = n_usable(tokens, slice(0, 7))
    seen = take(stream, n)
    acts = activations(lm, tokens.ids[:7].long(), [HOOK])[HOOK]
    assert rows(seen) == rows([acts[tokens.mask(slice(0, 7), special=False)]])


@pytest.mark.parametrize("n_contexts", [0, 25, -1])
def test_more_contexts_than_there_are_cannot_be_asked_for(lm: LanguageModel, n_contexts: int) -> None:
    with pytest.raises(BadInput, match=f"n_contexts is {n_contexts}, and there are 24 contexts"):
        stream_of(lm, packed(), n_contexts=n_contexts)


def test_too_few_tokens_are_counted_in_the_first_n_contexts_only(lm: LanguageModel) -> None:
    with pytest.raises(EmptyData, match=r"There are 17 tokens to train on, less than one batch of 64"):
        stream_of(lm, packed(), n_contexts=2, batch_size=64)


def test_batches_are_shuffled_across_contexts_and_differ_from_epoch_to_epoch(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=8)
    stream = stream_of(lm, tokens, batch_size=8)
    per_epoch = n_usable(tokens) // 8
    first, second = take(stream, per_epoch), take(stream, per_epoch)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(lm: LanguageModel) -> None:
    def batches(seed: int) -> Tensor:
        return torch.cat(take(stream_of(lm, packed(), seed=seed), 40))

    assert torch.equal(batches(1), batches(1))
    assert not torch.equal(batches(1), batches(2))


@pytest.mark.parametrize("at", [0, 1, 7, 8, 9, 30])
def test_a_restored_stream_goes_on_with_the_same_bits_at_every_hook(lm: LanguageModel, at: int) -> None:
    stream = stream_of(lm, packed(), HOOKS)
    expected = take_all(stream, 45)[at:]
    fresh = stream_of(lm, packed(), HOOKS)
    take_all(fresh, at)
    state = fresh.state()
    assert set(state) == {"seed", "refill", "batch"}
    restored = stream_of(lm, packed(), HOOKS, seed=99)
    restored.restore(state)
    for ours, theirs in zip(take_all(restored, 45 - at), expected, strict=True):
        assert all(torch.equal(ours[hook], theirs[hook]) for hook in HOOKS)


def test_the_buffers_are_allocated_once_and_never_copied(lm: LanguageModel) -> None:
    stream = stream_of(lm, packed(), HOOKS)
    take_all(stream, 1)
    before = {hook: buffer.data_ptr() for hook, buffer in stream.buffer.items()}
    take_all(stream, 40)
    assert {hook: buffer.data_ptr() for hook, buffer in stream.buffer.items()} == before


def test_the_buffer_has_the_refill_unshuffled_and_nothing_before_the_first_batch(lm: LanguageModel) -> None:
    tokens = packed(n_contexts=8)
    stream = stream_of(lm, tokens, HOOKS)
    assert {hook: tuple(buffer.shape) for hook, buffer in stream.buffer.items()} == dict.fromkeys(HOOKS, (0, D_IN))
    take_all(stream, 1)
    for hook, buffer in stream.buffer.items():
        assert rows([buffer]) == expected_rows(lm, tokens, special=False, hook=hook)


def test_a_buffer_in_bfloat16_takes_half_the_memory_and_batches_come_out_in_fp32(lm: LanguageModel) -> None:
    full, half = stream_of(lm, packed()), stream_of(lm, packed(), dtype=torch.bfloat16)
    for exact, rounded in zip(take(full, 20), take(half, 20), strict=True):
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, exact.bfloat16().float())
    assert full.buffer[HOOK].nbytes == 2 * half.buffer[HOOK].nbytes


def test_filling_goes_in_steps_with_no_hook_left_in_between(lm: LanguageModel) -> None:
    batches = stream_of(lm, packed(), HOOKS).batches()
    assert next(batches) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.hf.modules())


def test_what_the_activations_are_is_said_for_each_hook(lm: LanguageModel) -> None:
    stream = stream_of(lm, packed(), HOOKS)
    for hook in HOOKS:
        assert stream.describe(hook) == {
            "model_name": "tiny",
            "hook_name": hook,
            "prepend_bos": True,
            "context_size": 10,
        }
    tokens = packed()
    tokens.info = tokens.info.model_copy(update={"bos_policy": "document"})
    assert stream_of(lm, tokens).describe(HOOK)["prepend_bos"] is False


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


def test_a_hook_that_is_not_there_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(UnknownHook, match="outside tiny"):
        LiveActivations(lm, packed(), ["blocks.7.hook_resid_post"])
    source = LiveActivations(lm, packed(), [HOOK])
    with pytest.raises(UnknownHook, match=rf"no 'blocks\.0\.hook_mlp_out'.*taken at {HOOK}"):
        ActivationStream(source, ["blocks.0.hook_mlp_out"], batch_size=8, buffer_tokens=80, seed=0)


def test_no_hook_at_all_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(BadInput, match="No hook was named"):
        LiveActivations(lm, packed(), [])
    with pytest.raises(BadInput, match="No hook was named"):
        ActivationStream(LiveActivations(lm, packed(), [HOOK]), [], batch_size=8, buffer_tokens=80, seed=0)
