"""The corpus: reproducible, annotated word by word, and contextual where it says so."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio_engine.demo.concepts import CONCEPT_NAMES, CONCEPTS
from mistudio_engine.demo.embedded import HELD_OUT_SEED, SAE_SEED, TRAIN_SEED
from mistudio_engine.demo.grammar import Document, corpus, write_document
from mistudio_engine.demo.lexicon import NOUNS, VERBS, conjugate, plural

CONTEXTUAL = [concept.name for concept in CONCEPTS if concept.kind == "contextual"]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return corpus(400, HELD_OUT_SEED)


def forms(documents: list[Document]) -> list[tuple[str, frozenset[str]]]:
    """Word forms in lower case, each with its concepts."""
    return [(doc.text[word.start : word.end].lower(), word.concepts) for doc in documents for word in doc.words]


def test_a_seed_names_one_corpus_and_a_longer_one_begins_with_the_shorter() -> None:
    assert corpus(12, 7)[:5] == corpus(5, 7)


def test_training_dictionaries_and_scoring_use_different_texts() -> None:
    seeds = [TRAIN_SEED, SAE_SEED, HELD_OUT_SEED]
    texts = [{document.text for document in corpus(50, seed)} for seed in seeds]
    assert len(set(seeds)) == 3
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_words_cover_a_document_in_order_and_leave_out_only_spaces(seed: int) -> None:
    document = write_document(Random(seed))
    end = 0
    for word in document.words:
        assert word.start >= end and not document.text[end : word.start].strip(" ")
        assert word.end > word.start and not document.text[word.start : word.end].strip("\n").count(" ")
        assert word.concepts <= set(CONCEPT_NAMES)
        end = word.end
    assert end == len(document.text)


def test_names_are_sorted_within_each_kind_and_described_once() -> None:
    kinds = [concept.kind for concept in CONCEPTS]
    assert kinds == ["lexical"] * kinds.count("lexical") + ["contextual"] * kinds.count("contextual")
    assert len({concept.description for concept in CONCEPTS}) == len(set(CONCEPT_NAMES)) == len(CONCEPTS)


def test_every_concept_is_common_enough_to_be_learnt(documents: list[Document]) -> None:
    words = forms(documents)
    for name in CONCEPT_NAMES:
        assert sum(name in concepts for _, concepts in words) / len(words) > 0.004, name


def test_the_vocabulary_is_that_of_a_language_and_not_of_a_toy(documents: list[Document]) -> None:
    assert 1000 < len({form for form, _ in forms(corpus(1500, 3))}) < 1500


def test_lexical_concepts_are_settled_by_the_word(documents: list[Document]) -> None:
    words = [(form, concepts) for form, concepts in forms(documents) if "spanish" not in concepts]
    said = Counter(form for form, _ in words)
    for name in set(CONCEPT_NAMES) - set(CONTEXTUAL):
        inside = Counter(form for form, concepts in words if name in concepts)
        agreed = sum(max(count, said[form] - count) for form, count in inside.items())
        assert agreed / sum(said[form] for form in inside) > 0.9, name


@pytest.mark.parametrize("name", [name for name in CONTEXTUAL if name != "spanish"])
def test_a_contextual_concept_holds_words_that_are_as_common_outside(name: str, documents: list[Document]) -> None:
    words = forms(documents)
    said = Counter(form for form, _ in words)
    inside = Counter(form for form, concepts in words if name in concepts)
    shared = sum(count for form, count in inside.items() if 0.02 < count / said[form] < 0.9)
    assert shared / sum(inside.values()) > 0.6


def test_spanish_shares_some_words_with_english(documents: list[Document]) -> None:
    words = forms(documents)
    english = {form for form, concepts in words if "spanish" not in concepts}
    spanish = Counter(form for form, concepts in words if "spanish" in concepts)
    assert {"hotel", "once", "pan", "red", "piano"} <= english & set(spanish)
    shared = sum(count for form, count in spanish.items() if form in english)
    assert 0.15 < shared / sum(spanish.values()) < 0.6


def test_at_least_a_third_of_the_concepts_are_contextual() -> None:
    assert len(CONTEXTUAL) >= len(CONCEPTS) / 3


def test_a_scope_ends_where_its_mark_says() -> None:
    for document in corpus(60, 5):
        for word in document.words:
            form = document.text[word.start : word.end]
            if form == "(":
                assert "aside" in word.concepts
            elif form == ")":
                assert "aside" not in word.concepts
            elif form == "?":
                assert "question" not in word.concepts


@pytest.mark.parametrize(
    ("base", "third", "past"),
    [
        ("carry", "carries", "carried"),
        ("stir", "stirs", "stirred"),
        ("go", "goes", "went"),
        ("watch", "watches", "watched"),
    ],
)
def test_verbs_are_spelled_right(base: str, third: str, past: str) -> None:
    assert conjugate(base) == (base, third, past)


def test_plurals_are_spelled_right() -> None:
    assert [plural(word) for word in ("box", "daisy", "key", "wolf", "church")] == [
        "boxes", "daisies", "keys", "wolves", "churches",
    ]  # fmt: skip


def test_no_noun_belongs_to_two_concepts() -> None:
    counts = Counter(noun.one for words in NOUNS.values() for noun in words)
    assert not [noun for noun, count in counts.items() if count > 1]
    assert len({verb.base for words in VERBS.values() for verb in words}) == sum(map(len, VERBS.values()))
