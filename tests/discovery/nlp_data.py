"""A spaCy pipeline trained on a few dozen sentences, and contexts for it, for the tests of analyses."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from mistudio_engine.discovery.extraction_store import Example

NOUNS = {"cat": "cats", "dog": "dogs", "horse": "horses", "house": "houses", "tree": "trees", "river": "rivers"}
VERBS = {"see": "sees", "like": "likes", "find": "finds", "paint": "paints"}
PEOPLE = ("Anna", "Tom", "Clara", "Peter")
PLACES = ("Paris", "London", "Berlin", "Madrid")
TAGS = {"noun": "NOUN", "verb": "VERB", "name": "PROPN", "the": "DET", "in": "ADP", ".": "PUNCT"}


def sentence(rng: random.Random) -> list[tuple[str, str, str, str, str]]:
    """(word, part of speech, lemma, entity, morphology) of each word of: Anna sees the cats in Paris."""
    person, place = rng.choice(PEOPLE), rng.choice(PLACES)
    noun, plural = rng.choice([*NOUNS.items()])
    verb, form = rng.choice([*VERBS.items()])
    many = rng.random() < 0.5
    number = "Number=Plur" if many else "Number=Sing"
    return [
        (person, "PROPN", person, "PERSON", ""),
        (form, "VERB", verb, "", ""),
        ("the", "DET", "the", "", ""),
        (plural if many else noun, "NOUN", noun, "", number),
        ("in", "ADP", "in", "", ""),
        (place, "PROPN", place, "GPE", ""),
        (".", "PUNCT", ".", "", ""),
    ]


def as_text(words: list[tuple[str, str, str, str, str]]) -> str:
    return " ".join(word for word, *_ in words).replace(" .", ".")


def trained_pipeline(folder: Path) -> Path:
    """Train a pipeline that tags, finds lemmas and names, and save it; the folder it lies in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spaCy's training warns of things of its own
        import spacy
        from spacy.tokens import Doc, Span
        from spacy.training import Example as Lesson
        from spacy.util import fix_random_seed, minibatch

        fix_random_seed(0)
        rng = random.Random(0)
        nlp = spacy.blank("en")
        nlp.add_pipe("morphologizer")
        nlp.add_pipe("ner")
        lessons = []
        for _ in range(60):
            words = sentence(rng)
            spaces = [following[0] != "." for following in words[1:]] + [False]
            doc = Doc(
                nlp.vocab,
                words=[word for word, *_ in words],
                spaces=spaces,
                pos=[pos for _, pos, *_ in words],
                morphs=[morph for *_, morph in words],
            )
            doc.set_ents([Span(doc, i, i + 1, each[3]) for i, each in enumerate(words) if each[3]])
            lessons.append(Lesson(nlp.make_doc(doc.text), doc))
        optimizer = nlp.initialize(lambda: lessons)
        for _ in range(8):
            rng.shuffle(lessons)
            for some in minibatch(lessons, size=16):
                nlp.update(some, sgd=optimizer)
        ruler: Any = nlp.add_pipe("attribute_ruler")
        for lemma, form in [*NOUNS.items(), *VERBS.items()]:
            ruler.add(patterns=[[{"LOWER": form}], [{"LOWER": lemma}]], attrs={"LEMMA": lemma})
        nlp.meta["name"], nlp.meta["version"] = "tiny", "1.0.0"
        nlp.to_disk(folder)
    return folder


def example(
    ids: list[int], position: int, value: float, *, context: int, group: Any = "top", feature: int = 7
) -> Example:
    """A whole context in which a feature fires at one position."""
    values = np.zeros(len(ids), dtype=np.float32)
    if group != "zero":
        values[position] = value
    return Example(
        feature=feature,
        group=group,
        context=context,
        position=position,
        value=float(values[position]),
        quantile=None,
        start=0,
        token_ids=np.array(ids, dtype=np.int32),
        values=values,
    )
