"""Streamed text has whole characters only and ends before a stop sequence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistudio_engine.steering.text_stream import TextStream


def decode(ids: list[int]) -> str:
    """Byte tokens, as byte-level tokenizers decode them."""
    return bytes(ids).decode("utf-8", errors="replace")


def feed(stream: TextStream, data: bytes) -> list[str]:
    pieces = []
    for byte in data:
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


@given(st.text(min_size=1), st.text())
def test_any_text_arrives_whole_and_never_broken(prompt: str, text: str) -> None:
    stream = TextStream(decode, list(prompt.encode()))
    pieces = feed(stream, text.encode())
    assert "".join(pieces) == stream.text == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@given(st.binary(min_size=1))
def test_bytes_that_are_no_text_read_as_replacements_and_nothing_is_lost(data: bytes) -> None:
    stream = TextStream(decode, [65])
    assert "".join(feed(stream, data)) == stream.text
    assert stream.text.rstrip("�") == decode(list(data)).rstrip("�")


@given(st.text(alphabet="ab€", max_size=12), st.lists(st.text(alphabet="ab€", min_size=1, max_size=3), max_size=3))
def test_the_text_ends_before_the_first_stop_sequence_to_be_complete(text: str, stops: list[str]) -> None:
    stream = TextStream(decode, [65], stops)
    pieces = feed(stream, text.encode())
    complete = [n for n in range(1, len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    if complete:
        seen = text[: complete[0]]
        expected = seen[: min(at for stop in stops if (at := seen.find(stop)) >= 0)]
    else:
        expected = text
    assert "".join(pieces) == stream.text == expected
    assert stream.stopped == bool(complete)


def test_a_character_that_began_in_the_prompt_is_completed_in_the_text() -> None:
    euro = "€".encode()
    stream = TextStream(decode, [65, *euro[:2]])
    assert stream.push(euro[2]) == "€"


def test_a_space_before_the_first_word_is_kept_where_the_decoder_would_drop_it() -> None:
    words = {1: "▁Once", 2: "▁upon", 3: "on"}

    def sentencepiece(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(sentencepiece, [1])
    assert [stream.push(2), stream.push(3), stream.push(2)] == [" upon", "on", " upon"]


@pytest.mark.parametrize("n", [1, 50])
def test_decoding_a_token_costs_the_same_however_long_the_text_is(n: int) -> None:
    lengths = []

    def counting(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    stream = TextStream(counting, [65])
    for _ in range(n):
        stream.push(66)
    assert max(lengths) < 10
