"""The logit lens in blocks equals the whole matrix product, in its order, its moments and its histogram."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from discovery_data import drain

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound, WrongShape
from mistudio_engine.discovery import logit_lens as module
from mistudio_engine.discovery.logit_lens import logit_lens
from mistudio_engine.discovery.logit_store import read_logits, write_logits
from mistudio_engine.models.hooks import edit
from mistudio_engine.models.language_model import unembedding


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(module, "_STEP_CELLS_CPU", 300)
        monkeypatch.setattr(module, "_SLAB_CELLS", 100)


def whole_numbers(seed, *shape):
    """Integers as floats: products and sums are exact in any order, so ranks can be compared for equality."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("with_gain", [True, False])
def test_blocks_give_what_the_whole_product_gives(blocks, with_gain):
    W_dec, W_U = whole_numbers(0, 23, 12), whole_numbers(1, 101, 12)
    gain = whole_numbers(2, 12) if with_gain else None
    lens, steps = drain(logit_lens(W_dec, W_U, gain, k=7, n_bins=10))
    logits = (W_dec @ (W_U * gain if with_gain else W_U).T).double().numpy()
    np.testing.assert_array_equal(lens.promoted_values, -np.sort(-logits)[:, :7])
    np.testing.assert_array_equal(lens.suppressed_values, np.sort(logits)[:, :7])
    rows = np.arange(23)[:, None]
    np.testing.assert_array_equal(logits[rows, lens.promoted_ids], lens.promoted_values)
    np.testing.assert_array_equal(logits[rows, lens.suppressed_ids], lens.suppressed_values)
    assert steps[-1].fraction == 1.0


def test_moments_and_histogram_are_those_of_the_logits(blocks):
    W_dec, W_U = torch.randn(9, 16), torch.randn(400, 16)
    lens, _ = drain(logit_lens(W_dec, W_U, n_bins=20))
    logits = (W_dec @ W_U.T).double().numpy()
    z = (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)
    np.testing.assert_allclose(lens.mean, logits.mean(1), atol=1e-5)
    np.testing.assert_allclose(lens.std, logits.std(1), rtol=1e-5)
    np.testing.assert_allclose(lens.skewness, (z**3).mean(1), atol=1e-4)
    np.testing.assert_allclose(lens.kurtosis, (z**4).mean(1), rtol=1e-4)
    for row in range(9):
        counts, edges = np.histogram(logits[row], 20)
        assert lens.histogram_counts[row].sum() == 400
        np.testing.assert_allclose(lens.histogram_edges(row), edges, atol=1e-5)
        assert np.abs(np.cumsum(lens.histogram_counts[row]) - np.cumsum(counts)).max() <= 1  # a value on an edge


@pytest.mark.parametrize("d_vocab", [5, 64, 100, 1000])
def test_equal_logits_are_ranked_by_token_id(d_vocab):
    """Few different numbers, so nearly every rank is a tie, within chunks of the search and between them."""
    generator = torch.Generator().manual_seed(d_vocab)
    W_U = torch.randint(-1, 2, (d_vocab, 3), generator=generator).float()
    W_dec = torch.randint(-1, 2, (20, 3), generator=generator).float()
    lens, _ = drain(logit_lens(W_dec, W_U, k=min(40, d_vocab)))
    logits = (W_dec @ W_U.T).numpy()
    np.testing.assert_array_equal(lens.promoted_ids, np.argsort(-logits, axis=1, kind="stable")[:, :40])
    np.testing.assert_array_equal(lens.suppressed_ids, np.argsort(logits, axis=1, kind="stable")[:, :40])


def test_ids_and_values_are_those_of_a_float64_product(blocks):
    generator = torch.Generator().manual_seed(5)
    W_dec, W_U = torch.randn(33, 48, generator=generator), torch.randn(3000, 48, generator=generator)
    gain = torch.rand(48, generator=generator) + 0.5
    lens, _ = drain(logit_lens(W_dec, W_U, gain, k=20))
    logits = ((W_dec.double() * gain.double()) @ W_U.double().T).numpy()
    for sign, ids, values in (
        (-1, lens.promoted_ids, lens.promoted_values),
        (1, lens.suppressed_ids, lens.suppressed_values),
    ):
        expected = np.argsort(sign * logits, axis=1, kind="stable")[:, :21]
        ranked = np.take_along_axis(logits, expected, axis=1)
        np.testing.assert_allclose(values, ranked[:, :20], atol=1e-5, rtol=1e-5)
        gaps = np.abs(np.diff(ranked, axis=1))
        clear = (gaps > 1e-4) & (np.insert(gaps, 0, 1.0, axis=1)[:, :-1] > 1e-4)  # to both neighbours
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(ids[clear], expected[:, :20][clear])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [0, 63, 64, 99])
def test_a_logit_that_is_no_number_is_never_passed_over(value, token):
    W_U = torch.randn(100, 4)
    W_U[token, 0] = value
    with pytest.raises(BadInput, match="NaN or infinite"):
        drain(logit_lens(torch.randn(3, 4), W_U, k=2))


def test_both_forms_are_read_back_a_feature_at_a_time(tmp_path):
    W_dec, W_U, gain = torch.randn(6, 8), torch.randn(90, 8), torch.rand(8) + 0.5
    folded, _ = drain(logit_lens(W_dec, W_U, gain, k=5))
    plain, _ = drain(logit_lens(W_dec, W_U, k=5))
    write_logits(tmp_path / "logits.safetensors", folded, plain)
    with read_logits(tmp_path / "logits.safetensors") as reader:
        assert reader.has_plain
        for form, lens in ((False, folded), (True, plain)):
            found = reader.feature(4, 3, plain=form)
            np.testing.assert_array_equal(found.promoted_ids, lens.promoted_ids[4, :3])
            np.testing.assert_array_equal(found.suppressed_values, lens.suppressed_values[4, :3])
            spread = reader.distribution(4, plain=form)
            np.testing.assert_allclose(spread.bin_edges, lens.histogram_edges(4))
            assert spread.counts.sum() == 90
            assert spread.kurtosis == lens.kurtosis[4]


def test_a_file_without_the_plain_form_says_so(tmp_path):
    lens, _ = drain(logit_lens(torch.randn(2, 4), torch.randn(10, 4), k=2))
    write_logits(tmp_path / "logits.safetensors", lens)
    with read_logits(tmp_path / "logits.safetensors") as reader:
        assert reader.feature(1, 2).promoted_ids.tolist() == lens.promoted_ids[1].tolist()
        with pytest.raises(NotFound, match="were not kept"):
            reader.feature(1, 2, plain=True)


def test_without_bins_there_are_tokens_only():
    lens, _ = drain(logit_lens(torch.randn(3, 4), torch.randn(10, 4), k=2, n_bins=0))
    assert lens.histogram_counts.shape == (3, 0)
    assert lens.promoted_ids.shape == (3, 2)


def test_a_direction_of_zeros_promotes_nothing_and_breaks_nothing():
    lens, _ = drain(logit_lens(torch.zeros(1, 4), torch.randn(10, 4), k=2))
    assert not lens.promoted_values.any()
    assert lens.std[0] == lens.skewness[0] == lens.kurtosis[0] == 0


def test_a_model_pushed_far_along_a_direction_says_what_its_lens_promotes_and_not_what_it_suppresses(planted):
    """The claim by intervention: push the last residual stream along a row, and look at the model's own logits."""
    lm, _ = planted(torch.randn(40, 16, generator=torch.Generator().manual_seed(3)))
    lm.hf.model.norm.weight.data.uniform_(0.2, 2.0)
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(4))
    lens, _ = drain(logit_lens(row, *unembedding(lm), k=3))
    ids = torch.tensor([[2, 3, 4]])
    with edit(lm, "blocks.0.hook_resid_post", lambda h: h + 1e3 * row):
        after = lm.logits(ids)[0, -1]
    assert torch.topk(after, 3).indices.tolist() == lens.promoted_ids[0].tolist()
    assert torch.topk(-after, 3).indices.tolist() == lens.suppressed_ids[0].tolist()


def test_what_does_not_fit_is_refused():
    with pytest.raises(WrongShape, match=r"width 5 do not fit an unembedding \(10, 4\)"):
        next(logit_lens(torch.randn(3, 5), torch.randn(10, 4)))
    with pytest.raises(BadInput, match="k = 11"):
        next(logit_lens(torch.randn(3, 4), torch.randn(10, 4), k=11))
    with pytest.raises(EmptyData):
        next(logit_lens(torch.zeros(0, 4), torch.randn(10, 4), k=1))
