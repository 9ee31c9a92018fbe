"""Activations on disk: they equal the model's own, a killed writer goes on, and nothing damaged or foreign is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_data import D_IN, HOOK, packed, tiny_lm

from mistudio_engine.api.errors import BadInput, Conflict, CorruptFile, DiskFull, NotFound, UnknownHook
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.models.hooks import activations
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens
from mistudio_engine.training.activation_cache import (
    CachedActivations,
    CacheInfo,
    cache_bytes,
    model_fingerprint,
    read_index,
    write_cache,
)
from mistudio_engine.training.activations import ActivationStream, LiveActivations, Source

HOOKS = ("blocks.0.hook_mlp_out", HOOK)
CONTEXT_BYTES = 10 * 2 * D_IN * 4


def write(
    lm: LanguageModel,
    tokens: PackedTokens,
    folder: Path,
    hooks: Sequence[str] = HOOKS,
    signals: dict[int, Signal] | None = None,
    **more: Any,
) -> tuple[list[Progress], CacheInfo]:
    """The whole cache, four contexts a shard unless said otherwise; `signals` are sent after the so-manieth step."""
    values: dict[str, Any] = {"shard_bytes": 4 * CONTEXT_BYTES}
    job = write_cache(lm, tokens, hooks, folder, **(values | more))
    seen: list[Progress] = []
    while True:
        try:
            seen.append(job.send((signals or {}).get(len(seen)) if seen else None))
        except StopIteration as end:
            return seen, end.value


def stop_after(lm: LanguageModel, tokens: PackedTokens, folder: Path, n_steps: int) -> None:
    job = write_cache(lm, tokens, HOOKS, folder, shard_bytes=4 * CONTEXT_BYTES)
    for _ in range(n_steps):
        next(job)
    job.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def batches(source: Source, n: int = 30, **more: Any) -> list[dict[str, Tensor]]:
    stream = ActivationStream(source, HOOKS, batch_size=8, buffer_tokens=80, seed=3, **more)
    return list(islice((batch for batch in stream.batches() if batch is not None), n))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_a_cached_stream_gives_the_live_ones_batches(
    lm: LanguageModel, tmp_path: Path, dtype: Any, tolerance: float
) -> None:
    tokens = packed(n_last=4)
    write(lm, tokens, tmp_path / "cache", dtype=dtype)
    live = batches(LiveActivations(lm, tokens, HOOKS))
    cached = batches(CachedActivations(tmp_path / "cache", tokens, HOOKS))
    for ours, theirs in zip(cached, live, strict=True):
        for hook in HOOKS:
            assert ours[hook].dtype == torch.float32
            torch.testing.assert_close(ours[hook], theirs[hook], rtol=tolerance, atol=1e-5)


def test_a_restored_cached_stream_goes_on_with_the_same_bits(lm: LanguageModel, tmp_path: Path) -> None:
    tokens = packed()
    write(lm, tokens, tmp_path / "cache")
    source = CachedActivations(tmp_path / "cache", tokens, HOOKS)
    stream = ActivationStream(source, HOOKS, batch_size=8, buffer_tokens=80, seed=3)
    list(islice(stream.batches(), 20))
    restored = ActivationStream(source, HOOKS, batch_size=8, buffer_tokens=80, seed=0)
    restored.restore(stream.state())
    expected = [batch for batch in islice(stream.batches(), 12) if batch is not None]
    found = [batch for batch in islice(restored.batches(), 12 + 1) if batch is not None]  # its buffer is filled anew
    assert all(torch.equal(a[HOOK], b[HOOK]) for a, b in zip(found, expected, strict=False))


def test_some_hooks_and_some_contexts_of_a_cache_can_be_read(lm: LanguageModel, tmp_path: Path) -> None:
    tokens = packed()
    write(lm, tokens, tmp_path / "cache")
    source = CachedActivations(tmp_path / "cache", tokens, [HOOK], 6)
    assert (source.n_contexts, source.widths, source.model_name) == (6, {HOOK: D_IN}, "tiny")
    rows = torch.tensor([5, 0, 4, 4])
    acts = source.contexts(rows)
    expected = activations(lm, tokens.ids.long(), [HOOK])[HOOK][rows]
    torch.testing.assert_close(acts, {HOOK: expected})


def test_the_index_says_what_the_cache_is(lm: LanguageModel, tmp_path: Path) -> None:
    tokens = packed()
    _, info = write(lm, tokens, tmp_path / "cache", n_contexts=10, dtype="bfloat16", shard_bytes=2 * CONTEXT_BYTES)
    assert info == read_index(tmp_path / "cache")
    assert (info.model_name, info.model_sha256) == ("tiny", model_fingerprint(lm))
    assert (info.tokenizer_hash, info.context_size, info.n_contexts, info.dtype) == ("0", 10, 10, "bfloat16")
    assert info.widths == dict.fromkeys(HOOKS, D_IN)
    assert info.shard_contexts == (4, 4, 2)
    assert sorted(contents(tmp_path / "cache")) == ["index.json", *(f"shard-0000{i}.safetensors" for i in range(3))]


def test_progress_counts_tokens_and_says_when_a_shard_is_there(lm: LanguageModel, tmp_path: Path) -> None:
    seen, _ = write(lm, packed(), tmp_path / "cache")
    assert [each.fraction for each in seen] == pytest.approx([4 / 24, 8 / 24, 12 / 24, 16 / 24, 20 / 24, 1, 1])
    assert all(each.checkpointed and each.unit == "tokens" for each in seen)


@pytest.mark.parametrize("n_steps", [1, 2, 4, 6])
def test_a_writer_that_was_killed_goes_on_after_the_last_shard(lm: LanguageModel, tmp_path: Path, n_steps: int) -> None:
    tokens = packed(n_last=4)
    write(lm, tokens, tmp_path / "whole")
    stop_after(lm, tokens, tmp_path / "cache", n_steps)
    assert not (tmp_path / "cache").exists()
    kept = (tmp_path / "cache.part" / "shard-00000.safetensors").stat()
    write(lm, tokens, tmp_path / "cache")
    assert (tmp_path / "cache" / "shard-00000.safetensors").stat().st_ino == kept.st_ino
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "whole"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-41] ^= 4
    path.write_bytes(content)


def flip_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, flip_header, empty, Path.unlink])
def test_a_damaged_shard_of_an_unfinished_cache_is_written_again(
    lm: LanguageModel, tmp_path: Path, damage: Any
) -> None:
    write(lm, packed(), tmp_path / "whole")
    stop_after(lm, packed(), tmp_path / "cache", 4)
    damage(tmp_path / "cache.part" / "shard-00001.safetensors")
    (tmp_path / "cache.part" / "shard-00004.part").write_bytes(b"half")
    write(lm, packed(), tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", [cut, flip_header, empty, Path.unlink])
def test_a_damaged_shard_of_a_finished_cache_is_refused(lm: LanguageModel, tmp_path: Path, damage: Any) -> None:
    write(lm, packed(), tmp_path / "cache")
    damage(tmp_path / "cache" / "shard-00001.safetensors")
    with pytest.raises(CorruptFile, match=r"shard-00001\.safetensors"):
        CachedActivations(tmp_path / "cache", packed(), HOOKS)


def test_a_flipped_bit_is_noticed_when_the_context_is_read(lm: LanguageModel, tmp_path: Path) -> None:
    write(lm, packed(), tmp_path / "cache")
    flip(tmp_path / "cache" / "shard-00001.safetensors")  # in the last bytes of the last tensor: HOOK's
    source = CachedActivations(tmp_path / "cache", packed(), HOOKS)
    source.contexts(torch.tensor([0, 3, 4, 8]))
    with pytest.raises(CorruptFile, match=rf"shard-00001.* damaged.*Context 3 of it at {HOOK}.*checksum"):
        source.contexts(torch.tensor([7]))


@pytest.mark.parametrize("damage", [cut, flip_header, empty])
def test_a_damaged_index_is_refused(lm: LanguageModel, tmp_path: Path, damage: Any) -> None:
    write(lm, packed(), tmp_path / "cache")
    damage(tmp_path / "cache" / "index.json")
    with pytest.raises(CorruptFile, match=r"index\.json"):
        read_index(tmp_path / "cache")


def test_a_number_changed_in_the_index_is_noticed(lm: LanguageModel, tmp_path: Path) -> None:
    write(lm, packed(), tmp_path / "cache")
    path = tmp_path / "cache" / "index.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"n_contexts": 20}), encoding="utf-8")
    with pytest.raises(CorruptFile, match="hash is not the one"):
        read_index(tmp_path / "cache")


def test_an_unfinished_cache_cannot_be_read_and_one_that_is_not_there_neither(
    lm: LanguageModel, tmp_path: Path
) -> None:
    stop_after(lm, packed(), tmp_path / "cache", 2)
    with pytest.raises(CorruptFile, match="never finished"):
        read_index(tmp_path / "cache.part")
    with pytest.raises(NotFound, match="There is no cache of activations cache"):
        CachedActivations(tmp_path / "cache", packed(), HOOKS)


def test_a_cache_that_is_there_already_is_left_alone(lm: LanguageModel, tmp_path: Path) -> None:
    _, first = write(lm, packed(), tmp_path / "cache")
    before = contents(tmp_path / "cache")
    seen, second = write(lm, packed(), tmp_path / "cache", [HOOK], n_contexts=10)
    assert second == first
    assert len(seen) == 1
    assert contents(tmp_path / "cache") == before


def test_a_cache_of_other_activations_is_refused_with_what_differs(lm: LanguageModel, tmp_path: Path) -> None:
    write(lm, packed(), tmp_path / "cache", [HOOK], n_contexts=12)

    def reading(tokens: PackedTokens, hooks: Sequence[str] = (HOOK,), n: int | None = None, **more: Any) -> None:
        CachedActivations(tmp_path / "cache", tokens, hooks, n, **more)

    other_tokenizer = packed()
    other_tokenizer.info = other_tokenizer.info.model_copy(update={"tokenizer_hash": "1"})
    reading(packed(), model_sha256=model_fingerprint(lm))
    with pytest.raises(BadInput, match="another model or precision: of tiny"):
        reading(packed(), model_sha256=model_fingerprint(tiny_lm(seed=1)))
    with pytest.raises(BadInput, match="The tokenizer differs"):
        reading(other_tokenizer)
    with pytest.raises(BadInput, match="made of other tokens"):
        reading(packed(seed=1))
    with pytest.raises(BadInput, match="made of 12 contexts, and these are 5"):
        reading(packed(n_contexts=5))
    with pytest.raises(BadInput, match="contexts have 10 tokens, these 12"):
        reading(packed(context_size=12))
    with pytest.raises(BadInput, match=rf"taken at {HOOK}, not at blocks\.0\.hook_mlp_out"):
        reading(packed(), HOOKS)
    with pytest.raises(BadInput, match="have 12 contexts, and 13 are wanted"):
        reading(packed(), n=13)
    with pytest.raises(Conflict, match=r"holds other activations.*another model.*They are float32, not bfloat16"):
        write(tiny_lm(seed=1), packed(), tmp_path / "cache", [HOOK], n_contexts=12, dtype="bfloat16")


def test_text_after_the_cached_contexts_may_differ(lm: LanguageModel, tmp_path: Path) -> None:
    write(lm, packed(), tmp_path / "cache", n_contexts=12)
    longer = packed(n_contexts=24)
    longer.ids[12:] = 5
    assert CachedActivations(tmp_path / "cache", longer, HOOKS).n_contexts == 12


def test_half_a_cache_of_other_activations_is_replaced(lm: LanguageModel, tmp_path: Path) -> None:
    stop_after(tiny_lm(seed=1), packed(), tmp_path / "cache", 3)
    write(lm, packed(), tmp_path / "cache")
    source = CachedActivations(tmp_path / "cache", packed(), [HOOK])
    expected = activations(lm, packed().ids[:1].long(), [HOOK])[HOOK]
    torch.testing.assert_close(source.contexts(torch.tensor([0]))[HOOK], expected)


def test_stop_keeps_the_contexts_so_far(lm: LanguageModel, tmp_path: Path) -> None:
    _, info = write(lm, packed(), tmp_path / "cache", signals={2: Signal.STOP})
    assert (info.n_contexts, info.shard_contexts) == (8, (4, 4))
    stream = batches(CachedActivations(tmp_path / "cache", packed(), HOOKS))
    live = batches(LiveActivations(lm, packed(), HOOKS, 8))
    for ours, theirs in zip(stream, live, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_stop_is_heard_while_an_earlier_writers_shards_are_checked(lm: LanguageModel, tmp_path: Path) -> None:
    stop_after(lm, packed(), tmp_path / "cache", 3)
    seen, info = write(lm, packed(), tmp_path / "cache", signals={1: Signal.STOP})
    assert [each.stage for each in seen[:3]] == ["checking what is there"] * 3
    assert info.n_contexts == 12


def test_a_checkpoint_completes_a_shard_at_once_and_loses_nothing(lm: LanguageModel, tmp_path: Path) -> None:
    big = tiny_lm()
    seen, info = write(big, packed(), tmp_path / "cache", signals={1: Signal.CHECKPOINT}, shard_bytes=1 << 20)
    assert [each.checkpointed for each in seen][:2] == [True, True]
    assert sum(info.shard_contexts) == 24
    job = write_cache(big, packed(), HOOKS, tmp_path / "other", shard_bytes=4 * CONTEXT_BYTES)
    next(job)
    assert job.send(Signal.CHECKPOINT).checkpointed
    job.close()
    assert len(list((tmp_path / "other.part").glob("*.safetensors"))) == 1


def test_the_size_on_disk_is_known_beforehand(lm: LanguageModel, tmp_path: Path) -> None:
    tokens = packed()
    widths = LiveActivations(lm, tokens, HOOKS).widths
    for dtype in ("float32", "bfloat16"):
        write(lm, tokens, tmp_path / dtype, n_contexts=20, dtype=dtype)
        found = sum(path.stat().st_size for path in (tmp_path / dtype).iterdir())
        expected = cache_bytes(tokens, widths, 20, dtype)
        assert 0 < found - expected < 1024 * len(list((tmp_path / dtype).iterdir()))
    assert cache_bytes(tokens, widths, None, "float16") == 24 * (10 * 2 * D_IN * 2 + 16)


def test_a_disk_too_small_is_said_before_anything_is_computed(lm: LanguageModel, tmp_path: Path) -> None:
    tokens = packed()
    tokens.ids, tokens.n_real = tokens.ids[:1].expand(1 << 40, 10), tokens.n_real[:1].expand(1 << 40)
    with pytest.raises(DiskFull, match=r"Caching activations needs 1.* TiB of disk and .* is free"):
        write(lm, tokens, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    lm = tiny_lm()
    lm.layout.blocks[1].get_submodule("mlp.c_proj").get_parameter("bias").data[3] = 1e6
    with pytest.raises(BadInput, match=rf"{HOOK} are not finite in float16.*contexts 0 to 7.*bfloat16"):
        write(lm, packed(), tmp_path / "cache", dtype="float16")
    write(lm, packed(), tmp_path / "cache", dtype="bfloat16")


def test_a_hook_outside_the_model_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UnknownHook, match="outside tiny"):
        write(lm, packed(), tmp_path / "cache", ["blocks.7.hook_resid_post"])


def test_a_fingerprint_tells_models_and_precisions_apart() -> None:
    assert model_fingerprint(tiny_lm()) == model_fingerprint(tiny_lm())
    half = tiny_lm()
    half.hf.half()
    nudged = tiny_lm()
    nudged.hf.get_input_embeddings().weight.data[0, 0] += 1
    fingerprints = {model_fingerprint(lm) for lm in (tiny_lm(), tiny_lm(seed=1), half, nudged)}
    assert len(fingerprints) == 4


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says which pages of a file are in memory")
def test_reading_a_context_maps_its_pages_and_not_the_file(lm: LanguageModel, tmp_path: Path) -> None:
    tokens = packed(n_contexts=4096, context_size=32)  # 8 MiB a hook
    write(lm, tokens, tmp_path / "cache", shard_bytes=1 << 30)
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    n_bytes = shard.stat().st_size

    def resident() -> int:
        """Bytes of the shard that this process has in memory."""
        total, counts = 0, False
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
            if "-" in line.split(" ", 1)[0]:
                counts = line.endswith(str(shard))
            elif counts and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
        return total

    source = CachedActivations(tmp_path / "cache", tokens, [HOOK])
    assert resident() < n_bytes / 50
    source.contexts(torch.tensor([1000]))
    assert 0 < resident() < n_bytes / 4  # the kernel maps up to 2 MiB around what is read
