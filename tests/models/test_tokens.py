"""Packing throws nothing away, puts BOS and separators where it says, and writes a folder whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mistudio_engine.api.errors import BadInput, Conflict, CorruptFile, EmptyData
from mistudio_engine.models.tokens import PackedTokens, TokensInfo, load_tokens, pack, tokens_key

BOS, EOS, PAD, MARK = 256, 257, 258, 259


def run(generator) -> TokensInfo:
    while True:
        try:
            next(generator)
        except StopIteration as done:
            return done.value


def packed(documents, tokenizer, folder, **options) -> PackedTokens:
    info = run(pack(documents, tokenizer, folder, **options))
    tokens = load_tokens(folder)
    assert tokens.info == info
    return tokens


def real_rows(tokens: PackedTokens) -> list[list[int]]:
    return [row[: int(n)].tolist() for row, n in zip(tokens.ids, tokens.n_real, strict=True)]


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


def test_every_context_begins_with_bos_and_documents_are_separated_by_eos(tokenizer, tmp_path):
    tokens = packed(["abc", "de", "fghij"], tokenizer, tmp_path / "t", context_size=5)
    a = ord("a")
    assert real_rows(tokens) == [
        [BOS, a, a + 1, a + 2, EOS],
        [BOS, a + 3, a + 4, EOS, a + 5],
        [BOS, a + 6, a + 7, a + 8, a + 9],
    ]
    assert (tokens.info.bos_policy, tokens.info.separator_token_id, tokens.info.bos_token_id) == ("context", EOS, BOS)
    assert tokens.document_lengths.tolist() == [3, 2, 5]


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        ("context", [[BOS, 97, 98, EOS], [BOS, 99, 100, 101], [BOS, 102]]),
        ("document", [[BOS, 97, 98, EOS], [BOS, 99, 100, 101], [102]]),
        ("both", [[BOS, 97, 98, EOS], [BOS, 99, 100, 101], [BOS, 102]]),
        ("none", [[97, 98, EOS, 99], [100, 101, 102]]),
    ],
)
def test_bos_stands_where_the_policy_says_and_never_twice(tokenizer, tmp_path, policy, rows):
    tokens = packed(["ab", "cdef"], tokenizer, tmp_path / "t", context_size=4, bos_policy=policy)
    assert real_rows(tokens) == rows
    assert tokens.info.bos_policy == policy


def test_a_tokenizer_whose_bos_is_its_eos_separates_documents_once(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="<s>")
    rows = {
        policy: real_rows(packed(["ab", "c"], tokenizer, tmp_path / policy, context_size=8, bos_policy=policy))
        for policy in ("context", "document", "both", "none")
    }
    assert rows == {
        "context": [[BOS, 97, 98, BOS, 99]],
        "document": [[BOS, 97, 98, BOS, 99]],
        "both": [[BOS, 97, 98, BOS, 99]],
        "none": [[97, 98, BOS, 99]],
    }


def test_without_eos_the_separator_is_bos_and_without_both_there_is_none(make_tokenizer, tmp_path):
    bos_only = make_tokenizer(bos_token="<s>")
    assert real_rows(packed(["ab", "c"], bos_only, tmp_path / "a", context_size=8)) == [[BOS, 97, 98, BOS, 99]]
    none = packed(["ab", "c"], bos_only, tmp_path / "b", context_size=8, bos_policy="none")
    assert real_rows(none) == [[97, 98, 99]]
    assert none.info.separator_token_id is None


def test_a_policy_that_the_tokenizer_cannot_follow_is_recorded_as_what_was_done(make_tokenizer, tmp_path):
    tokens = packed(["ab", "c"], make_tokenizer(eos_token="</s>"), tmp_path / "t", context_size=8, bos_policy="both")
    assert real_rows(tokens) == [[97, 98, EOS, 99]]
    assert (tokens.info.bos_policy, tokens.info.bos_token_id) == ("none", None)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.text(alphabet="ab é", max_size=12), min_size=1, max_size=8),
    context_size=st.integers(2, 9),
    policy=st.sampled_from(["context", "document", "both", "none"]),
    limit=st.none() | st.integers(1, 40),
)
def test_whatever_the_documents_nothing_is_lost_and_the_counts_are_right(
    tokenizer, tmp_path_factory, documents, context_size, policy, limit
):
    folder = tmp_path_factory.mktemp("packed") / "t"
    options = {"context_size": context_size, "bos_policy": policy, "n_tokens": limit}
    text = [list(document.encode()) for document in documents if document]
    if not text:
        with pytest.raises(EmptyData):
            run(pack(documents, tokenizer, folder, **options))
        return
    try:
        tokens = packed(documents, tokenizer, folder, **options)
    except EmptyData:
        assert limit == 1  # room for BOS alone
        return
    rows = real_rows(tokens)
    flat = [token for row in rows for token in row]
    whole = [token for document in text for token in document]
    kept = [token for token in flat if token < 256]
    assert kept == whole[: len(kept)]
    assert len(flat) == tokens.info.n_tokens == int(tokens.n_real.sum())
    assert len(flat) == limit or ((limit is None or len(flat) < limit) and kept == whole)
    assert all(len(row) == context_size for row in rows[:-1])
    if policy in ("context", "both"):
        assert all(row[0] == BOS for row in rows)
    if policy == "none":
        assert BOS not in flat
    assert not any((BOS, BOS) in set(pairwise(row)) for row in rows)
    assert int(tokens.document_lengths.sum()) == len(kept)
    assert torch.equal(tokens.ids[tokens.mask(slice(None))], torch.tensor(flat, dtype=torch.int32))
    assert tokens.ids[tokens.mask(slice(None), special=False)].tolist() == kept


def test_the_mask_leaves_padding_out_and_special_tokens_when_asked(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="</s>")  # padding looks like an end
    tokens = packed(["ab", "<mark>c"], tokenizer, tmp_path / "t", context_size=8)
    assert tokens.ids[0].tolist() == [BOS, 97, 98, EOS, MARK, 99, EOS, EOS]
    assert tokens.mask([0]).tolist() == [[True] * 6 + [False] * 2]
    assert tokens.mask(torch.tensor([0]), special=False).tolist() == [
        [False, True, True, False, False, True, False, False]
    ]


def test_exactly_as_many_tokens_as_asked_are_taken(tokenizer, tmp_path):
    tokens = packed(["abcdefghij"] * 50, tokenizer, tmp_path / "t", context_size=8, n_tokens=101)
    assert (tokens.info.n_tokens, tokens.info.n_contexts, int(tokens.n_real[-1])) == (101, 13, 5)


def test_packing_stops_reading_once_it_has_its_tokens(tokenizer, tmp_path):
    def endless() -> Iterator[str]:
        while True:
            yield "abc" * 1000

    assert packed(endless(), tokenizer, tmp_path / "t", n_tokens=1000).info.n_tokens == 1000


@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
def test_no_text_is_an_error_and_leaves_nothing(tokenizer, tmp_path, documents):
    with pytest.raises(EmptyData):
        run(pack(documents, tokenizer, tmp_path / "t"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"context_size": 1}, {"context_size": 65, "n_ctx": 64}, {"n_tokens": 0}])
def test_sizes_that_cannot_be_used_are_refused_before_anything_is_written(tokenizer, tmp_path, options):
    with pytest.raises(BadInput):
        run(pack(["abc"], tokenizer, tmp_path / "t", **options))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_not_overwritten(tokenizer, tmp_path):
    packed(["abc"], tokenizer, tmp_path / "t")
    with pytest.raises(Conflict):
        run(pack(["other"], tokenizer, tmp_path / "t"))
    assert load_tokens(tmp_path / "t").info.n_documents == 1


def test_cancelling_or_failing_leaves_nothing(tokenizer, tmp_path):
    def endless() -> Iterator[str]:
        while True:
            yield "abc" * 1000

    generator = pack(endless(), tokenizer, tmp_path / "t")
    progress = next(generator)
    assert progress.n_tokens > 0 and progress.fraction is None
    assert [path.name for path in tmp_path.iterdir()] == ["t.part"]
    generator.close()
    assert list(tmp_path.iterdir()) == []

    def failing() -> Iterator[str]:
        yield "abc"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        run(pack(failing(), tokenizer, tmp_path / "t"))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_behind_is_replaced(tokenizer, tmp_path):
    (tmp_path / "t.part").mkdir()
    (tmp_path / "t.part" / "tokens.safetensors").write_bytes(b"half")
    assert packed(["abc"], tokenizer, tmp_path / "t").info.n_tokens == 4
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_progress_ends_at_one(tokenizer, tmp_path):
    steps = list(pack(["abc"] * 10, tokenizer, tmp_path / "t", n_tokens=20))
    assert steps[-1] == (5, 20, 1.0)


def test_the_same_text_gives_the_same_bytes(tokenizer, tmp_path):
    for name in ("a", "b"):
        packed(["abc", "déf"], tokenizer, tmp_path / name, context_size=4)
    for file in ("tokens.safetensors", "tokens.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def spoil(folder: Path, **fields) -> None:
    info = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps({**info, **fields}))


def test_torn_tokens_are_refused(tokenizer, tmp_path):
    folder = tmp_path / "t"
    packed(["abc" * 100], tokenizer, folder, context_size=8)
    whole = (folder / "tokens.safetensors").read_bytes()
    for n_bytes in (0, 7, 100, len(whole) - 1):
        (folder / "tokens.safetensors").write_bytes(whole[:n_bytes])
        with pytest.raises(CorruptFile):
            load_tokens(folder)
    (folder / "tokens.safetensors").unlink()
    with pytest.raises(CorruptFile, match=r"tokens\.safetensors is missing"):
        load_tokens(folder)


@pytest.mark.parametrize(
    "fields", [{"n_contexts": 3}, {"context_size": 7}, {"n_tokens": 5}, {"bos_policy": "sometimes"}, {"format": "x"}]
)
def test_an_info_that_contradicts_the_tokens_is_refused(tokenizer, tmp_path, fields):
    packed(["abc" * 100], tokenizer, tmp_path / "t", context_size=8)
    spoil(tmp_path / "t", **fields)
    with pytest.raises(CorruptFile):
        load_tokens(tmp_path / "t")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CorruptFile, match=r"tokens\.json is missing"):
        load_tokens(tmp_path / "t")


def test_the_key_changes_with_text_tokenizer_and_settings_and_with_nothing_else(make_tokenizer, tokenizer):
    key = tokens_key("text", tokenizer, {"context_size": 128, "bos_policy": "context"})
    assert len(key) == 16 and set(key) <= set("0123456789abcdef")
    tokenizer("abc", truncation=True, max_length=2, padding="max_length")  # leaves its settings in the tokenizer
    assert tokens_key("text", tokenizer, {"bos_policy": "context", "context_size": 128}) == key
    others = {
        tokens_key("other", tokenizer, {"context_size": 128, "bos_policy": "context"}),
        tokens_key("text", tokenizer, {"context_size": 64, "bos_policy": "context"}),
        tokens_key("text", make_tokenizer(eos_token="</s>"), {"context_size": 128, "bos_policy": "context"}),
    }
    assert len(others | {key}) == 4


def test_real_stories_survive_packing_token_for_token(shared, real_lm, tmp_path):
    lines = (shared / "data" / "text" / "tinystories_1000.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    stories = [json.loads(line)["text"] for line in lines]
    tokens = packed(stories, real_lm.tokenizer, tmp_path / "t", context_size=128, n_ctx=real_lm.n_ctx)
    kept = tokens.ids[tokens.mask(slice(None), special=False)].tolist()
    assert kept == [token for story in stories for token in real_lm.encode(story, bos=False)]
    assert (tokens.ids[:, 0] == real_lm.bos_token_id).all()
