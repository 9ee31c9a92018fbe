"""An analysis says what a feature's words have in common, how sure that is, and what nothing can be said of."""

from __future__ import annotations

import math
import random

import nlp_data
import numpy as np
import pytest
from nlp_data import example
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mistudio_engine.api.errors import BadInput, CorruptFile, EmptyData, NotFound
from mistudio_engine.discovery.analysis import Analyst
from mistudio_engine.discovery.labelling.labeller import is_held_out
from mistudio_engine.discovery.nlp import Pipeline, load_pipeline
from mistudio_engine.discovery.shapes import SHAPES, shape_of
from mistudio_engine.discovery.words import WordReader

MULTILINGUAL = "你好世界。我们今天去北京。مرحبا بالعالم، كيف حالك؟ नमस्ते दुनिया, आप कैसे हैं? Привет мир 😀 café "


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, small enough to cut most words to pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(1)
    texts = [nlp_data.as_text(nlp_data.sentence(rng)) for _ in range(50)]
    backend.train_from_iterator([*texts, MULTILINGUAL], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return load_pipeline(str(nlp_data.trained_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")))


@pytest.fixture(scope="module")
def blank():
    return load_pipeline("blank:xx")


def encoded(tokenizer, text):
    return [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def tokenized(tokenizer, text):
    return WordReader(tokenizer).strings(encoded(tokenizer, text)[1:])


def firing_at(tokenizer, text, character, value, *, context, group="top"):
    """An example whose prime token holds the character at this place of the text."""
    ids = encoded(tokenizer, text)
    offsets = WordReader(tokenizer).read(ids).offsets
    position = next(i for i in range(1, len(ids)) if offsets[i, 0] <= character < offsets[i, 1])
    return example(ids, position, value, context=context, group=group)


def sentences(seed, n=4):
    rng = random.Random(seed)
    words = [nlp_data.sentence(rng) for _ in range(n)]
    return words, " ".join(nlp_data.as_text(some) for some in words)


def on_nouns(tokenizer, n=30):
    """A feature that fires on the last piece of a noun, with random strength, and silent contexts."""
    rng = random.Random(5)
    examples, truth = [], []
    for context in range(n):
        words, text = sentences(context)
        noun = words[1][3]
        first = len(nlp_data.as_text(words[0])) + 1
        end = text.index(f" {noun[0]} in", first) + len(noun[0])
        value = rng.uniform(1, 9)
        examples.append(firing_at(tokenizer, text, end, value, context=context))
        truth.append((noun, value))
    examples += [
        example(encoded(tokenizer, sentences(1000 + i)[1]), 3, 0.0, context=1000 + i, group="zero") for i in range(6)
    ]
    return examples, truth


def named(rows, name):
    return next(row for row in rows if row.name == name)


def test_a_trained_pipeline_gives_part_of_speech_lemma_entity_and_number(tokenizer, trained):
    examples, truth = on_nouns(tokenizer)
    found = Analyst(tokenizer, trained).analyse(7, examples)
    assert found.pipeline == "en_tiny 1.0.0"
    assert found.missing == ["vectors"]
    noun = named(found.part_of_speech, "NOUN")
    assert (noun.n, noun.share) == (30, 1.0)
    assert noun.base == pytest.approx(1 / 7, abs=0.02)
    assert noun.lift == pytest.approx(7, rel=0.15)
    total = math.fsum(value for _, value in truth)
    for lemma in {noun[2] for noun, _ in truth}:
        weights = [value for noun, value in truth if noun[2] == lemma]
        row = named(found.lemmas, lemma)
        assert (row.n, row.share) == (len(weights), pytest.approx(math.fsum(weights) / total))
    assert found.entities == []
    plural = math.fsum(value for noun, value in truth if noun[4] == "Number=Plur")
    assert named(found.morphology, "Number=Plur").share == pytest.approx(plural / total)
    group = next(group for group in found.groups if group.by == "lemma")
    assert set(group.members) == {group.name, nlp_data.NOUNS[group.name]}


def test_entities_are_found_where_names_fire(tokenizer, trained):
    examples = []
    for context in range(12):
        words, text = sentences(context)
        place = words[0][5][0]
        examples.append(firing_at(tokenizer, text, text.index(place) + 1, 1.0, context=context))
    silent = encoded(tokenizer, "the cats. the dog. the trees see. " * 12)
    found = Analyst(tokenizer, trained).analyse(7, [*examples, example(silent, 2, 0.0, context=99, group="zero")])
    assert [(row.name, row.n, row.share, row.base) for row in found.entities] == [("GPE", 12, 1.0, 0.0)]
    assert named(found.entities, "GPE").lift == found.n_silent_words + 1
    assert found.groups[0].by in ("entity", "shape")
    assert {"GPE", "capitalised"} <= {group.name for group in found.groups}


def test_the_words_are_whole_and_each_number_equals_a_count_by_hand(tokenizer, blank):
    examples, truth = on_nouns(tokenizer)
    found = Analyst(tokenizer, blank).analyse(7, examples)
    assert any(len(word.pieces) > 1 for word in found.words)
    total = math.fsum(value for _, value in truth)
    silent = [sentences(1000 + i)[1].replace(".", " .").casefold().split() for i in range(6)]
    strings = [string for i in range(6) for string in tokenized(tokenizer, sentences(1000 + i)[1])]
    n_silent = sum(map(len, silent)) + sum(string.isspace() for string in strings)
    assert found.n_silent_words == n_silent
    for word in {noun[0] for noun, _ in truth}:
        weights = [value for noun, value in truth if noun[0] == word]
        base = sum(some.count(word) for some in silent) / n_silent
        row = named(found.words, word)
        share = math.fsum(weights) / total
        assert (row.n, row.share, row.base) == (len(weights), pytest.approx(share), pytest.approx(base))
        assert row.lift == pytest.approx(share / ((base * n_silent + 1) / (n_silent + 1)))
        assert "".join(row.pieces).strip() == word
    tokens = WordReader(tokenizer).strings([int(each.token_ids[each.position]) for each in examples if each.value])
    assert {row.name: row.n for row in found.tokens} == {token: tokens.count(token) for token in tokens}


def test_a_blank_pipeline_says_what_it_cannot_say_and_what_to_install(tokenizer, blank):
    found = Analyst(tokenizer, blank).analyse(7, on_nouns(tokenizer)[0])
    assert found.pipeline == "blank:xx"
    assert found.missing == ["part_of_speech", "lemmas", "entities", "morphology", "vectors"]
    assert (found.part_of_speech, found.lemmas, found.entities, found.morphology) == (None,) * 4
    assert "install" in found.advice
    assert "blank:xx says nothing of part_of_speech" in found.summary


def test_what_stands_before_and_after_is_told_from_what_stands_everywhere(tokenizer, blank):
    rng = random.Random(3)
    words = ["red", "green", "cat", "dog", "sees", "the", "a", "house", "river", "tree"]
    examples = []
    for context in range(25):
        fill = lambda n: " ".join(rng.choices(words, k=n))  # noqa: E731
        text = f"{fill(12)} is not at {fill(1)} {fill(10)}"
        examples.append(firing_at(tokenizer, text, text.index(" not at ") + 8, 2.0, context=context))
    for context in range(100, 106):
        text = " ".join(rng.choices([*words, "at"], k=40))
        examples.append(example(encoded(tokenizer, text), 5, 0.0, context=context, group="zero"))
    found = Analyst(tokenizer, blank).analyse(7, examples)
    assert (found.patterns[0].where, found.patterns[0].name) == ("before", "is not at")
    assert (found.patterns[0].n, found.patterns[0].share) == (25, 1.0)
    assert found.patterns[0].lift > 100
    said = {(row.where, row.name) for row in found.patterns}
    assert not {("before", "at"), ("before", "not at"), ("near before", "not")} & said
    assert not {("after", word) for word in words} & said
    n_explaining = sum(not is_held_out(context) for context in range(25))
    assert f"Before it: “is not at” 100% (n={n_explaining}" in found.summary


@pytest.mark.parametrize(
    ("text", "at", "position"),
    [
        ("one. Two three. Four five.", "Four", "sentence_start"),
        ("one two. “Three four” five", "Three", "in_quotes"),
        ('one "two three" four', "three", "in_quotes"),
        ("one two\nthree four", "three", "after_newline"),
        ("one two three", "one", "context_start"),
        ("我们去。你好。他去。", "他", "sentence_start"),
        ("आप कैसे हैं। नमस्ते दुनिया।", "नमस्ते", "sentence_start"),
    ],
)
def test_positions_are_recognised(tokenizer, blank, text, at, position):
    examples = [firing_at(tokenizer, text, text.index(at), 1.0, context=i) for i in range(2)]
    found = Analyst(tokenizer, blank).analyse(7, examples)
    assert named(found.positions, position).share == 1.0


@pytest.mark.parametrize(
    ("text", "at", "position"),
    [
        ("one two three", "two", "in_quotes"),
        ('one "two" three', "three", "in_quotes"),
        ('"one two\nthree', "three", "in_quotes"),
        ("one. Two three", "three", "sentence_start"),
        ("one two three", "one", "sentence_start"),
        ("one two three", "two", "context_start"),
    ],
)
def test_positions_are_not_seen_where_they_are_not(tokenizer, blank, text, at, position):
    found = Analyst(tokenizer, blank).analyse(7, [firing_at(tokenizer, text, text.index(at), 1.0, context=0)])
    assert position not in {row.name for row in found.positions}


def test_a_document_begins_after_a_special_token(tokenizer, blank):
    ids = [*encoded(tokenizer, "one two"), *encoded(tokenizer, "the cat")]
    at = len(encoded(tokenizer, "one two")) + 1
    found = Analyst(tokenizer, blank).analyse(7, [example(ids, at, 1.0, context=0)])
    assert {row.name for row in found.positions} == {"document_start", "sentence_start"}
    assert [row.name for row in found.words] == ["the"]


@pytest.mark.parametrize(
    ("word", "script", "shape"),
    [
        ("世", "Cjk", "letters"),
        ("بالعالم", "Arabic", "letters"),
        ("नमस्ते", "Devanagari", "letters"),
        ("Привет", "Cyrillic", "capitalised"),
        ("😀", None, "emoji"),
        ("café", "Latin", "lower"),
    ],
)
def test_words_of_every_script_are_words(tokenizer, blank, word, script, shape):
    """Each fires in the middle of its bytes."""
    examples = [firing_at(tokenizer, MULTILINGUAL, MULTILINGUAL.index(word), 1.0, context=i) for i in range(3)]
    silent = example(encoded(tokenizer, "the cats see. 3 trees, and 4 dogs."), 2, 0.0, context=9, group="zero")
    found = Analyst(tokenizer, blank).analyse(7, [*examples, silent])
    assert [(row.name, row.share) for row in found.words] == [(word, 1.0)]
    assert [row.name for row in found.shapes] == [shape]
    assert [row.name for row in found.scripts] == ([script] if script else [])
    assert f"“{word}”" in found.summary


def test_words_with_like_vectors_are_one_group(tokenizer):
    import spacy

    nlp = spacy.blank("en")
    rng = np.random.default_rng(0)
    for kind in (["cat", "dog", "horse"], ["tree", "river", "house"]):
        centre = rng.normal(size=16)
        for word in kind:
            nlp.vocab.set_vector(word, centre + 0.1 * rng.normal(size=16))
    texts = {"cat": 5.0, "dog": 4.0, "horse": 3.0, "tree": 2.0, "river": 1.0}
    examples = [
        firing_at(tokenizer, f"see the {word} .", 9, value, context=10 * i + again)
        for i, (word, value) in enumerate(texts.items())
        for again in range(3)
    ]
    silent = example(encoded(tokenizer, "see the house and the paint. " * 5), 2, 0.0, context=99, group="zero")
    found = Analyst(tokenizer, Pipeline(nlp, "en_vectors")).analyse(7, [*examples, silent])
    groups = [group for group in found.groups if group.by == "vectors"]
    assert [group.members for group in groups] == [["cat", "dog", "horse"], ["tree", "river"]]
    assert [group.share for group in groups] == [pytest.approx(12 / 15), pytest.approx(3 / 15)]
    assert "vectors" not in found.missing


def test_without_silent_contexts_the_words_beside_those_that_fire_are_the_base(tokenizer, blank):
    examples = [each for each in on_nouns(tokenizer)[0] if each.group != "zero"][:12]
    found = Analyst(tokenizer, blank).analyse(7, examples)
    assert (found.n_silent_contexts, found.n_silent_words) == (0, found.n_silent_beside)
    texts = [sentences(context)[1] for context in range(12)]
    n_words = sum(len(text.replace(".", " .").split()) for text in texts)
    n_spaces = sum(string.isspace() for text in texts for string in tokenized(tokenizer, text))
    assert found.n_silent_words == n_words + n_spaces - 12
    words = " ".join(texts).replace(".", " .").split()
    for row in found.words:
        assert row.base == pytest.approx((words.count(row.name) - row.n) / found.n_silent_words)


def test_where_nothing_is_silent_there_is_no_base_and_no_lift(tokenizer, blank):
    ids = encoded(tokenizer, "cat")
    found = Analyst(tokenizer, blank).analyse(7, [example(ids, len(ids) - 1, 1.0, context=0)])
    assert found.n_silent_words == 0
    assert {(row.base, row.lift) for row in [*found.words, *found.shapes, *found.tokens]} == {(None, None)}


def test_the_summary_says_nothing_of_contexts_that_labels_are_scored_on(tokenizer, blank):
    held_out = [context for context in range(40) if is_held_out(context)]
    explaining = [context for context in range(40) if not is_held_out(context)]
    examples = [firing_at(tokenizer, "see the cat", 9, 5.0, context=context) for context in held_out]
    examples += [firing_at(tokenizer, "see the dog", 9, 1.0, context=context) for context in explaining]
    found = Analyst(tokenizer, blank).analyse(7, examples)
    assert [word.name for word in found.words] == ["cat", "dog"]
    assert "dog" in found.summary and "cat" not in found.summary
    assert Analyst(tokenizer, blank).analyse(7, examples[: len(held_out)]).summary == ""


def test_an_example_in_two_groups_counts_once_and_no_kind_gives_more_than_asked(tokenizer, blank):
    examples, _ = on_nouns(tokenizer)
    again = [
        example(each.token_ids.tolist(), each.position, each.value, context=each.context, group="random")
        for each in examples[:9]
    ]
    assert Analyst(tokenizer, blank).analyse(7, [*examples, *again]).n_examples == 30
    assert Analyst(tokenizer, blank, n_examples=5).analyse(7, [*examples, *again]).n_examples == 5


def test_a_feature_that_fires_nowhere_has_no_analysis(tokenizer, blank):
    silent = example(encoded(tokenizer, "the cat"), 2, 0.0, context=9, group="zero")
    with pytest.raises(EmptyData, match="Feature 7 fires on nothing"):
        Analyst(tokenizer, blank).analyse(7, [silent])


def test_text_of_the_dataset_stands_on_one_line_and_is_printable_in_the_summary(tokenizer, blank):
    text = "ok \x1b[31m\u202e evil\u2028line"
    found = Analyst(tokenizer, blank).analyse(7, [firing_at(tokenizer, text, 3, 1.0, context=i) for i in range(2)])
    assert all(c.isprintable() or c == "\n" for c in found.summary)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        *[("3.14", "number"), ("1,000", "number"), ("٣", "number"), ("1984", "year"), ("2024-11-05", "date")],
        *[("10:30", "time"), ("https://a.b/c", "url"), ("me@b.org", "email"), ("snake_case", "identifier")],
        *[("camelCase", "identifier"), ("NASA", "upper"), ("Anna", "capitalised"), ("cat", "lower"), ("你", "letters")],
        *[("...", "punctuation"), ("+", "symbol"), ("👩‍👩‍👧", "emoji"), ("\n", "space"), ("\ufffd\ufffd", "broken")],
        *[("B2B", "mixed"), ("don’t", "lower"), ("I", "capitalised"), ("नमस्ते", "letters"), ("。", "punctuation")],
    ],
)
def test_a_word_is_told_by_its_looks(text, shape):
    assert shape_of(text) == shape
    assert shape in SHAPES


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("en_core_web_none", NotFound, "not installed"),
        ("blank:klingon", NotFound, "no language 'klingon'"),
        ("./nowhere", NotFound, "config.cfg is missing"),
    ],
)
def test_a_pipeline_that_is_not_there_is_a_typed_error(name, error, match):
    with pytest.raises(error, match=match):
        load_pipeline(name)


def test_a_torn_pipeline_is_a_typed_error(tmp_path):
    (tmp_path / "config.cfg").write_text('[nlp]\nlang = "en"\npipeline = ["nothing"]\n')
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises((CorruptFile, BadInput)):
        load_pipeline(f"{tmp_path}/")
