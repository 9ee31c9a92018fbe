"""The known concepts: what a dictionary trained on the demo model ought to find, and how a person would describe it.

A concept is a yes-or-no fact about a token in its document. *Lexical* ones are settled by the word alone, *contextual*
ones by what stands before it: the same word is inside them in one sentence and outside in the next. This file knows
names and descriptions; which word has which concept is decided by the grammar, and what a model makes of it by nobody
here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["CONCEPTS", "CONCEPT_NAMES", "Concept"]


class Concept(NamedTuple):
    """One fact that the grammar knows of every word it writes."""

    name: str
    kind: Literal["lexical", "contextual"]
    description: str
    """In plain words, so that a search by meaning can find it."""


CONCEPTS: tuple[Concept, ...] = (
    Concept("animal", "lexical", "words for animals, such as horse, wolf or sparrows"),
    Concept("clothing", "lexical", "words for clothes that people wear, such as coat, hat or boots"),
    Concept("colour", "lexical", "names of colours, such as blue, green or crimson"),
    Concept("feeling", "lexical", "words for emotions and moods, such as happy, afraid or lonely"),
    Concept("food", "lexical", "words for food and drink, such as bread, onions or soup"),
    Concept("motion", "lexical", "verbs of movement, such as run, walked or climbs"),
    Concept("number", "lexical", "numbers, such as two, seven or thirty"),
    Concept("person", "lexical", "words for people by their work or family, such as baker, doctor or uncle"),
    Concept("place", "lexical", "words for places, such as harbour, village or bridge"),
    Concept("plant", "lexical", "words for trees and flowers, such as oak, rose or willow"),
    Concept("vehicle", "lexical", "words for vehicles, such as truck, boat or train"),
    Concept("weather", "lexical", "words for weather, such as rain, fog or thunder"),
    Concept("aside", "contextual", "a remark inside parentheses, a bracketed aside"),
    Concept("condition", "contextual", "the condition of a sentence, from if up to the comma"),
    Concept("cooking", "contextual", "a text about cooking, set in a kitchen"),
    Concept("future", "contextual", "a passage told in the future tense, about what will happen"),
    Concept("list", "contextual", "inside a list of things after a colon, an enumeration"),
    Concept("negation", "contextual", "the part of a sentence under a negation, after not or never"),
    Concept("past", "contextual", "a passage told in the past tense, about what happened"),
    Concept("question", "contextual", "inside a question, before its question mark"),
    Concept("quotation", "contextual", "inside quotation marks, direct speech, what somebody says"),
    Concept("spanish", "contextual", "a passage in Spanish, a second language"),
    Concept("storm", "contextual", "a text about bad weather, set in a storm"),
    Concept("travel", "contextual", "a text about a journey, set on the road"),
)

CONCEPT_NAMES: tuple[str, ...] = tuple(concept.name for concept in CONCEPTS)
