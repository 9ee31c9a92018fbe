"""Neighbours by decoder direction and by logit effects, beside a brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio_engine.api.errors import BadInput, CorruptFile, WrongShape
from mistudio_engine.discovery.logit_store import LogitEffects
from mistudio_engine.discovery.neighbours import (
    cosines,
    extremes,
    logit_cosines,
    logit_effect,
    read_directions,
    read_effects,
    unit_rows,
    write_directions,
)


def effects(rng: np.random.Generator, n: int, d_vocab: int, k: int) -> tuple[LogitEffects, np.ndarray]:
    """The ends of random logits, and the logits with everything between the ends set to 0."""
    logits = rng.standard_normal((n, d_vocab)).astype(np.float32)
    order = np.argsort(-logits, axis=1)
    up, down = order[:, :k].astype(np.int32), order[:, ::-1][:, :k].astype(np.int32)
    kept = np.zeros((n, d_vocab))
    for ids in (up, down):
        np.put_along_axis(kept, ids, np.take_along_axis(logits, ids, 1), 1)
    values = [np.take_along_axis(logits, ids, 1) for ids in (up, down)]
    return LogitEffects(up, values[0], down, values[1]), kept


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_cosines_of_decoder_rows_are_those_of_a_brute_force(tmp_path):
    W_dec = torch.randn(9000, 48, generator=torch.Generator().manual_seed(0)) * 3
    W_dec[5] = 0
    write_directions(tmp_path / "rows.npy", unit_rows(W_dec))
    rows = read_directions(tmp_path / "rows.npy")
    exact = W_dec.double().numpy()
    exact[5] = 1  # of no direction: its cosine is 0
    expected = unit(exact) @ unit(exact)[17]
    expected[5] = 0
    np.testing.assert_allclose(cosines(rows, W_dec[17].numpy()), expected, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


def test_a_direction_that_cannot_be_compared_is_refused():
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(WrongShape, match=r"\(2,\).*width 3"):
        cosines(rows, [1, 2])
    for nothing in ([0, 0, 0], [np.nan, 0, 1]):
        with pytest.raises(BadInput, match="without a length"):
            cosines(rows, nothing)


def test_a_torn_file_is_a_typed_error(tmp_path):
    write_directions(tmp_path / "rows.npy", np.eye(100, dtype=np.float32))
    path = tmp_path / "rows.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorruptFile):
        read_directions(path)
    path.write_bytes(b"not tensors at all, but long enough")
    with pytest.raises(CorruptFile):
        read_effects(path)


def test_the_ends_of_a_ranking_never_share_a_feature():
    values = np.array([0.2, -0.5, np.nan, 0.0, 0.2, 0.9, -0.1])
    found = extremes(values, 3)
    assert found.highest.tolist() == [5, 0, 4]
    assert found.lowest.tolist() == [1, 6]
    shown = np.array([True, True, True, True, True, False, False])
    assert [ends.tolist() for ends in extremes(values, 3, shown)] == [[0, 4], [1]]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), k=st.sampled_from([1, 4, 10]), d_vocab=st.sampled_from([10, 60]))
def test_cosines_of_logit_effects_are_those_of_what_was_kept(seed, k, d_vocab):
    """Also where both ends hold the same token, as with 10 of 10."""
    rng = np.random.default_rng(seed)
    (ours, kept), (others, kept_others) = effects(rng, 6, d_vocab, k), effects(rng, 30, d_vocab, k)
    np.testing.assert_allclose(logit_cosines(ours, 2), unit(kept) @ unit(kept)[2], atol=1e-6)
    np.testing.assert_allclose(logit_cosines(ours, 2, others), unit(kept_others) @ unit(kept)[2], atol=1e-6)


def test_the_effect_on_tokens_is_the_sum_over_them_each_by_its_strongest_id():
    ids = np.array([[4, 2, 9], [7, 4, 1], [3, 8, 0]], np.int32)
    values = np.array([[3.0, 2.0, 1.0], [5.0, 0.5, -1.0], [1.0, 1.0, 1.0]], np.float32)
    assert logit_effect(ids, values, [{2, 9}]).tolist() == [2.0, 0.0, 0.0]
    assert logit_effect(ids, values, [{4}, {2, 7}]).tolist() == [5.0, 5.5, 0.0]
    assert logit_effect(ids, values, [{1}]).tolist() == [0.0, 0.0, 0.0]
