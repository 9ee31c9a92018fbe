"""Tokens that an extraction left out are neither silent nor firing: an analysis compares with the others alone."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from discovery_data import HOOK, drain, packed

from mistudio_engine.discovery.analysis import Analyst
from mistudio_engine.discovery.extraction import extract
from mistudio_engine.discovery.nlp import load_pipeline

WORDS = ("cat", "dog", "house", "Tom", "Anna", "red", "not", "in", "the", "see")
FIRST, LEFT_OUT = 4, ("the", "in")


class Recount(NamedTuple):
    n: int
    word: Counter[str]
    before: Counter[str]


def recount(rows: list[list[str]], firing: str) -> Recount:
    """Words that were looked at and on which nothing fires, with what stands right before each."""
    found = Recount(0, Counter(), Counter())
    for row in rows:
        for i, word in enumerate(row):
            if i < FIRST or word in LEFT_OUT or word == firing:
                continue
            found = found._replace(n=found.n + 1)
            found.word[word.casefold()] += 1
            found.before[row[i - 1].casefold()] += 1
    return found


@pytest.mark.parametrize("everywhere", [False, True])
def test_shares_elsewhere_equal_a_count_over_what_was_looked_at(planted, tokenizer, tmp_path, everywhere):
    """A cat comes after “not”, but for the beginnings; where it comes in every context, the base is what stands
    beside it."""
    ids = {word: tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in WORDS}
    assert all(len(each) == 1 for each in ids.values())
    rng = np.random.default_rng(0)
    rows = [rng.choice(["dog", "house", "Tom", "Anna", "red", "in", "the", "see"], 24).tolist() for _ in range(10)]
    for n, row in enumerate(rows):
        row[1] = "cat"  # nobody looks there
        if everywhere:
            row[11 + n % 3 : 13 + n % 3] = ["not", "cat"]
    if not everywhere:
        rows += [[*row[:15], "not", "cat", *row[17:]] for row in rows]
    table = torch.zeros(len(tokenizer), 2)
    table[ids["cat"][0], 0] = 3.0
    table[ids["the"][0], 0] = 9.0
    lm, sae = planted(table)
    tokens = packed(torch.tensor([[ids[word][0] for word in row] for row in rows]), len(tokenizer))
    left_out = tuple(ids[word][0] for word in LEFT_OUT)
    settings = {"exclude_first": FIRST, "exclude_token_ids": left_out, "n_zero": 10}
    store, _ = drain(extract(lm, sae, tokens, HOOK, tmp_path / "x", **settings))

    found = Analyst(tokenizer, load_pipeline("blank:xx")).analyse(0, store.examples(0))
    expected = recount(rows if everywhere else rows[:10], "cat")
    assert found.n_silent_words == expected.n > 100
    assert found.n_silent_contexts == (0 if everywhere else 10)
    assert [(row.name, row.share, row.base) for row in found.words] == [("cat", 1.0, 0.0)]
    pattern = next(row for row in found.patterns if (row.where, row.name) == ("before", "not"))
    assert (pattern.share, pattern.base) == (1.0, expected.before["not"] / expected.n)
