"""From an answer comes a short printable label on one line, or a reason why there is none."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mistudio_engine.api.operations import SetLabel
from mistudio_engine.api.plain_words import plain_line
from mistudio_engine.discovery.labelling.answers import LONGEST_LABEL, NotALabel, Written, read_label


def written(label: str, category: str = "Animal > Cat", reasoning: str = "All are.") -> str:
    return json.dumps({"reasoning": reasoning, "label": label, "category": category})


def test_an_answer_of_the_schema_is_a_label():
    assert read_label(written("names of cats")) == Written("names of cats", "Animal > Cat", "All are.")


@pytest.mark.parametrize(
    "text",
    [
        "```json\n" + written("cats") + "\n```",
        "Sure! Here it is: " + written("cats"),
        "A set {of braces} first. " + written("cats") + " I hope this helps.",
        written("cats") + written("dogs"),
        '{"label": "cats", "category": "Animal > Cat", "reasoning": "All\nare."}',
    ],
    ids=["fence", "prose", "braces", "two", "newline in a text"],
)
def test_a_label_is_found_in_what_stands_around_it(text):
    read = read_label(text)
    assert isinstance(read, Written) and read.label == "cats"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "unparsable"),
        ("cats", "unparsable"),
        ('{"label": "ca', "unparsable"),
        ("[1, 2]", "unparsable"),
        ('{"category": "A"}', "unparsable"),
        ('{"label": 7}', "unparsable"),
        ('{"label": ["cats"]}', "unparsable"),
        ('{"label": "cats", "category": 3}', "unparsable"),
        ('{"label": null}', "unparsable"),
        ("{" * 5000, "unparsable"),
        (written("word " * 17), "too_long"),
        (written("x" * (LONGEST_LABEL + 1)), "too_long"),
        (written(""), "no_pattern"),
        (written(" \u202e\u200b "), "no_pattern"),
        (written("N/A", ""), "no_pattern"),
        (written("mixed", "Various > Unknown"), "no_pattern"),
        (written("could not be parsed"), "no_pattern"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_label_has_a_reason(text, reason):
    read = read_label(text)
    assert isinstance(read, NotALabel) and read.reason == reason and read.detail


def test_to_see_nothing_is_an_answer_and_not_to_be_pressed():
    read = read_label(written("", reasoning="Nothing in common."))
    assert read == NotALabel("no_pattern", "Nothing in common.", final=True)
    unreadable = read_label("hm")
    assert isinstance(unreadable, NotALabel) and not unreadable.final


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        ('"cats"', "cats"),
        ("**cats**.", "cats"),
        ("cats\nand\tdogs", "cats and dogs"),
        ("cats\u202egnp.exe", "cats gnp.exe"),
        ("a\x00b\x1b[31m", "a b [31m"),
        (".", "."),
        ("?!", "?!"),
        ("кошки", "кошки"),
        ("null", "null"),
        ("Error", "Error"),
        ("“mixed”", "mixed"),
        ('names such as "Tom"', 'names such as "Tom"'),
        ('"Tom" and "Tim"', '"Tom" and "Tim"'),
        ("'tis", "'tis"),
        ("***", "***"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("क्\u200dष", "क्\u200dष"),
        ("👩🏽\u200d💻 and ❤️\u200d🔥", "👩🏽\u200d💻 and ❤️\u200d🔥"),
        ("c\u200dats\u200c and \u200ddogs", "cats and dogs"),
        ("می\u202e\u2066\u200bخواهم", "می خواهم"),
    ],
)
def test_a_label_is_one_line_of_plain_characters(label, kept):
    read = read_label(written(label))
    assert isinstance(read, Written) and read.label == kept


@pytest.mark.parametrize(
    ("category", "kept"),
    [
        ("A>B >C", "A > B > C"),
        (" > A > > B > ", "A > B"),
        ("A → B", "A > B"),
        ("", ""),
        ("n/a", ""),
        (" > ".join("ABCDEFGH"), "A > B > C > D > E"),
        ("x" * 100, "x" * 60),
        ("A\n>\u202eB", "A > B"),
        ("Code > Error", "Code > Error"),
        ("“Code” > `null`", "Code > null"),
        ("unknown > none", ""),
    ],
)
def test_a_category_is_a_path_of_a_few_names(category, kept):
    read = read_label(written("cats", category))
    assert isinstance(read, Written) and read.category == kept


@given(st.text())
def test_whatever_is_answered_what_is_kept_is_printable_and_short(text):
    for answer in (text, written(text, text, text)):
        read = read_label(answer)
        if isinstance(read, Written):
            assert read.label and len(read.label) <= LONGEST_LABEL
            assert all(re.sub("(?<=\\S)[\u200c\u200d](?=\\S|$)", "", each).isprintable() for each in read)
            assert len(read.category) <= 5 * 60 + 4 * 3


@pytest.mark.parametrize(
    "text",
    [
        *(written(each * 500_000) for each in "*'` \u200cx"),
        *(written("cats", each * 500_000) for each in (">", "* ", '"')),
        *("{" * 500_000, '{"a":' * 200_000, "[" * 500_000, '{"label": ' + "9" * 500_000 + "}"),
    ],
    ids=lambda text: text[-40:][:10],
)
def test_half_a_megabyte_of_anything_is_read_at_once(text):
    began_at = time.monotonic()
    read_label(text)
    assert time.monotonic() - began_at < 0.5


def test_a_persons_label_is_held_to_the_same_characters():
    assert SetLabel(feature="sae/first#1", label=" می\u200cخواهم ").label == "می\u200cخواهم"
    for label in ("cats\u202egnp", "c\u200dats", "a\0b"):
        with pytest.raises(ValidationError, match="control characters"):
            SetLabel(feature="sae/first#1", label=label)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("क्\u200dष", "क्\u200dष"),
        ("👩🏽\u200d🚀", "👩🏽\u200d🚀"),
        ("pass\u200dword", "password"),
        ("é\u200dé \u200c", "éé"),
        ("a\u202eb\nc", "a b c"),
    ],
    ids=["Persian", "Devanagari", "emoji", "Latin", "accented Latin", "others"],
)
def test_a_joiner_stays_where_it_joins_and_nowhere_else(text, plain):
    assert plain_line(text) == plain
