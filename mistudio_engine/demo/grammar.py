"""The grammar of the demo corpus: documents whose every word comes with the concepts it lies in.

A document is a few passages on one topic: tales in one tense each, or a stretch of Spanish. Tales hold quotations,
questions, negations, conditions, lists and asides, each a scope of the writer.

Concepts must be worth knowing for a language model, which would otherwise not represent them. So verbs choose their
nouns by concept (one drives vehicles and wears clothes), words of each concept continue in their own way (vehicles are
loaded with sand, coats lined with fur), and each scope has its own taste in words. Scopes share one syntax: what a
scope does to the text is then the same at every word, and its direction in a model the same too.

The same seed gives the same text on every platform. The grammar knows words, not tokens (see `masks`).
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from mistudio_engine.demo.lexicon import ADJECTIVES, NOUNS, SPANISH, VERBS, WORDS, Noun, Verb
from mistudio_engine.demo.writer import Document, Word, Writer

__all__ = ["Document", "Word", "corpus", "write_document"]

ECHO = 0.25
"""How often a noun of the document is said again where another of its class would do."""

TENSES = frozenset({"past", "future"})
"""Tenses that are concepts; direct speech and asides leave them for the present."""

CLASSES: dict[str, tuple[object, ...]] = {
    **{f"noun.{name}": words for name, words in NOUNS.items()},
    **{f"verb.{name}": words for name, words in VERBS.items()},
    **{f"adjective.{name}": words for name, words in ADJECTIVES.items()},
    **{f"word.{name}": words for name, words in WORDS.items()},
    **{f"spanish.{name}": words for name, words in SPANISH.items()},
}

# What a verb class takes as its object.
TAKES: dict[str, tuple[str, ...]] = {
    "eat": ("food",),
    "cook": ("food",),
    "wear": ("clothing",),
    "drive": ("vehicle",),
    "tend": ("plant",),
    "visit": ("place",),
    "meet": ("person",),
    "feed": ("animal",),
    "handle": ("thing", "clothing", "food", "animal"),
    "notice": ("animal", "person", "vehicle", "plant", "thing", "weather", "place"),
}

# What a text on a topic tells of more often than another does, and what less: verb classes and concepts.
RARE = dict.fromkeys(("cook", "eat", "food", "drive", "vehicle", "weather"), 0.15)
TOPICS: dict[str, dict[str, float]] = {
    "cooking": RARE | {"cook": 14.0, "eat": 10.0, "food": 20.0, "thing": 3.0},
    "storm": RARE | {"weather": 24.0, "rest": 2.0, "clothing": 2.0, "wear": 2.0},
    "travel": RARE | {"motion": 2.0, "drive": 12.0, "visit": 4.0, "vehicle": 20.0, "place": 3.0},
    "plain": RARE,
}

# Most texts are on none of the topics: a topic is then something added to a text, and its absence nothing.
TOPIC_CHANCES = {"cooking": 0.18, "storm": 0.18, "travel": 0.18, "plain": 0.46}

# The words that open each tale and name its topic.
SETTINGS = {"cooking": "in the kitchen", "storm": "in the storm", "travel": "on the road", "plain": "at home"}

# What comes with or without somebody, and what lists are made of.
COMPANY = {"food": 1.0, "weather": 0.5, "vehicle": 1.0, "thing": 2.0, "clothing": 1.0, "plant": 1.0, "animal": 1.0}
LISTED = ("food", "animal", "clothing", "plant", "vehicle", "thing", "person")

PERSON_FRAMES = {
    "motion": 3.0, "rest": 1.0, "eat": 1.5, "cook": 1.0, "wear": 1.5, "drive": 1.5, "tend": 1.5, "visit": 1.0,
    "meet": 1.3, "feed": 1.5, "handle": 1.5, "notice": 1.5, "feel": 3.0,
}  # fmt: skip
WEATHER_FRAMES = {"motion": 3.0, "rest": 1.0, "visit": 2.0}
ANIMAL_FRAMES = {"motion": 4.0, "rest": 2.0, "eat": 2.0, "feed": 1.0, "notice": 1.5, "feel": 2.0}
FRAMES = {"person": PERSON_FRAMES, "animal": ANIMAL_FRAMES, "weather": WEATHER_FRAMES}

AFTER_CHANCE = 0.28
"""How often what a word of a concept calls for follows it."""

# What calls for what: each concept continues in its own way, or a model would have no reason to tell them apart.
AFTER: dict[str, tuple[tuple[str, ...], ...]] = {
    "animal": (("with a", "with one"), ("long", "short", "bushy", "curly"), ("tail", "ear", "paw", "nose")),
    "clothing": (("made of", "lined with"), ("wool", "silk", "linen", "leather", "cotton", "fur")),
    "feeling": (("about",), ("nothing", "everything", "money", "work", "life", "love")),
    "food": (("for",), ("breakfast", "lunch", "supper", "dinner", "guests")),
    "person": (("named", "called"), WORDS["name"]),
    "place": (("on the",), WORDS["side"], ("side", "shore", "road")),
    "plant": (("in",), ("full", "early", "late"), ("bloom", "leaf", "fruit")),
    "thing": (("of",), ("iron", "brass", "stone", "glass", "oak wood")),
    "vehicle": (("full of", "loaded with"), ("sand", "coal", "timber", "gravel", "hay")),
    "weather": (("all", "half the"), ("day", "night", "afternoon")),
}


class Subject(NamedTuple):
    """What a verb has to know of its subject."""

    person: str
    """`first` for I, `third` for he, she and one of anything, `base` for you, we, they and many."""

    frames: dict[str, float]
    """Which verb classes it can be the subject of, and how often."""


BE = {
    "past": {"first": "was", "third": "was", "base": "were"},
    "present": {"first": "am", "third": "is", "base": "are"},
    "future": {"first": "will be", "third": "will be", "base": "will be"},
}
SAYS = (("says", "said"), ("answers", "answered"), ("whispers", "whispered"), ("adds", "added"))
SENTENCES = {"quotation": 0.22, "enumeration": 0.12, "question": 0.12, "condition": 0.16, "statement": 0.38}
PASSAGES = {"past": 0.3, "present": 0.28, "future": 0.3, "spanish": 0.12}
ASIDE_CHANCE = 0.18
NOT_CHANCE = 0.22


class Author(Writer):
    """Writes tales and Spanish on one topic."""

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self.topic = self.weighted(TOPIC_CHANCES)
        self.favoured = TOPICS[self.topic]
        if self.topic != "plain":
            self.scopes = frozenset((self.topic,))
        self.said: dict[str, list[Noun]] = {}
        self.hero = self.pick("word.name")
        self.hero_pronoun = "he" if self.hero in WORDS["name"][6:] else "she"

    def pick(self, word_class: str):
        return self.choose(CLASSES[word_class])

    # phrases

    def noun(self, concept: str, many: bool) -> None:
        """A noun of the concept, at times one that the document has named before."""
        said = self.said.setdefault(concept, [])
        if said and self.chance(ECHO):
            noun = said[int(self.random() * len(said))]
        else:
            noun = self.pick(f"noun.{concept}")
            said.append(noun)
        self.say_noun(noun, concept, many)

    def say_noun(self, noun: Noun, concept: str, many: bool) -> None:
        self.say(noun.many if many else noun.one, *([concept] if concept != "thing" else []))
        self.say_after(concept)

    def say_after(self, concept: str) -> None:
        """At times what a word of the concept calls for."""
        if self.chance(AFTER_CHANCE):
            for words in AFTER[concept]:
                self.say(self.choose(words))

    def number(self) -> None:
        self.one_or_two("word.number", "or", "number")

    def colour(self) -> None:
        self.one_or_two("adjective.colour", "and", "colour")

    def one_or_two(self, word_class: str, join: str, concept: str) -> None:
        """`three` or `three or four`."""
        first, second = self.pick(word_class), self.pick(word_class)
        self.say(first, concept)
        if second != first and self.chance(AFTER_CHANCE):
            self.say(join)
            self.say(second, concept)

    def feeling(self) -> None:
        self.say(self.pick("adjective.feeling"), "feeling")
        self.say_after("feeling")

    def adjective(self, concept: str) -> None:
        if self.chance(0.4):
            self.colour()
        else:
            self.say(self.pick("adjective.sky" if concept == "weather" else "adjective.quality"))

    def noun_phrase(self, concept: str) -> bool:
        """Determiner, adjectives, noun; returns whether it is plural."""
        many = self.chance(0.3) and concept not in ("place", "weather")
        if "quotation" in self.scopes and self.chance(0.45):
            self.say(self.choose(("my", "your", "our")))
        elif many and self.chance(0.45):
            self.number()
        elif many:
            self.say(self.choose(("the", "some", "many", "these")))
        else:
            self.say("the" if self.chance(0.6) else self.choose(("this", "that", "every", "another")))
        if self.chance(0.35):
            self.adjective(concept)
        self.noun(concept, many)
        return many

    def subject(self) -> Subject:
        """Who does it: a pronoun, the hero of the document, somebody or something."""
        if "quotation" in self.scopes and self.chance(0.6):
            pronoun = self.choose(("I", "you", "we", "they"))
            self.say(pronoun)
            return Subject("first" if pronoun == "I" else "base", PERSON_FRAMES)
        roll = self.random()
        if roll < 0.15:
            self.say(self.hero_pronoun)
            return Subject("third", PERSON_FRAMES)
        if roll < 0.3:
            self.say(self.hero if self.chance(0.6) else self.pick("word.name"))
            return Subject("third", PERSON_FRAMES)
        kind = self.weighted({"person": 5.0, "animal": 5.0, "weather": 1.0})
        many = self.noun_phrase(kind)
        if self.chance(0.12):
            self.place()
        return Subject("base" if many else "third", FRAMES[kind])

    def object(self, frame: str) -> None:
        """What the verb is done to."""
        concept = self.weighted(dict.fromkeys(TAKES[frame], 1.0))
        if "negation" in self.scopes and self.chance(0.6):
            self.say("any")
            if self.chance(0.3):
                self.adjective(concept)
            self.noun(concept, concept != "weather")
        else:
            self.noun_phrase(concept)

    def place(self) -> None:
        self.say(self.pick("word.near"))
        self.noun_phrase("place")

    # clauses

    def verb(self, verb_class: str, subject: Subject, tense: str, *, bare: bool = False) -> None:
        """A verb of the class; after an auxiliary it is `bare`."""
        verb: Verb = self.pick(f"verb.{verb_class}")
        concepts = ("motion",) if verb_class == "motion" else ()
        if tense == "future" and not bare:
            self.say("will")
        if bare or tense == "future" or (tense == "present" and subject.person != "third"):
            self.say(verb.base, *concepts)
        else:
            self.say(verb.past if tense == "past" else verb.third, *concepts)

    def auxiliary(self, subject: Subject, tense: str, frame: str) -> None:
        """What a negation or a question puts before the verb."""
        if tense == "future":
            self.say("will")
        elif frame == "feel":
            self.say(BE[tense][subject.person])
        elif tense == "past":
            self.say("did")
        else:
            self.say("does" if subject.person == "third" else "do")

    def clause(self, tense: str, *, asides: bool = True) -> None:
        """A whole statement without its end mark."""
        subject = self.subject()
        if asides and self.chance(ASIDE_CHANCE):
            self.aside()
        frame = self.weighted(subject.frames)
        if self.chance(NOT_CHANCE):
            self.auxiliary(subject, tense, frame)
            with self.scope("negation"):
                self.say("not" if tense != "future" or self.chance(0.5) else "never")
                self.rest_after_auxiliary(frame, subject, tense)
                if self.chance(0.6):
                    self.say(self.choose(WORDS["end_of_no"]))
        elif frame == "feel":
            self.say(BE[tense][subject.person])
            self.feel()
            self.circumstances()
        else:
            self.verb(frame, subject, tense)
            self.complement(frame)
            self.circumstances()

    def ask(self, tense: str) -> None:
        """A question up to its mark."""
        if self.chance(0.4):
            self.say(self.choose(("where", "why", "when", "how")))
        # The auxiliary agrees with a subject that is still to come, so that is decided before either is written.
        spoken = "quotation" in self.scopes and self.chance(0.6)
        subject = Subject("base" if spoken else "third", PERSON_FRAMES)
        frame = self.weighted(subject.frames)
        self.auxiliary(subject, tense, frame)
        if spoken:
            self.say(self.choose(("you", "we", "they")))
        elif self.chance(0.4):
            self.say(self.pick("word.name"))
        else:
            self.say(self.choose(("the", "this", "that")))
            self.noun("person", many=False)
        self.rest_after_auxiliary(frame, subject, tense)
        if self.chance(0.3):
            self.say("or")
            self.say(self.choose(("not", "never", "later")))

    def rest_after_auxiliary(self, frame: str, subject: Subject, tense: str) -> None:
        if frame == "feel":
            if tense == "future":
                self.say("be")
            self.feel()
        else:
            self.verb(frame, subject, tense, bare=True)
            self.complement(frame)
        self.circumstances()

    def feel(self) -> None:
        if self.chance(0.3):
            self.say(self.choose(("very", "so", "quite", "almost")))
        self.feeling()

    def complement(self, frame: str) -> None:
        """What the verb asks for: a way to go, or an object."""
        if frame == "motion" and self.chance(0.8):
            self.say(self.pick("word.toward"))
            self.noun_phrase("place")
        elif frame in TAKES:
            self.object(frame)

    def circumstances(self) -> None:
        """With whom or what, where and how."""
        if self.chance(0.25):
            self.say(self.choose(("with", "without", "despite")))
            self.noun_phrase(self.weighted(COMPANY))
        if self.chance(0.25):
            self.place()
        if self.chance(0.2):
            self.say(self.pick("word.manner"))

    def aside(self) -> None:
        """A remark in parentheses."""
        with self.scope("aside", without=TENSES):
            self.open("(")
            self.clause("present", asides=False)
        self.mark(")")

    # sentences

    def enumeration(self, tense: str) -> None:
        """`The baker sold several things: bread, onions and rice`, without its end mark."""
        subject = self.subject()
        self.verb("handle" if self.chance(0.5) else "notice", subject, tense)
        self.say(self.choose(("several things", "many things", "a few things", "all of it")))
        with self.scope("list"):
            self.mark(":")
            concept = self.weighted(dict.fromkeys(LISTED, 1.0))
            many = self.chance(0.6)
            items = dict.fromkeys(self.pick(f"noun.{concept}") for _ in range(5))
            for i, noun in enumerate(items):
                if i and i == len(items) - 1:
                    self.say("and")
                elif i:
                    self.mark(",")
                if self.chance(0.3):
                    self.adjective(concept)
                self.say_noun(noun, concept, many)

    def quotation(self, tense: str) -> None:
        """Direct speech and who says it, without the end mark."""
        with self.scope("quotation", without=TENSES):
            self.open('"')
            if self.chance(0.35):
                self.say(self.pick("word.answer"))
                self.mark(",")
            if self.chance(0.3):
                with self.scope("question"):
                    self.ask("present")
                self.mark("?")
            else:
                self.clause("present", asides=False)
                if self.chance(0.5):
                    self.mark(".")
                    self.at_start = True
                    self.clause("present", asides=False)
                self.mark(",")
        self.mark('"')
        says, said = self.choose(SAYS)
        self.say(said if tense == "past" else says)
        self.say(self.choose(("the", "this", "that")))
        self.noun("person", many=False)

    def sentence(self, tense: str) -> None:
        kind = self.weighted(SENTENCES)
        self.at_start = True
        if kind == "quotation":
            self.quotation(tense)
        elif kind == "enumeration":
            self.enumeration(tense)
        elif kind == "question":
            with self.scope("question"):
                self.ask(tense)
        else:
            if kind == "condition":
                with self.scope("condition"):
                    self.say("if")
                    self.clause("present" if tense == "future" else tense, asides=False)
                self.mark(",")
            elif self.chance(0.25):
                self.say(self.pick("word.opening"))
                self.mark(",")
            self.clause(tense)
            if kind == "statement" and self.chance(0.25):
                self.say(self.choose(("and", "but", "because", "while")))
                self.clause(tense, asides=False)
        self.mark("?" if kind == "question" else ".")

    # passages

    def tale(self, tense: str) -> None:
        """Some sentences in one tense, the first of which names the time."""
        self.at_start = True
        self.say(SETTINGS[self.topic])
        with self.scope(*TENSES.intersection((tense,))):
            if self.chance(0.35):
                self.say({"past": "yesterday", "present": "today", "future": "tomorrow"}[tense])
            else:
                self.say({"past": "last", "present": "every", "future": "next"}[tense])
                self.say(self.pick("word.season"))
            self.clause(tense)
            self.mark(".")
            for _ in range(2 + int(self.random() * 4)):
                self.sentence(tense)

    def spanish(self) -> None:
        """Some sentences in Spanish, on no topic."""
        with self.scope("spanish", without=frozenset(TOPICS)):
            for _ in range(3 + int(self.random() * 3)):
                self.at_start = True
                if self.chance(0.2):
                    self.say(self.pick("spanish.manner"))
                self.spanish_clause()
                if self.chance(0.3):
                    self.say(self.pick("spanish.join"))
                    self.spanish_clause()
                self.mark(".")

    def spanish_clause(self) -> None:
        if self.chance(0.3):
            self.say(self.hero if self.chance(0.6) else self.pick("word.name"))
        else:
            self.spanish_noun()
        if self.chance(0.2):
            self.say("no")
        if self.chance(0.3):
            self.say(self.pick("spanish.rest"))
        else:
            self.say(self.pick("spanish.present"))
            if self.chance(0.25):
                self.say(self.pick("spanish.number"))
                noun = self.pick("spanish.el" if self.chance(0.5) else "spanish.la")
                self.say(noun + ("s" if noun[-1] in "aeiou" else "es"))
            else:
                self.spanish_noun()
        if self.chance(0.5):
            self.say(self.pick("spanish.where"))
            self.spanish_noun()

    def spanish_noun(self) -> None:
        gender = "el" if self.chance(0.5) else "la"
        self.say(gender if self.chance(0.75) else {"el": "un", "la": "una"}[gender])
        self.say(self.pick(f"spanish.{gender}"))
        if self.chance(0.3):
            self.say(self.pick("spanish.adjective"))


def write_document(rng: Random) -> Document:
    """One document: two to four passages, one a line."""
    author = Author(rng)
    for i in range(2 + int(rng.random() * 3)):
        if i:
            author.mark("\n")
        passage = author.weighted(PASSAGES)
        if passage == "spanish":
            author.spanish()
        else:
            author.tale(passage)
    return author.document()


def corpus(n_documents: int, seed: int) -> list[Document]:
    """The first documents of the corpus that a seed names; a longer corpus begins with the shorter one."""
    return [write_document(Random(f"corpus/{seed}/{i}")) for i in range(n_documents)]
