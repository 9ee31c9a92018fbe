"""Log bins are exact, and the linear display is right up to the one bin that an edge cuts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistudio_engine.discovery.histogram import LOG_EDGES, N_LOG_BINS, LogHistograms, linear_histogram, log_bins

positive = st.floats(min_value=2.0**-20, max_value=2.0**20, width=32)


@given(st.lists(positive, min_size=1, max_size=50))
def test_every_value_lies_between_the_edges_of_its_bin(values):
    values = np.array(values, dtype=np.float32)
    bins = log_bins(values)
    assert (values < LOG_EDGES[bins + 1])[bins < N_LOG_BINS - 1].all()
    assert (values >= LOG_EDGES[bins])[bins > 0].all()


def test_an_edge_belongs_to_the_bin_that_it_opens():
    assert log_bins(LOG_EDGES[:-1]).tolist() == list(range(N_LOG_BINS))
    assert LOG_EDGES[0] == 2.0**-16
    assert LOG_EDGES[-1] == 2.0**16
    assert (np.diff(LOG_EDGES) / LOG_EDGES[:-1]).max() <= 1 / 32


def test_features_are_counted_apart_whatever_the_order_of_the_blocks():
    rng = np.random.default_rng(0)
    feature, value = rng.integers(0, 5, 3000), rng.gamma(1, 2, 3000).astype(np.float32)
    histograms = LogHistograms(5)
    for at in range(0, 3000, 700):
        histograms.add(feature[at : at + 700], value[at : at + 700])
    for f in range(5):
        assert histograms.counts[f].tolist() == np.histogram(value[feature == f], LOG_EDGES)[0].tolist()


@pytest.mark.parametrize("n_bins", [5, 50])
@given(values=st.lists(positive, min_size=1, max_size=200))
def test_the_linear_histogram_keeps_the_total_and_is_off_by_one_log_bin_at_an_edge_at_most(n_bins, values):
    values = np.array(values, dtype=np.float32)
    counts = np.bincount(log_bins(values), minlength=N_LOG_BINS)
    shown = linear_histogram(counts, float(values.max()), n_bins)
    assert len(shown.counts) == n_bins
    assert shown.counts.sum() == len(values)
    assert (shown.counts >= 0).all()
    assert (shown.edges[0], shown.edges[-1]) == (0, float(values.max()))
    for edge, below in zip(shown.edges[1:-1], np.cumsum(shown.counts)[:-1], strict=True):
        cut = counts[log_bins(np.array([edge], dtype=np.float32))[0]]
        assert abs(int((values < edge).sum()) - below) <= cut


def test_a_feature_that_never_fires_has_an_empty_histogram():
    shown = linear_histogram(np.zeros(N_LOG_BINS, dtype=np.int64), 0.0, 10)
    assert shown.counts.tolist() == [0] * 10
