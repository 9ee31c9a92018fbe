"""A choice of features equals the plain one: the k largest of a token, of a batch, and all above an edge."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from mistudio_engine.training import selection
from mistudio_engine.training.pairs import Pairs, dot_products
from mistudio_engine.training.selection import Chosen, Selector


class Weights(NamedTuple):
    """What a selector is handed."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    norms: Tensor | None

    @property
    def hidden_pre(self) -> Tensor:
        return self.x @ self.W_enc + self.b_enc

    @property
    def scores(self) -> Tensor:
        return self.hidden_pre if self.norms is None else self.hidden_pre * self.norms


def weights(
    batch: int = 9, d_in: int = 8, d_sae: int = 64, *, normed: bool = True, shift: float = 0.0, seed: int = 0
) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_sae, d_in, generator=generator).T  # by feature in memory, as an SAE in training has it
    return Weights(
        torch.randn(batch, d_in, generator=generator),
        W_enc,
        torch.randn(d_sae, generator=generator) + shift,
        torch.rand(d_sae, generator=generator) + 0.5 if normed else None,
    )


def mask_of(chosen: Chosen | None) -> Tensor:
    """What was chosen, (n_tokens, d_sae); no pair twice."""
    assert chosen is not None
    mask = torch.zeros(chosen.pairs.n_bags, chosen.pairs.d_sae, dtype=torch.long)
    mask.index_put_((chosen.pairs.bags, chosen.pairs.features), torch.ones(len(chosen.pairs)).long(), accumulate=True)
    assert bool((mask <= 1).all())
    return mask.bool()


def top_mask(scores: Tensor, k: int) -> Tensor:
    top = torch.topk(scores, k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True)


def assert_projected(given_: Weights, chosen: Chosen | None) -> None:
    """The projection is x·W_enc of each pair, in fp32."""
    assert chosen is not None
    assert chosen.projection.dtype == torch.float32
    expected = (given_.x @ given_.W_enc)[chosen.pairs.bags, chosen.pairs.features]
    torch.testing.assert_close(chosen.projection, expected, rtol=1e-5, atol=1e-5)


@given(
    batch=st.integers(1, 20),
    d_in=st.integers(1, 10),
    d_sae=st.integers(1, 12) | st.integers(1, 12).map(lambda n: 16 * n) | st.integers(100, 300),
    k=st.integers(1, 40),
    normed=st.booleans(),
    shift=st.sampled_from([0.0, -3.0, 3.0]),
    seed=st.integers(0, 1000),
)
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
def test_the_k_largest_are_those_of_torch(batch: int, d_in: int, d_sae: int, k: int, seed: int, **more: Any) -> None:
    k = min(k, d_sae)
    w = weights(batch, d_in, d_sae, seed=seed, **more)
    chosen = Selector(bf16=False).top_k(*w, k)
    assert torch.equal(mask_of(chosen), top_mask(w.scores, k))
    assert_projected(w, chosen)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("d_sae", "k"),
    [(256, 4), (256, 5), (256, 16), (256, 17), (256, 256), (250, 4), (250, 250), (16, 1), (16, 16), (1, 1), (4096, 64)],
)
def test_there_are_k_whatever_the_width(d_sae: int, k: int, bf16: bool) -> None:
    """In groups of 16; among all where k is more than the groups, or the width no multiple of 16."""
    w = weights(32, 16, d_sae)
    chosen = Selector(bf16).top_k(*w, k)
    assert mask_of(chosen).sum(dim=1).tolist() == [k] * 32
    same = (mask_of(chosen) & top_mask(w.scores, k)).sum()
    assert float(same / (32 * k)) > (0.97 if bf16 else 1 - 1e-9)
    assert_projected(w, chosen)


@pytest.mark.parametrize("bf16", [False, True])
def test_fewer_positives_than_k_are_all_among_the_chosen(bf16: bool) -> None:
    w = weights(64, 16, 512, shift=-14)
    n_positive = (w.scores > 0.1).sum(dim=1)
    assert 0 < int(n_positive.max()) < 16
    mask = mask_of(Selector(bf16).top_k(*w, 16))
    assert bool(mask[w.scores > 0.1].all())
    assert mask.sum(dim=1).tolist() == [16] * 64


@pytest.mark.parametrize("bf16", [False, True])
def test_the_largest_may_all_stand_in_one_group(bf16: bool) -> None:
    """Column g, g + n/16, … are a group: the choice must not take one of each only."""
    w = weights(8, 4, 256, normed=False)
    w.b_enc[5::16] += 100
    mask = mask_of(Selector(bf16).top_k(*w, 4))
    assert bool(mask[:, 5::16].sum(dim=1).eq(4).all())
    assert torch.equal(mask, top_mask(w.scores, 4)) or bf16


@given(
    batch=st.integers(1, 20),
    d_sae=st.integers(1, 12) | st.integers(1, 12).map(lambda n: 16 * n) | st.integers(100, 300),
    k=st.integers(1, 40),
    normed=st.booleans(),
    shift=st.sampled_from([0.0, -3.0, -6.0, 3.0]),
    seed=st.integers(0, 1000),
)
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
def test_the_largest_of_a_batch_are_those_of_the_flattened_batch(
    batch: int, d_sae: int, k: int, seed: int, **more: Any
) -> None:
    k = min(k, d_sae)
    w = weights(batch, d_sae=d_sae, seed=seed, **more)
    expected = top_mask(w.scores.view(1, -1), k * batch).view_as(w.scores) & (w.scores > 0)
    for rows in (None, 1 + seed % 7):
        chosen = Selector(bf16=False).batch_top_k(*w, k, rows)
        assert torch.equal(mask_of(chosen), expected)
        assert torch.equal(chosen.pairs.mask(), expected)
        assert_projected(w, chosen)


@pytest.mark.parametrize("bf16", [False, True])
def test_nothing_positive_and_everything_positive_are_a_choice_as_well(bf16: bool) -> None:
    nothing = weights(12, shift=-1000)
    chosen = Selector(bf16).batch_top_k(*nothing, 4)
    assert len(chosen.pairs) == len(chosen.projection) == 0
    assert chosen.pairs.offsets.tolist() == [0] * 13
    everything = weights(12, shift=1000)
    for k in (4, 64):
        chosen = Selector(bf16).batch_top_k(*everything, k)
        assert int(mask_of(chosen).sum()) == 12 * k
        assert_projected(everything, chosen)
    a_few = weights(12, shift=-1000)
    a_few.b_enc[[3, 50]] = 100
    assert mask_of(Selector(bf16).batch_top_k(*a_few, 4)).nonzero()[:, 1].tolist() == [3, 50] * 12


@pytest.mark.parametrize("bf16", [False, True])
def test_equal_scores_still_give_the_right_number(bf16: bool) -> None:
    w = weights(16, normed=False)
    w.W_enc.zero_()
    w.b_enc.fill_(1.0)
    assert int(mask_of(Selector(bf16).batch_top_k(*w, 4)).sum()) == 64
    assert int(mask_of(Selector(bf16).top_k(*w, 4)).sum()) == 64


@pytest.mark.parametrize("bf16", [False, True])
def test_the_batchs_choice_is_the_plain_one_at_a_real_size(bf16: bool) -> None:
    w = weights(256, 64, 2048, seed=3)
    plain = top_mask(w.scores.view(1, -1), 24 * 256).view_as(w.scores)
    for rows in (None, 60):
        chosen = Selector(bf16).batch_top_k(*w, 24, rows)
        mask = mask_of(chosen)
        assert int(mask.sum()) == 24 * 256
        assert float((mask & plain).sum() / plain.sum()) > (0.995 if bf16 else 1 - 1e-9)
        assert_projected(w, chosen)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_batch_in_parts_weighs_as_many_candidates_as_a_whole_one(
    monkeypatch: pytest.MonkeyPatch, reverse: bool
) -> None:
    """Whichever tokens come last: where the edge lies is estimated on all of them."""
    n_weighed: list[int] = []

    def counting(pairs: Pairs, *rows: Tensor) -> Tensor:
        n_weighed.append(len(pairs))
        return dot_products(pairs, *rows)

    monkeypatch.setattr(selection, "dot_products", counting)
    w = weights(256, 16, 2048)
    w.x[:] *= torch.linspace(4, 0.01, 256)[:, None]
    w = w._replace(x=w.x.flip(0) if reverse else w.x)
    for rows in (None, 32):
        Selector(bf16=False).batch_top_k(*w, 24, rows)
    assert n_weighed[1] == pytest.approx(n_weighed[0], rel=0.2)


@given(
    batch=st.integers(1, 20),
    d_sae=st.integers(1, 300),
    edge=st.floats(-3, 6),
    per_feature=st.booleans(),
    bf16=st.booleans(),
    seed=st.integers(0, 1000),
)
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
def test_all_above_an_edge_are_found_and_none_below_it(
    batch: int, d_sae: int, edge: float, per_feature: bool, bf16: bool, seed: int
) -> None:
    w = weights(batch, d_sae=d_sae, normed=False, seed=seed)
    edges = torch.randn(d_sae, generator=torch.Generator().manual_seed(seed)) + edge if per_feature else edge
    chosen = Selector(bf16).above(w.x, w.W_enc, w.b_enc, edges, most=batch * d_sae)
    mask, margin = mask_of(chosen), 0.05 if bf16 else 1e-4
    assert not bool(mask[w.hidden_pre < edges - 1e-4].any())
    assert bool(mask[w.hidden_pre > edges + margin].all())
    assert_projected(w, chosen)


def test_bfloat16_leaves_out_next_to_nothing_above_an_edge() -> None:
    w = weights(512, 64, 2048, normed=False)
    edge = 12.0
    chosen = mask_of(Selector(bf16=True).above(w.x, w.W_enc, w.b_enc, edge, most=1 << 30))
    expected = w.hidden_pre > edge
    assert int(expected.sum()) > 10_000
    assert float((chosen != expected).sum() / expected.sum()) < 1e-4


@pytest.mark.parametrize("bf16", [False, True])
def test_nothing_above_an_edge_is_an_empty_pattern_and_too_much_is_none(bf16: bool) -> None:
    w = weights(12, normed=False)
    chosen = Selector(bf16).above(w.x, w.W_enc, w.b_enc, 1000.0, most=10)
    assert chosen is not None
    assert len(chosen.pairs) == 0
    assert chosen.pairs.n_bags == 12
    n = int((w.hidden_pre > 0).sum())
    assert Selector(bf16).above(w.x, w.W_enc, w.b_enc, 0.0, most=n // 2) is None
    assert Selector(bf16).above(w.x, w.W_enc, w.b_enc, 0.0, most=12 * 64) is not None


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 5, 7, 30])
def test_blocks_of_tokens_make_no_difference(monkeypatch: pytest.MonkeyPatch, bf16: bool, n_tokens: int) -> None:
    w = weights(30, 8, 128)
    whole = Selector(bf16)
    expected = [whole.top_k(*w, 4), whole.batch_top_k(*w, 4), whole.above(*w[:3], 1.0, 10_000)]
    monkeypatch.setattr(selection, "_BLOCK_BYTES", {"cpu": n_tokens * 128 * (2 if bf16 else 4)})
    parts = Selector(bf16)
    found = [parts.top_k(*w, 4), parts.batch_top_k(*w, 4), parts.above(*w[:3], 1.0, 10_000)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(mask_of(ours), mask_of(theirs))
        assert_projected(w, ours)


def test_a_selector_can_be_used_for_batches_of_any_size_in_turn() -> None:
    selector = Selector(bf16=False)
    for batch in (5, 20, 1, 20, 3):
        w = weights(batch, 8, 256, seed=batch)
        assert torch.equal(mask_of(selector.top_k(*w, 4)), top_mask(w.scores, 4))
        chosen = selector.above(*w[:3], 1.0, 1 << 20)
        assert torch.equal(mask_of(chosen), w.hidden_pre > 1.0)


def test_a_pattern_is_that_of_its_mask_and_its_parts_are_the_features_new_in_each_dictionary() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(10, 24, generator=generator) < 0.2
    mask[3] = False
    pairs = Pairs.of_mask(mask)
    assert torch.equal(mask_of(Chosen(pairs, torch.zeros(len(pairs)))), mask)
    parts, order = pairs.split((4, 11, 24))
    assert parts.n_bags == 30
    assert sorted(order.tolist()) == list(range(len(pairs)))
    in_part = mask_of(Chosen(parts, torch.zeros(len(pairs)))).view(10, 3, 24)
    for place, (low, high) in enumerate([(0, 4), (4, 11), (11, 24)]):
        expected = torch.zeros_like(mask)
        expected[:, low:high] = mask[:, low:high]
        assert torch.equal(in_part[:, place], expected)
    assert torch.equal(parts.features, pairs.features[order])


def test_an_empty_pattern_decodes_to_nothing_and_has_gradients_of_zero() -> None:
    pairs = Pairs.of_mask(torch.zeros(5, 8, dtype=torch.bool))
    x, W_enc, W_dec = torch.randn(5, 3), torch.randn(3, 8, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    values = pairs.encode(x, W_enc, dot_products(pairs, x, W_enc.T.detach()))
    out = pairs.decode(values, W_dec)
    assert torch.equal(out.detach(), torch.zeros(5, 4))
    (out.sum() + values.sum() + pairs.per_bag(values).sum()).backward()
    assert torch.equal(W_enc.grad, torch.zeros(3, 8))
    assert torch.equal(W_dec.grad, torch.zeros(8, 4))
