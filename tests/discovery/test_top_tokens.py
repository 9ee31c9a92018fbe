"""Token counts are exact while they fit, and say how far off they are when they do not."""

from __future__ import annotations

import numpy as np

from mistudio_engine.discovery.activation_block import Block
from mistudio_engine.discovery.top_tokens import TopTokens, best_tokens


def block_of(feature, token, value):
    """Each entry at a place of its own."""
    n = len(feature)
    return Block.of(np.arange(1), token.reshape(1, n).astype(np.int32), feature, np.arange(n), value)


def random_entries(seed, n=4000, n_features=6, d_vocab=300):
    rng = np.random.default_rng(seed)
    token = np.minimum(rng.zipf(1.4, n) - 1, d_vocab - 1)
    return rng.integers(0, n_features, n), token, rng.gamma(1, 1, n).astype(np.float32)


def accumulate(entries, capacity=None, n_blocks=8):
    table = TopTokens(6, 300, capacity)
    for part in zip(*(np.array_split(column, n_blocks) for column in entries), strict=True):
        table.add(block_of(*part))
        table.table()  # merges now
    return table


def test_the_table_has_every_pair_with_its_exact_count_and_maximum():
    feature, token, value = entries = random_entries(0)
    tokens = accumulate(entries)
    table = tokens.table()
    assert not tokens.undercount.any()
    assert len(table.feature) == len(set(zip(feature.tolist(), token.tolist(), strict=True)))
    for row in range(len(table.feature)):
        hits = value[(feature == table.feature[row]) & (token == table.token_id[row])]
        assert (table.count[row], table.max[row]) == (len(hits), hits.max())
        np.testing.assert_allclose(table.sum[row], hits.astype(np.float64).sum(), rtol=1e-12)


def test_a_full_table_stays_bounded_keeps_the_common_tokens_and_bounds_its_error():
    feature, token, _ = entries = random_entries(1)
    tokens = accumulate(entries, capacity=240)
    table = tokens.table()
    assert len(table.feature) <= 240
    for f in range(6):
        truth = np.bincount(token[feature == f], minlength=300)
        rows = table.feature == f
        missing = truth[table.token_id[rows]] - table.count[rows]
        assert missing.min() >= 0
        assert missing.max() <= tokens.undercount[f]
        assert set(np.argsort(-truth, kind="stable")[:3]) <= set(table.token_id[rows])


def test_the_best_tokens_are_those_that_lead_in_any_of_the_three_ways():
    entries = random_entries(2)
    table = accumulate(entries).table()
    best = best_tokens(table, 4)
    for f in range(6):
        of_f = table.rows(table.feature == f)
        expected = set()
        for column in (of_f.count, of_f.mean.astype(np.float32), of_f.max):
            expected |= set(of_f.token_id[np.lexsort((of_f.token_id, -column))][:4].tolist())
        assert set(best.token_id[best.feature == f].tolist()) == expected
