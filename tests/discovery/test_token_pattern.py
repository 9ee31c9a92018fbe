"""Labels from token patterns say what fires, are scored on contexts they were not made from, and fail with a reason."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from discovery_data import HOOK, TEXT, drain, packed

from mistudio_engine.discovery.extraction import extract
from mistudio_engine.discovery.extraction_store import Example, FeatureStats
from mistudio_engine.discovery.labelling.labeller import Evidence, Label, LabelFailure, gather_evidence, is_held_out
from mistudio_engine.discovery.labelling.lexicon import TokenLexicon, kind_of, shown
from mistudio_engine.discovery.labelling.token_pattern import TokenPatternLabeller

NOUNS = ["cat", "dog", "horse", "house", "tree", "river", "king", "queen", "road", "stone", "bread", "apple"]
VERBS = ["sees", "takes", "likes", "finds", "running", "jumping", "singing", "walking"]
GLUE = ["the", "a", "not", "and", "then", "never", "if"]
NAMES = ["Tom", "Anna", "London", "Paris"]
RUSSIAN = ["кошка", "дом", "река"]
DIGITS = ["3", "7", "42", "1984"]
MARKS = [".", ",", "?", "!", "(", ")", "“", "”"]
TOKENS = ["<s>", *(f" {word}" for word in NOUNS + VERBS + GLUE + NAMES + RUSSIAN + DIGITS), *MARKS, "ing", "\n"]
ID = {token.strip() or token: i for i, token in enumerate(TOKENS)}


def sentence(rng):
    """A random sentence with some quoted speech, some brackets and some clauses."""
    words = [rng.choice(GLUE + NAMES)]
    words += rng.choices(NOUNS + VERBS + GLUE + NAMES + RUSSIAN + DIGITS, k=rng.randint(3, 9))
    inner = rng.choices(NOUNS + VERBS, k=rng.randint(1, 4))
    match rng.randrange(4):
        case 0:
            words += ["“", *inner, "”"]
        case 1:
            words += ["(", *inner, ")"]
        case 2:
            words += [",", *inner]
    return [*words, rng.choice(".?!")]


def evidence(fires, *, n_contexts=60, seed=0, strength=None):
    """Evidence of a feature that fires where `fires(words, i)` says so."""
    rng = random.Random(seed)
    explain, score = [], []
    n_active = 0
    for context in range(n_contexts):
        words = ["<s>"]
        while len(words) < 40:
            words += sentence(rng)
        words = words[:40]
        values = np.array(
            [0.0 if i == 0 or not fires(words, i) else 1.0 if strength is None else strength(i) for i in range(40)],
            dtype=np.float32,
        )
        n_active += int((values > 0).sum())
        peak = int(values.argmax())
        ids = np.array([ID[word] for word in words], dtype=np.int32)
        example = Example(0, "top", context, peak, float(values[peak]), None, 0, ids, values)
        (score if is_held_out(context) else explain).append(example)
    maximum = max((float(e.values.max()) for e in explain + score), default=0.0)
    stats = FeatureStats(0, n_active, n_active / (40 * n_contexts), maximum, 1.0, float(n_active))
    return Evidence(stats, explain, score)


@pytest.fixture(scope="module")
def labeller():
    return TokenPatternLabeller(TOKENS, special_ids=[0])


def since(words, i, opener, closers):
    """Whether an opener stands before i with none of the closers between."""
    for word in reversed(words[:i]):
        if word in closers:
            return False
        if word == opener:
            return True
    return False


def in_quotes(words, i):
    return sum(word in "“”" for word in words[:i]) % 2 == 1 and words[i] not in "“”"


CASES = {
    "one word": (lambda w, i: w[i] == "cat", "the word “cat”", "Token > Word"),
    "a few words": (lambda w, i: w[i] in ("cat", "dog", "horse"), "words: ", "Token > Word"),
    "numbers": (lambda w, i: w[i] in DIGITS, "numbers in digits", "Token > Number"),
    "a mark": (lambda w, i: w[i] == ",", "the punctuation mark “,”", "Token > Punctuation"),
    "all marks": (lambda w, i: w[i] in MARKS, "punctuation marks", "Token > Punctuation"),
    "capitals": (lambda w, i: w[i] in NAMES, "words with a capital letter", "Token > Capitalised"),
    "a script": (lambda w, i: w[i] in RUSSIAN, "words in Cyrillic script", "Token > Script > Cyrillic"),
    "an ending": (lambda w, i: w[i].endswith("ing"), "words that end in -ing", "Token > Ending > -ing"),
    "after a word": (lambda w, i: w[i - 1] == "not", "after “not”", "Context > After “not”"),
    "after one of two": (
        lambda w, i: w[i - 1] in ("not", "never"),
        "after “n",
        "Context > After “n",
    ),
    "soon after": (
        lambda w, i: "never" in w[max(0, i - 4) : i],
        "within 4 tokens after “never”",
        "Context > Soon after “never”",
    ),
    "the rest of a sentence": (
        lambda w, i: since(w, i, "if", ".?!"),
        "in a sentence after “if”",
        "Context > Rest of the sentence after “if”",
    ),
    "a clause": (
        lambda w, i: since(w, i, "if", MARKS),
        "after “if”, up to the next punctuation mark",
        "Context > Clause after “if”",
    ),
    "brackets": (
        lambda w, i: since(w, i, "(", [")"]),
        "between “(” and the closing bracket",
        "Context > Inside “(”",
    ),
    "quotes": (in_quotes, "inside quotation marks (quoted speech)", "Context > Inside quotation marks"),
    "a start": (lambda w, i: i == 1, "the first token of a text", "Position > Start of text"),
    "a sentence's start": (
        lambda w, i: w[i - 1] in ".?!<s>",
        "the first token of a sentence",
        "Position > Start of sentence",
    ),
    "a word in a context": (
        lambda w, i: w[i] in NOUNS and w[i - 1] == "the",
        "words: ",
        "Context > After “the”",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_known_pattern_is_found_and_said_in_words(labeller, case):
    fires, words, category = CASES[case]
    label = labeller.label(evidence(fires, n_contexts=600 if "context" in case else 60))
    assert isinstance(label, Label), label
    assert label.label.startswith(words)
    assert label.category.startswith(category)
    assert label.confidence > 0.94
    assert label.method == "token_pattern"


def test_a_list_of_words_holds_all_of_them_and_nothing_else(labeller):
    label = labeller.label(evidence(lambda w, i: w[i] in ("cat", "dog", "horse")))
    assert set(label.label.removeprefix("words: ").split(", ")) == {"cat", "dog", "horse"}


def test_a_word_within_a_context_is_not_labelled_as_the_word(labeller):
    label = labeller.label(evidence(lambda w, i: w[i] in NOUNS and in_quotes(w, i), n_contexts=200))
    assert "quotation marks" in label.label
    assert label.numbers["precision"] > 0.9


def test_the_evidence_counts_what_held_on_contexts_that_were_held_out(labeller):
    given = evidence(lambda w, i: w[i] == "cat")
    label = labeller.label(given)
    n_cats = sum(int((e.token_ids == ID["cat"]).sum()) for e in given.score)
    assert label.numbers["n_firing"] == n_cats
    assert (label.numbers["recall"], label.numbers["specificity"], label.confidence) == (1, 1, 1)
    assert label.numbers["activation_explained"] == 1
    assert f"{n_cats} of {n_cats} firing tokens" in label.evidence
    assert label.numbers["n_explain_contexts"] + label.numbers["n_score_contexts"] == 60


def test_confidence_is_not_taken_from_the_contexts_that_the_label_was_made_from(labeller):
    """A pattern that holds in the explain contexts only must not be believed."""
    cats, dogs = evidence(lambda w, i: w[i] == "cat"), evidence(lambda w, i: w[i] == "dog")
    failure = labeller.label(Evidence(cats.stats, cats.explain, dogs.score))
    assert isinstance(failure, LabelFailure)
    assert failure.reason == "no_pattern"


def test_a_feature_without_a_pattern_fails_with_its_best_try(labeller):
    rng = random.Random(1)
    failure = labeller.label(evidence(lambda w, i: rng.random() < 0.1))
    assert isinstance(failure, LabelFailure)
    assert failure.reason == "no_pattern"
    assert "balanced accuracy 0.5" in failure.detail


def test_dead_features_and_those_with_too_few_contexts_fail_with_a_reason(labeller):
    dead = labeller.label(evidence(lambda w, i: False))
    assert isinstance(dead, LabelFailure)
    assert dead.reason == "dead"
    rare = labeller.label(evidence(lambda w, i: w[i] == "cat", n_contexts=2))
    assert isinstance(rare, LabelFailure)
    assert rare.reason == "too_few_examples"


def test_weak_activations_count_neither_for_nor_against(labeller):
    def strength(i):
        return 1.0 if i % 2 else 0.01

    given = evidence(lambda w, i: i % 2 == 0 or w[i] == "cat", strength=strength)
    label = labeller.label(given)
    assert label.label == "the word “cat”"
    assert label.numbers["n_silent"] == sum(int(((e.values == 0) & (e.token_ids != 0)).sum()) for e in given.score)


def test_labels_do_not_depend_on_the_company_they_are_made_in(labeller):
    some = [evidence(fires, n_contexts=40) for fires, _, _ in list(CASES.values())[:5]]
    assert list(labeller.label_all(some)) == [labeller.label(one) for one in some]
    assert list(labeller.label_all(reversed(some))) == [labeller.label(one) for one in reversed(some)]


def test_evidence_is_drawn_one_at_a_time(labeller):
    def endless():
        while True:
            yield evidence(lambda w, i: w[i] == "cat", n_contexts=20)

    labels = labeller.label_all(endless())
    assert next(labels) == next(labels)


def test_half_of_the_contexts_are_held_out_the_same_ones_every_time():
    held_out = [is_held_out(context) for context in range(10_000)]
    assert 4_800 < sum(held_out) < 5_200
    assert held_out == [is_held_out(context) for context in range(10_000)]
    assert held_out != [is_held_out(context, seed=1) for context in range(10_000)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" cat", "word"), (" кошка", "word"), ("猫", "word"), ("नमस्ते", "word"), ("مرحبا", "word"), ("don't", "word"),
        ("é", "word"), (" 42", "number"), ("3,5", "number"), ("٣", "number"), ("½", "number"), (",", "punctuation"),
        ("。", "punctuation"), (" $", "punctuation"), ("\n\n", "space"), ("  ", "space"), ("<0xE2>", "bytes"),
        ("R2D2", "mixed"), ("a=b", "mixed"),
    ],
)  # fmt: skip
def test_every_script_has_words_and_numbers_of_its_own(text, kind):
    assert kind_of(text) == kind


def test_tokens_that_differ_in_case_and_spaces_share_a_key_and_special_ones_have_none():
    lexicon = TokenLexicon([" Cat", "cat", " cat", " dog", "<s>"], special_ids=[4])
    assert len(set(lexicon.key[:3])) == 1
    assert lexicon.key[3] != lexicon.key[0]
    assert lexicon.key[4] == lexicon.key[lexicon.pad] == -1


def test_a_piece_inside_words_is_not_the_word_of_the_same_letters():
    lexicon = TokenLexicon([" s", "s", "S", "ing", " house", "house"])
    assert len(set(lexicon.key[:4])) == 4
    assert [lexicon.shown_key(key) for key in lexicon.key[:5]] == ["s", "-s", "S", "-ing", "house"]
    assert lexicon.key[4] == lexicon.key[5]


def test_dataset_text_in_a_label_is_one_printable_line():
    assert shown("a\nb\u202ec\x00") == "a\\nb\\u202ec\\x00"
    assert shown("x" * 100) == "x" * 23 + "…"


def test_a_planted_feature_is_extracted_and_labelled_from_real_contexts(planted, tokenizer, tmp_path):
    strings = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    table = torch.zeros(len(tokenizer), 3)
    table[strings.index(" cat"), 0] = 3.0
    table[[i for i, text in enumerate(strings) if any(c.isdigit() for c in text)], 1] = 2.0
    lm, sae = planted(table)
    stream = [i for _ in range(60) for i in tokenizer(TEXT, add_special_tokens=False).input_ids]
    ids = torch.tensor(stream[: len(stream) // 16 * 16]).reshape(-1, 16)
    store, _ = drain(extract(lm, sae, packed(ids, len(tokenizer)), HOOK, tmp_path / "x"))

    evidence_of = [gather_evidence(store, feature) for feature in range(3)]
    for one in evidence_of[:2]:
        contexts = [e.context for e in one.explain] + [e.context for e in one.score]
        assert len(set(contexts)) == len(contexts) > 20
        assert {is_held_out(e.context) for e in one.explain} == {False}
        assert {is_held_out(e.context) for e in one.score} == {True}
    labeller = TokenPatternLabeller(lm.token_strings(range(lm.d_vocab)), lm.special_ids)
    cat, number, dead = labeller.label_all(evidence_of)
    assert (cat.label, cat.confidence) == ("the word “cat”", 1.0)
    assert (number.label, number.confidence) == ("numbers in digits", 1.0)
    assert dead.reason == "dead"
