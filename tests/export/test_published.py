"""What Neuronpedia publishes is read, and what only pretends to be that does no harm."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from mistudio_engine.api.errors import BadInput, CorruptFile, WrongShape
from mistudio_engine.export import neuronpedia_reader as reader
from mistudio_engine.export.neuronpedia_reader import Identity, Refused, check_identity, fidelity, model_names

ROW: dict[str, Any] = {"modelId": "gpt2-small", "layer": "8-res-jb", "index": "7"}
EXAMPLE = ROW | {"tokens": ["a", " b", "\n"], "values": [0, 2.5, 1], "binMin": -1, "binMax": 3.0, "binContains": 0.01}


def packed(path: Path, *lines: Any) -> Path:
    """A gzipped file of these lines; what is not bytes is written as JSON."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(gzip.compress(b"\n".join(raw) + b"\n"))
    return path


def rows(read: Any, path: Path) -> list[Any]:
    found = list(read(path))
    assert all(0 <= share <= 1 for share, _ in found)
    return [row for _, row in found]


def test_rows_of_all_three_kinds_are_read(tmp_path):
    feature = ROW | {
        "maxActApprox": 12.5,
        "frac_nonzero": 0.003,
        "hookName": "blocks.8.hook_resid_pre",
        "vector": [1, 2],
    }
    explanation = ROW | {
        "id": "cm1",
        "description": " words about  cats ",
        "authorId": "clkht01d4",
        "typeName": "oai_token-act-pair",
        "explanationModelName": "gpt-4o-mini",
        "scoreV1": 0.8,
        "scoreV2": None,
    }
    (one,) = rows(reader.read_features, packed(tmp_path / "f", feature))
    assert one == (7, Identity("gpt2-small", "8-res-jb"), 12.5, 0.003, "blocks.8.hook_resid_pre")
    assert one.of.layer == 8
    (one,) = rows(reader.read_explanations, packed(tmp_path / "e", explanation))
    assert (one.label, one.author, one.id) == ("words about cats", "clkht01d4", "cm1")
    assert (one.method, one.scores) == ("oai_token-act-pair/gpt-4o-mini", {"scoreV1": 0.8})
    (one,) = rows(reader.read_examples, packed(tmp_path / "a", EXAMPLE))
    assert (one.tokens, one.values, one.position) == (["a", " b", "\n"], [0.0, 2.5, 1.0], 1)
    assert (one.bin_min, one.bin_max, one.bin_contains) == (-1.0, 3.0, 0.01)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"index": ' + b"9" * 5000 + b"}", "not JSON"),
        (EXAMPLE | {"index": "-1"}, "its index"),
        (EXAMPLE | {"index": "７"}, "its index"),
        (EXAMPLE | {"index": 1e3}, "its index"),
        (EXAMPLE | {"index": True}, "its index"),
        (EXAMPLE | {"index": "9" * 40}, "its index"),
        (EXAMPLE | {"index": None}, "its index"),
        (EXAMPLE | {"modelId": 3}, "which model"),
        (EXAMPLE | {"layer": None}, "which model"),
        (EXAMPLE | {"tokens": ["a"]}, "tokens with a value each"),
        (EXAMPLE | {"tokens": [], "values": []}, "tokens with a value each"),
        (EXAMPLE | {"tokens": "abc"}, "tokens with a value each"),
        (EXAMPLE | {"tokens": ["a"] * 5000, "values": [0] * 5000}, "tokens with a value each"),
        (EXAMPLE | {"tokens": ["a", 1, "b"]}, "not a short text"),
        (EXAMPLE | {"tokens": ["a", "b" * 600, "c"]}, "not a short text"),
        (EXAMPLE | {"values": [0, float("nan"), 1]}, "not a number"),
        (EXAMPLE | {"values": [0, float("inf"), 1]}, "not a number"),
        (EXAMPLE | {"values": [0, 10**400, 1]}, "not a number"),
        (EXAMPLE | {"values": [0, "1", 1]}, "not a number"),
        (EXAMPLE | {"values": [0, True, 1]}, "not a number"),
    ],
)
def test_a_line_that_is_not_what_it_should_be_is_refused_and_the_next_goes_on(tmp_path, line, reason):
    refused, good = rows(reader.read_examples, packed(tmp_path / "a", line, EXAMPLE))
    assert isinstance(refused, Refused) and reason in refused.reason
    assert good.values == [0.0, 2.5, 1.0]


@pytest.mark.parametrize("label", [None, "", "  ", 7, ["x"], "\u202e\u200b", "\x00\x1b"])
def test_an_explanation_without_words_is_refused(tmp_path, label):
    (found,) = rows(reader.read_explanations, packed(tmp_path / "e", ROW | {"description": label}))
    assert found == Refused("no description")


def test_labels_and_names_are_made_plain(tmp_path):
    hostile = ROW | {
        "description": "cats\x1b[31m\r\n\u202edogs\ud800 <script>" + "x" * 5000,
        "authorId": "../../etc\n; rm",
        "typeName": "a\x00b",
        "id": "x" * 500,
    }
    (found,) = rows(reader.read_explanations, packed(tmp_path / "e", hostile))
    assert found.label.isprintable() and len(found.label) == 300
    assert found.label.startswith("cats [31m dogs� <script>xxx")
    assert found.author == "../../etc___rm" and found.method == "a_b" and len(found.id) == 64


def test_tokens_with_lone_surrogates_can_be_kept(tmp_path):
    (found,) = rows(reader.read_examples, packed(tmp_path / "a", EXAMPLE | {"tokens": ["\ud83d", "\udc00x", "猫"]}))
    assert found.tokens == ["�", "�x", "猫"]
    "".join(found.tokens).encode()


def test_a_line_beyond_the_bound_is_refused_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 1000)
    found = rows(reader.read_examples, packed(tmp_path / "a", b"x" * 5000, EXAMPLE, b"y" * 1000))
    assert [type(row) is Refused for row in found] == [True, False, True]


def test_a_bomb_is_found_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "FREE_BYTES", 1 << 20)
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(b"\n" * (64 << 20)))
    tracemalloc.start()
    with pytest.raises(CorruptFile, match="unpacks to more than"):
        list(reader.read_features(path))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip", "empty"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = packed(tmp_path / "a", *[EXAMPLE] * 200)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-20]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    elif damage == "not gzip":
        data = bytearray(b"<html>not found</html>")
    else:
        path.write_bytes(b"")
        assert rows(reader.read_examples, path) == []
        return
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptFile, match="is not a file of lines"):
        list(reader.read_examples(path))


def test_only_names_of_the_tree_are_names():
    assert reader.parse_file_name("features/batch-12.jsonl.gz") == ("features", 12)
    for name in (
        "../features/batch-1.jsonl.gz",
        "features/batch-1.jsonl",
        "features/batch--1.jsonl.gz",
        "x/batch-1.jsonl.gz",
    ):
        assert reader.parse_file_name(name) is None


def test_what_is_of_another_sae_is_refused():
    found = Identity("gpt2-small", "8-res-jb")
    models = model_names("mine", "openai-community/gpt2")
    assert models == {"mine", "gpt2", "gpt2-small"}
    check_identity(found, expected=found, models=models, layer=8, hook_name="blocks.8.hook_resid_pre")
    with pytest.raises(WrongShape, match="8-res-jb and gpt2-small/9-res-jb was asked for"):
        check_identity(found, expected=Identity("gpt2-small", "9-res-jb"), models=models, layer=8)
    with pytest.raises(WrongShape, match="check_model=false"):
        check_identity(found, expected=None, models=model_names("pythia-70m"), layer=8)
    check_identity(found, expected=None, models=set(), layer=8)
    with pytest.raises(WrongShape, match="layer 8 and the SAE reads layer 9"):
        check_identity(found, expected=None, models=models, layer=9)
    with pytest.raises(WrongShape, match="hook_resid_post and the SAE reads"):
        check_identity(
            found,
            expected=None,
            models=models,
            layer=8,
            hook_name="blocks.8.hook_resid_pre",
            published_hook="blocks.8.hook_resid_post",
        )


def test_fidelity_is_scipys_rank_correlation_with_a_verdict():
    generator = np.random.default_rng(0)
    ours = np.round(generator.exponential(2, 300), 1) + 0.1  # with ties
    near, far = ours * 3 + generator.normal(0, 0.2, 300).clip(-0.2), generator.permutation(ours)
    found = fidelity(near, ours, ours, near)
    assert found.max_correlation == pytest.approx(spearmanr(near, ours).statistic)
    assert found.frequency_correlation == pytest.approx(spearmanr(ours, near).statistic)
    assert (found.verdict, found.n) == ("matches", 300)
    assert fidelity(far, ours, ours, ours).verdict == "differs"
    assert fidelity(ours[:9], ours[:9], ours[:9], ours[:9]).verdict == "unknown"
    half = np.where(np.arange(300) < 150, np.nan, ours)
    assert fidelity(half, ours, ours, ours).n == 150
    with pytest.raises(BadInput):
        fidelity([1.0], [1.0, 2.0], [1.0], [1.0])
