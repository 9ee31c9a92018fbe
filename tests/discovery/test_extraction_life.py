"""An extraction goes on where it was interrupted, bit for bit; several SAEs share a pass; pairs are counted exactly."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from discovery_data import HOOK, drain, packed
from test_extraction import Dense, random_case

from mistudio_engine.api.errors import BadInput, NotFound
from mistudio_engine.api.events import Signal
from mistudio_engine.discovery import (
    coactivation,
    context_store,
    extraction,
    extraction_reader,
    extraction_store,
    extraction_writer,
)
from mistudio_engine.discovery.extraction import ExtractionSettings, Target, extract, extract_together, load_extraction

FILES = ("features.parquet", "examples.parquet", "contexts.arrow")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several forward passes to a block, and many blocks."""
    monkeypatch.setattr(extraction_reader, "_BLOCK_TOKENS", 64)
    monkeypatch.setattr(extraction_reader, "_STEP_FLOPS_CPU", 1.0)
    monkeypatch.setattr(extraction_writer, "_FEATURES_PER_PART", 5)


def hashes(folder: Path) -> dict[str, str]:
    return load_extraction(folder).info.files


def killed_after(work: Generator[Any, Any, Any], n_steps: int) -> bool:
    """Send CHECKPOINT at every step but the last of `n_steps`, then close; whether it was still running."""
    try:
        next(work)
        for _ in range(n_steps):
            work.send(Signal.CHECKPOINT)
    except StopIteration:
        return False
    work.close()
    return True


def test_a_run_that_is_killed_at_any_step_ends_with_the_bits_of_an_undisturbed_one(planted, tmp_path):
    table, ids, n_real = random_case(5, n_contexts=11)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    drain(extract(lm, sae, tokens, HOOK, tmp_path / "whole"))
    expected, n_steps = hashes(tmp_path / "whole"), 0
    while True:
        n_steps += 9
        folder, checkpoint = tmp_path / f"killed-{n_steps}", tmp_path / f"{n_steps}.npz"
        if not killed_after(extract(lm, sae, tokens, HOOK, folder, checkpoint=checkpoint), n_steps):
            break
        assert not folder.exists(), "nothing half-written stays"
        assert checkpoint.exists() or n_steps < 40
        _, seen = drain(extract(lm, sae, tokens, HOOK, folder, checkpoint=checkpoint))
        assert hashes(folder) == expected
        if n_steps > 200:
            assert seen[0].n_tokens > 0, "it goes on where it was"
    assert n_steps > 200


def test_writing_and_hashing_go_in_small_steps_and_make_no_difference(planted, tmp_path, monkeypatch):
    table, ids, n_real = random_case(4)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    whole, before = drain(extract(lm, sae, tokens, HOOK, tmp_path / "whole"))
    monkeypatch.setattr(context_store, "IDS_PER_BATCH", 3 * ids.shape[1])
    for module in (extraction, extraction_store):
        monkeypatch.setattr(module, "HASHED_AT_ONCE", 128)
    pieces, after = drain(extract(lm, sae, tokens, HOOK, tmp_path / "pieces"))
    n_batches = -(-len(ids) // 3)
    n_hashed = sum(-(-(tmp_path / "pieces" / name).stat().st_size // 128) for name in FILES)
    assert len(after) - len(before) >= n_batches - 1 + n_hashed - len(FILES)
    assert pieces.info.provenance == whole.info.provenance
    assert all(hashes(tmp_path / "pieces")[name] == hashes(tmp_path / "whole")[name] for name in FILES[:2])
    pieces.verify()
    for f in range(table.shape[1]):
        for one, other in zip(pieces.examples(f), whole.examples(f), strict=True):
            assert (
                one.token_ids.tolist() == other.token_ids.tolist() == ids[one.context, : n_real[one.context]].tolist()
            )


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(planted, tmp_path):
    table, ids, n_real = random_case(6, n_contexts=21)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    drain(extract(lm, sae, tokens, HOOK, tmp_path / "whole"))
    n_kills, checkpoint = 0, tmp_path / "state.npz"
    while killed_after(extract(lm, sae, tokens, HOOK, tmp_path / "killed", checkpoint=checkpoint), 45):
        n_kills += 1
        assert n_kills < 100
    assert n_kills > 5
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flipped", "other settings", "other version", "rubbish"])
def test_a_checkpoint_that_cannot_be_trusted_is_not_gone_on_from(planted, tmp_path, damage, caplog, monkeypatch):
    table, ids, n_real = random_case(7, n_contexts=21)
    lm, sae = planted(table)
    tokens, checkpoint = packed(ids, len(table), n_real), tmp_path / "state.npz"
    drain(extract(lm, sae, tokens, HOOK, tmp_path / "whole"))
    seed = 1 if damage == "other settings" else 0
    assert killed_after(extract(lm, sae, tokens, HOOK, tmp_path / "x", checkpoint=checkpoint, seed=seed), 60)
    content = bytearray(checkpoint.read_bytes())
    if damage == "cut":
        checkpoint.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 0x40
        checkpoint.write_bytes(content)
    elif damage == "other version":
        monkeypatch.setattr(extraction, "__version__", "0.0.9")
    elif damage == "rubbish":
        checkpoint.write_bytes(b"PK" + bytes(200))
    _, seen = drain(extract(lm, sae, tokens, HOOK, tmp_path / "x", checkpoint=checkpoint))
    assert seen[0].n_tokens < tokens.info.n_tokens / 4, "it began anew"
    assert hashes(tmp_path / "x") == hashes(tmp_path / "whole")
    assert "begins anew" in caplog.text


def test_several_saes_in_one_pass_are_what_each_is_alone(planted, tmp_path):
    table, ids, n_real = random_case(8)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    settings = ExtractionSettings(n_examples=4, seed=2)
    n_forward = count_forward_passes(lm)
    targets = [
        Target(sae, HOOK, tmp_path / "all"),
        Target(sae, HOOK, tmp_path / "some", features=[9, 2, 3], provenance={"which": "some"}),
    ]
    stores, _ = drain(extract_together(lm, targets, tokens, settings))
    together = len(n_forward)
    for target, store in zip(targets, stores, strict=True):
        alone, _ = drain(
            extract(
                lm,
                sae,
                tokens,
                HOOK,
                tmp_path / "alone" / target.folder.name,
                features=target.features,
                n_examples=4,
                seed=2,
            )
        )
        assert store.info.files == alone.info.files
    assert stores[1].indices.tolist() == [2, 3, 9] and stores[1].info.provenance["which"] == "some"
    assert len(n_forward) - together == 2 * together, "the model ran once for both"


def count_forward_passes(lm) -> list[None]:
    seen: list[None] = []
    lm.hf.register_forward_pre_hook(lambda *_: seen.append(None))
    return seen


def test_pairs_are_counted_exactly_and_the_strongest_partners_are_found(planted, tmp_path):
    table, ids, n_real = random_case(9)
    table[:, 5] = table[:, 4] * 2  # always together
    lm, sae = planted(table)
    store, _ = drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x", n_partners=4))
    dense = Dense(table, ids, n_real)
    fires = (dense.acts[dense.mask] > 0).astype(np.int64)  # (n_tokens, d_sae)
    together, alone = fires.T @ fires, fires.sum(0)
    assert store.info.n_coactivation_tokens == len(fires)
    for f in range(table.shape[1]):
        cosine = {g: together[f, g] / np.sqrt(alone[f] * alone[g]) for g in np.flatnonzero(together[f]) if g != f}
        expected = sorted(cosine, key=lambda g: (-cosine[g], g))[:4]
        found = store.partners(f, 4)
        assert [partner.feature for partner in found] == expected
        assert [partner.count for partner in found] == [together[f, g] for g in expected]
        for partner in found:
            lift = partner.count * len(fires) / (alone[f] * alone[partner.feature])
            assert partner.cosine == pytest.approx(cosine[partner.feature], rel=1e-12)
            assert partner.lift == pytest.approx(lift, rel=1e-12)
    assert store.partners(4, 1)[0].feature == 5 and store.partners(4, 1)[0].cosine == pytest.approx(1)
    assert store.partners(0) == [], "a dead feature has no partners"


def test_partners_of_a_selection_are_features_and_not_rows(planted, tmp_path):
    table, ids, n_real = random_case(9)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    some, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "some", features=[1, 7, 11]))
    whole, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "whole"))
    for f in (1, 7, 11):
        assert some.partners(f) == [partner for partner in whole.partners(f) if partner.feature in (1, 7, 11)]


@pytest.mark.parametrize(("limit", "value"), [("N_TOKENS", 100), ("N_PAIRS", 3000)])
def test_the_sample_of_tokens_for_pairs_is_bounded_and_stated(planted, tmp_path, monkeypatch, limit, value):
    table, ids, n_real = random_case(10)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    init = coactivation.CoactivationSample.__init__
    monkeypatch.setattr(init, "__defaults__", (100, 1 << 28) if limit == "N_TOKENS" else (1 << 16, 3000))
    store, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "x"))
    dense = Dense(table, ids, n_real)
    order = np.random.default_rng(0).permutation(len(ids))
    fires = np.concatenate([(dense.acts[c] > 0)[dense.mask[c]] for c in order]).astype(np.int64)
    n = store.info.n_coactivation_tokens
    n_pairs = np.cumsum(fires.sum(1) ** 2)
    assert n == 100 if limit == "N_TOKENS" else n_pairs[n - 1] <= value < n_pairs[n]
    together = fires[:n].T @ fires[:n]
    for partner in store.partners(1):
        assert partner.count == together[1, partner.feature]


def test_an_older_extraction_is_read_and_says_that_it_has_no_partners(planted, tmp_path):
    table, ids, n_real = random_case(11)
    lm, sae = planted(table)
    drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x"))
    path = tmp_path / "x" / "extraction.json"
    info = {
        name: value
        for name, value in json.loads(path.read_text()).items()
        if name not in ("l0", "n_coactivation_tokens")
    }
    path.write_text(json.dumps(info | {"format_version": 1}))
    store = load_extraction(tmp_path / "x")
    assert store.feature(1).n_active > 0
    with pytest.raises(NotFound, match="no pairs"):
        store.partners(1)


def test_the_number_of_active_features_on_a_token_is_summed_up(planted, tmp_path):
    table, ids, n_real = random_case(12, density=0.05)
    table[:, 1] = 0
    lm, sae = planted(table)
    store, _ = drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x"))
    dense = Dense(table, ids, n_real)
    l0 = (dense.acts[dense.mask] > 0).sum(1)
    found = store.info.l0
    assert found["mean"] == pytest.approx(l0.mean(), rel=1e-12)
    assert found["max"] == l0.max() and found["silent"] == pytest.approx((l0 == 0).mean())
    for p in (5, 50, 95):
        assert found[f"p{p}"] == np.percentile(l0, p, method="inverted_cdf")


def test_tokens_and_positions_that_are_left_out_count_nowhere(planted, tmp_path):
    table, ids, n_real = random_case(13)
    lm, sae = planted(table)
    tokens = packed(ids, len(table), n_real)
    left_out = (7, 8, 9)
    store, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "x", exclude_token_ids=left_out, exclude_first=3))
    dense = Dense(table, ids, n_real)
    mask = dense.mask & ~np.isin(dense.ids, left_out)
    mask[:, :3] = False
    acts = np.where(mask[..., None], dense.acts, 0)
    assert store.info.n_tokens == mask.sum()
    for f in range(table.shape[1]):
        assert store.feature(f).n_active == (acts[..., f] > 0).sum()
        assert store.feature(f).max == acts[..., f].max()
        assert not {token.token_id for token in store.top_tokens(f)} & set(left_out)
        assert all(example.position >= 3 for example in store.examples(f, "top"))
        assert {example.n_left_out for example in store.examples(f)} == {3}
        for e in store.examples(f, window=2):
            assert e.n_left_out == max(0, 3 - e.start)
            shown = slice(e.start, e.start + len(e.token_ids))
            assert (e.counted & (e.token_ids > 1)).tolist() == mask[e.context, shown].tolist()


@pytest.mark.parametrize(
    "wrong", [{"n_examples": 0}, {"n_partners": -1}, {"exclude_first": -1}, {"min_activation": float("nan")}]
)
def test_numbers_out_of_range_are_named(wrong):
    with pytest.raises(BadInput, match=next(iter(wrong))):
        ExtractionSettings(**wrong)


def test_leaving_out_everything_is_an_error_and_leaves_nothing(planted, tmp_path):
    table, ids, n_real = random_case(14)
    lm, sae = planted(table)
    with pytest.raises(Exception, match="no token"):
        drain(extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x", exclude_first=16))
    assert list(tmp_path.iterdir()) == []


def test_state_is_taken_only_when_somebody_keeps_it(planted, tmp_path):
    table, ids, n_real = random_case(15)
    lm, sae = planted(table)
    work = extract(lm, sae, packed(ids, len(table), n_real), HOOK, tmp_path / "x")
    next(work)
    assert not any(work.send(Signal.CHECKPOINT).checkpointed for _ in range(20))
    work.close()
    assert torch.is_tensor(ids) and list(tmp_path.iterdir()) == []
