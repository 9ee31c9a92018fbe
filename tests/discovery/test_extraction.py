"""Extraction in one pass equals a dense computation over everything, for every feature and every number."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from discovery_data import HOOK, drain, packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mistudio_engine.api.errors import BadInput, Conflict, CorruptFile, EmptyData, NotFound, UnknownHook
from mistudio_engine.api.events import Signal
from mistudio_engine.discovery import activation_block, examples, extraction_reader, extraction_writer, top_tokens
from mistudio_engine.discovery.extraction import extract, load_extraction, working_bytes
from mistudio_engine.discovery.histogram import LOG_EDGES


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few contexts, so that small data takes many steps."""
    monkeypatch.setattr(extraction_reader, "_BLOCK_TOKENS", 64)
    monkeypatch.setattr(extraction_reader, "_STEP_FLOPS_CPU", 1.0)
    monkeypatch.setattr(extraction_writer, "_FEATURES_PER_PART", 5)
    monkeypatch.setattr(activation_block, "_DENSE_CELLS", 100)


class Dense:
    """The whole truth in memory: acts (n_contexts, context_size, d_sae), 0 where no token counts."""

    def __init__(self, table, ids, n_real, special=True):
        mask = (torch.arange(ids.shape[1]) < n_real[:, None]).numpy()
        if special:
            mask = mask & (ids.numpy() > 1)
        self.ids, self.mask, self.n_real = ids.numpy(), mask, n_real.numpy()
        self.acts = np.where(mask[..., None], table.numpy()[self.ids], 0).clip(min=0)
        self.n_tokens = int(mask.sum())

    def feature(self, f):
        values = self.acts[..., f][self.acts[..., f] > 0].astype(np.float64)
        return len(values), math.fsum(values), values.max(initial=0)

    def peaks(self, f):
        """{context: (first strongest position, value)} of the contexts in which f fires."""
        acts = self.acts[..., f]
        return {c: (int(acts[c].argmax()), acts[c].max()) for c in range(len(acts)) if acts[c].any()}

    def top(self, f, n):
        ranked = sorted(self.peaks(f).items(), key=lambda item: (-item[1][1], item[0]))
        return [(c, position, value) for c, (position, value) in ranked[:n]]

    def tokens(self, f):
        found = {}
        for token, value in zip(self.ids.ravel(), self.acts[..., f].ravel(), strict=True):
            if value > 0:
                found.setdefault(int(token), []).append(float(value))
        return found


def random_case(seed, *, n_contexts=37, size=16, d_sae=12, d_vocab=60, levels=None, density=0.2):
    """A table of activations (with ties where `levels` is given), contexts, and how much of each is real."""
    rng = np.random.default_rng(seed)
    table = rng.gamma(1.0, 2.0, (d_vocab, d_sae)) * (rng.random((d_vocab, d_sae)) < density)
    if levels:
        table = np.ceil(table * levels) / levels
    table[:, 0] = 0  # dead
    table[:, 1] = rng.gamma(2.0, 1.0, d_vocab)  # fires everywhere
    table[:, 2] = 0
    table[7, 2] = 3.0  # fires on one token only
    ids = rng.integers(0, d_vocab, (n_contexts, size))
    n_real = np.full(n_contexts, size)
    n_real[-1] = size // 3
    return torch.tensor(table, dtype=torch.float32), torch.tensor(ids), torch.tensor(n_real)


def check_statistics(store, dense, d_sae):
    assert store.info.n_tokens == dense.n_tokens
    for f in range(d_sae):
        n_active, total, largest = dense.feature(f)
        stats = store.feature(f)
        assert stats.n_active == n_active
        assert stats.frequency == n_active / dense.n_tokens
        assert stats.max == largest
        assert stats.sum == pytest.approx(total, rel=1e-12)
        assert stats.mean == pytest.approx(total / n_active if n_active else 0, rel=1e-12)
        values = dense.acts[..., f][dense.acts[..., f] > 0]
        assert store.log_histogram(f).tolist() == np.histogram(values, LOG_EDGES)[0].tolist()


def check_tokens(store, dense, d_sae, n):
    for f in range(d_sae):
        truth = dense.tokens(f)
        for by, score in (("count", len), ("max", max), ("mean", lambda v: float(np.float32(math.fsum(v) / len(v))))):
            expected = sorted(truth, key=lambda token: (-score(truth[token]), token))[:n]
            found = store.top_tokens(f, by=by, n=n)
            assert [score(truth[t.token_id]) for t in found] == [score(truth[token]) for token in expected]
            if by != "mean":
                assert [t.token_id for t in found] == expected
            for t in found:
                assert t.count == len(truth[t.token_id])
                assert t.max == max(truth[t.token_id])
                assert t.mean == pytest.approx(math.fsum(truth[t.token_id]) / t.count, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("levels", [None, 2])
def test_every_number_of_every_feature_equals_the_dense_computation(planted, tmp_path, small_blocks, seed, levels):
    table, ids, n_real = random_case(seed, levels=levels)
    lm, sae = planted(table)
    store, steps = drain(
        extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x", n_examples=6, n_top_tokens=4, seed=seed)
    )
    assert len([step for step in steps if step.stage == "reading tokens"]) > 3
    dense = Dense(table, ids, n_real)
    check_statistics(store, dense, table.shape[1])
    check_tokens(store, dense, table.shape[1], 4)
    for f in range(table.shape[1]):
        found = [(e.context, e.position, e.value) for e in store.examples(f, "top")]
        assert found == dense.top(f, 6)


def test_where_tokens_were_dropped_it_is_said_how_far_off_a_count_can_be(planted, tmp_path, small_blocks, monkeypatch):
    table, ids, n_real = random_case(18)
    lm, sae = planted(table)
    monkeypatch.setattr(top_tokens, "_MERGE_AT", 1)
    monkeypatch.setattr(top_tokens.TopTokens.__init__, "__defaults__", (60,))
    store, _ = drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x"))
    dense = Dense(table, ids, n_real)
    off = []
    for f in range(table.shape[1]):
        truth, found = dense.tokens(f), {each.token_id: each.count for each in store.top_tokens(f)}
        off.append(max((len(truth[token]) - found.get(token, 0) for token in truth), default=0))
        assert off[-1] <= store.feature(f).undercount
    assert any(off) and store.feature(2).undercount == 0, "the one token of a feature is never dropped"


def test_the_same_numbers_come_out_of_one_block_and_of_many(planted, tmp_path, monkeypatch):
    table, ids, n_real = random_case(3)
    lm, sae = planted(table)
    whole, _ = drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "whole"))
    monkeypatch.setattr(extraction_reader, "_BLOCK_TOKENS", 48)
    pieces, _ = drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "pieces"))
    for name in ("n_active", "max", "frequency", "n_examples"):
        assert whole.column(name).tolist() == pieces.column(name).tolist()
    for f in range(table.shape[1]):
        assert as_rows(whole.examples(f)) == as_rows(pieces.examples(f))


def as_rows(examples):
    return [
        (e.group, e.quantile, e.context, e.position, e.value, e.start, e.token_ids.tolist(), e.values.tolist())
        for e in examples
    ]


def test_an_example_shows_the_real_tokens_and_the_real_activations_around_its_strongest_position(
    planted, tmp_path, small_blocks
):
    table, ids, n_real = random_case(5)
    lm, sae = planted(table)
    store, _ = drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x"))
    dense = Dense(table, ids, n_real)
    for f in range(table.shape[1]):
        for window in (None, 3, (0, 2), (4, 0)):
            for e in store.examples(f, window=window):
                before, after = (99, 99) if window is None else (3, 3) if window == 3 else window
                start, stop = max(0, e.position - before), min(e.position + after + 1, int(n_real[e.context]))
                assert e.start == start
                assert e.token_ids.tolist() == dense.ids[e.context, start:stop].tolist()
                assert e.values.tolist() == dense.acts[e.context, start:stop, f].tolist()
                assert e.values[e.prime] == e.value == e.values.max()
                assert e.value == dense.acts[e.context, :, f].max()


def test_the_reservoirs_are_those_of_a_brute_force_that_knows_the_maximum_beforehand(planted, tmp_path, small_blocks):
    table, ids, n_real = random_case(7, n_contexts=150, density=0.5)
    lm, sae = planted(table)
    n, n_quantiles, seed = 2, 5, 11
    store, _ = drain(
        extract(
            lm,
            sae,
            packed(ids, len(table), n_real),
            HOOK,
            tmp_path / "x",
            n_quantiles=n_quantiles,
            n_per_quantile=n,
            n_random=4,
            n_zero=6,
            seed=seed,
        )
    )
    dense = Dense(table, ids, n_real)
    order = np.random.default_rng(seed).permutation(len(ids)).tolist()
    for f in range(table.shape[1]):
        peaks = dense.peaks(f)
        firing = [c for c in order if c in peaks]
        assert [e.context for e in store.examples(f, "random")] == firing[:4]
        assert [e.context for e in store.examples(f, "zero")] == [c for c in order if c not in peaks][:6]
        largest = max((value for _, value in peaks.values()), default=0)
        strata, expected = {}, {part: [] for part in range(n_quantiles)}
        for c in firing:
            stratum = int(peaks[c][1] / 2.0 ** math.frexp(largest)[1] * 16)
            if strata.setdefault(stratum, 0) < n:
                strata[stratum] += 1
                part = min(int(float(peaks[c][1]) / float(largest) * n_quantiles), n_quantiles - 1)
                expected[part] = (expected[part] + [c])[:n]
        found = [(e.quantile, e.context) for e in store.examples(f, "quantile")]
        assert found == [(part, c) for part in reversed(range(n_quantiles)) for c in expected[part]]


def test_zero_examples_are_silent_everywhere_and_there_are_five_where_they_exist(planted, tmp_path):
    table, ids, n_real = random_case(2, n_contexts=60)
    lm, sae = planted(table)
    store, _ = drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x"))
    dense = Dense(table, ids, n_real)
    for f in range(table.shape[1]):
        zero = store.examples(f, "zero")
        assert len(zero) == min(5, 60 - len(dense.peaks(f)))
        assert all(not e.values.any() and e.value == 0 for e in zero)
    assert not store.examples(1, "zero")  # it fires everywhere


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_small_table_is_extracted_exactly(planted, tmp_path_factory, data):
    d_sae, d_vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(3, 12))
    cells = st.sampled_from([0.0, 0.0, 0.25, 1.0, 1.5, 1e-6, 7e4])
    table = torch.tensor(data.draw(st.lists(cells, min_size=d_sae * d_vocab, max_size=d_sae * d_vocab)))
    table = table.reshape(d_vocab, d_sae)
    n_contexts, size = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 6))
    draw_ids = st.lists(st.integers(0, d_vocab - 1), min_size=n_contexts * size, max_size=n_contexts * size)
    ids = torch.tensor(data.draw(draw_ids)).reshape(n_contexts, size)
    ids[0, 0] = 2  # at least one token counts
    n_real = torch.full((n_contexts,), size)
    lm, sae = planted(table)
    folder = tmp_path_factory.mktemp("any") / "x"
    store, _ = drain(extract(lm, sae, packed(ids, d_vocab, n_real), HOOK, folder, n_examples=2))
    dense = Dense(table, ids, n_real)
    for f in range(d_sae):
        n_active, total, largest = dense.feature(f)
        stats = store.feature(f)
        assert (stats.n_active, stats.max) == (n_active, largest)
        assert stats.sum == pytest.approx(total, rel=1e-12)
        assert store.log_histogram(f).sum() == n_active
        assert [(e.context, e.position, e.value) for e in store.examples(f, "top")] == dense.top(f, 2)
        assert {t.token_id: t.count for t in store.top_tokens(f)} == {t: len(v) for t, v in dense.tokens(f).items()}


def test_special_tokens_count_only_when_asked_for_and_padding_never(planted, tmp_path):
    table, ids, n_real = random_case(4)
    table[0], table[1] = 5.0, 6.0  # BOS and EOS fire strongly
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    without, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "without"))
    check_statistics(without, Dense(table, ids, n_real), table.shape[1])
    with_special, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "with", exclude_special=False))
    check_statistics(with_special, Dense(table, ids, n_real, special=False), table.shape[1])


def test_a_selection_of_features_gives_the_same_numbers_for_those(planted, tmp_path, small_blocks):
    table, ids, n_real = random_case(6)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    everything, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "all"))
    some, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "some", features=[9, 3, 4, 3]))
    assert some.indices.tolist() == [3, 4, 9]
    for f in (3, 4, 9):
        assert some.feature(f) == everything.feature(f)
        assert as_rows(some.examples(f)) == as_rows(everything.examples(f))
    with pytest.raises(NotFound, match="no feature 5"):
        some.feature(5)


def test_activations_up_to_the_threshold_count_as_none(planted, tmp_path):
    table, ids, n_real = random_case(8, levels=2)
    lm, sae = planted(table)
    store, _ = drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x", min_activation=1.0))
    check_statistics(store, Dense(torch.where(table > 1, table, 0.0), ids, n_real), table.shape[1])


def test_fewer_tokens_are_whole_contexts_drawn_at_random(planted, tmp_path):
    table, ids, n_real = random_case(9)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    store, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "x", n_tokens=100, seed=3))
    assert store.info.n_contexts == 6
    chosen = np.sort(np.random.default_rng(3).permutation(len(ids))[:6])
    check_statistics(store, Dense(table, ids[chosen], n_real[chosen]), table.shape[1])
    with pytest.raises(BadInput, match="less than one context"):
        next(extract(lm, sae, tokens, HOOK, tmp_path / "y", n_tokens=3))


def test_stopping_early_keeps_the_tokens_seen_so_far(planted, tmp_path, small_blocks):
    table, ids, n_real = random_case(10)
    lm, sae = planted(table)
    steps = extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x", seed=0)
    for _ in range(7):
        next(steps)
    with pytest.raises(StopIteration) as stop:
        while True:
            steps.send(Signal.STOP)
    store = stop.value.value
    assert store.info.stopped_early
    seen = np.random.default_rng(0).permutation(len(ids))[: store.info.n_contexts]
    assert 0 < len(seen) < len(ids)
    check_statistics(store, Dense(table, ids[seen], n_real[seen]), table.shape[1])


def test_cancelling_leaves_nothing_and_the_next_run_gives_the_same_result(planted, tmp_path, small_blocks):
    table, ids, n_real = random_case(11)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    undisturbed, n_steps = drain(extract(lm, sae, tokens, HOOK, tmp_path / "undisturbed"))
    for n in (1, 5, len(n_steps) - 2):
        steps = extract(lm, sae, tokens, HOOK, tmp_path / "x")
        for _ in range(n):
            next(steps)
        steps.close()
        assert [path.name for path in tmp_path.iterdir()] == ["undisturbed"]
    again, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "x"))
    assert again.info.files == undisturbed.info.files


def test_memory_of_forgotten_examples_is_given_back(planted, tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr(examples, "_COMPACT_AT", 50)
    table, ids, n_real = random_case(12, n_contexts=200)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    often, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "often"))
    monkeypatch.setattr(examples, "_COMPACT_AT", 1 << 20)
    never, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "never"))
    assert often.info.files == never.info.files


def test_progress_grows_to_one_and_says_rate_and_time_left(planted, tmp_path, small_blocks):
    table, ids, n_real = random_case(13)
    lm, sae = planted(table)
    _, steps = drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x"))
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert all(step.tokens_per_second > 0 for step in steps)
    assert steps[3].eta_seconds is not None


def test_what_cannot_work_is_refused_before_anything_is_written(planted, tmp_path):
    table, ids, n_real = random_case(14)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    with pytest.raises(UnknownHook):
        next(extract(lm, sae, tokens, "blocks.7.hook_resid_pre", tmp_path / "x"))
    with pytest.raises(BadInput, match="n_examples is 0"):
        next(extract(lm, sae, tokens, HOOK, tmp_path / "x", n_examples=0))
    with pytest.raises(BadInput, match="12 features, 0 to 11"):
        next(extract(lm, sae, tokens, HOOK, tmp_path / "x", features=[12]))
    with pytest.raises(EmptyData):
        drain(extract(lm, sae, packed(torch.zeros_like(ids), len(table)), HOOK, tmp_path / "x"))
    assert not list(tmp_path.iterdir())
    drain(extract(lm, sae, tokens, HOOK, tmp_path / "x"))
    with pytest.raises(Conflict, match="exists already"):
        next(extract(lm, sae, tokens, HOOK, tmp_path / "x"))


def test_a_model_that_overflows_is_reported_and_not_counted_as_silence(planted, tmp_path):
    table, ids, n_real = random_case(15)
    table[20, 4] = math.nan
    lm, sae = planted(table)
    with pytest.raises(BadInput, match="NaN or infinite"):
        drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x"))
    assert not list(tmp_path.iterdir())


def test_a_torn_or_changed_file_is_noticed(planted, tmp_path):
    table, ids, n_real = random_case(16)
    lm, sae = planted(table)
    store, _ = drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x"))
    store.verify()
    with pytest.raises(NotFound, match="no extraction"):
        load_extraction(tmp_path)
    for name in store.info.files:
        path = tmp_path / "x" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CorruptFile, match=name.replace(".", r"\.")):
            torn = load_extraction(tmp_path / "x")
            torn.examples(3)
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(CorruptFile, match="sha256"):
            store.verify()
        path.unlink()
        with pytest.raises(CorruptFile, match="missing"):
            load_extraction(tmp_path / "x")
        path.write_bytes(whole)
    (tmp_path / "x" / "extraction.json").write_text("{")
    with pytest.raises(CorruptFile):
        load_extraction(tmp_path / "x")


def test_the_record_names_everything_that_is_needed_to_repeat_it(planted, tmp_path):
    table, ids, n_real = random_case(17)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    drain(extract(lm, sae, tokens, HOOK, tmp_path / "x", seed=5, provenance={"model_sha256": "ab"}))
    info = load_extraction(Path(tmp_path / "x")).info
    assert (info.model, info.hook_name, info.d_sae, info.n_features) == ("planted", HOOK, 12, 12)
    assert info.settings["seed"] == 5
    assert {"sae_sha256", "tokenizer_hash", "bos_policy", "torch", "model_sha256"} <= info.provenance.keys()
    assert info.n_alive == 11
    assert info.n_dense >= 1


def test_memory_is_stated_beforehand_and_grows_with_the_features():
    assert working_bytes(2**10) < 2 * 2**30
    assert working_bytes(2**16) > working_bytes(2**14) > working_bytes(2**10)
