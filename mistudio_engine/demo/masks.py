"""Concepts of tokens: the grammar's word-level concepts carried over to a tokenizer's tokens by character offsets.

A token has the concepts of the word in which its first character that is not a space lies (a lone space belongs to the
word after it); special tokens, which stand for no text, have none. It does not know which tokenizer made the offsets.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from mistudio_engine.demo.concepts import CONCEPT_NAMES
from mistudio_engine.demo.grammar import Document

__all__ = ["concept_mask"]

COLUMN = {name: column for column, name in enumerate(CONCEPT_NAMES)}


def concept_mask(document: Document, offsets: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Which concepts each token lies in, bool (n_tokens, n_concepts), columns as in `CONCEPT_NAMES`.

    `offsets` are the (start, end) characters of the tokens in `document.text`, as a fast tokenizer returns them with
    `return_offsets_mapping=True`; an empty span (a special token) gets no concept.
    """
    mask = torch.zeros(len(offsets), len(CONCEPT_NAMES), dtype=torch.bool)
    starts = [word.start for word in document.words]
    for row, (start, end) in enumerate(offsets):
        if start >= end:
            continue
        while start < end and document.text[start] == " ":
            start += 1
        for name in document.words[bisect_right(starts, start) - 1].concepts:
            mask[row, COLUMN[name]] = True
    return mask
