"""The grammar of the demo corpus: documents whose every word comes with the concepts it lies in.

A document is a few passages: a tale in one tense, a weather report, a recipe or a stretch of Spanish. Tales hold
quotations, questions, negations, conditions, lists and asides. Each of these is a *scope* the writer enters and leaves,
and a word carries the scopes that are open when it is written.

Two things make the concepts worth knowing for a language model, which would otherwise not represent them. Verbs choose
their nouns by concept (one drives vehicles and wears clothes). And each scope has its own *taste*: a fixed preference
for some words of every word class over others, added in log space where scopes overlap. The word after `the` can then
only be predicted well by who knows all open scopes, at every word, and the cheapest form of that knowledge is one
direction a scope.

The same seed gives the same text on every platform, since `Random.random` is the only source of chance. The grammar
knows words, not tokens (see `masks`).
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from math import exp
from random import Random
from typing import NamedTuple

from mistudio_engine.demo.lexicon import ADJECTIVES, NOUNS, SPANISH, VERBS, WORDS, Noun, Verb

__all__ = ["Document", "Word", "corpus", "write_document"]

TASTE = 1.3
"""How much a scope likes one half of the words and dislikes the other, in nats."""

TASTES = {"aside": 1.7, "list": 1.7, "negation": 1.7, "question": 1.7, "condition": 1.6, "past": 1.5, "future": 1.5, "spanish": 0.0}
"""Scopes with another strength than `TASTE`: short ones need a stronger one, and Spanish has its own words."""

RANK_DECAY = 0.04
"""How fast words of a class get rarer with their place in the table, in nats a place."""

ECHO = 0.25
"""How often a noun of the document is said again where another of its class would do."""

SPEECH = frozenset({"past", "future"})
NOTHING: frozenset[str] = frozenset()

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

# What a text on a topic tells of more often than others do: verb classes, and things noticed.
TOPICS: dict[str, dict[str, float]] = {
    "cooking": {"cook": 6.0, "eat": 4.0, "food": 6.0, "thing": 3.0},
    "storm": {"weather": 8.0, "rest": 2.0, "clothing": 2.0, "wear": 2.0},
    "travel": {"motion": 2.5, "drive": 5.0, "visit": 4.0, "vehicle": 6.0, "place": 3.0},
    "plain": {},
}
TOPIC_NAMES = tuple(TOPICS)
SETTINGS = {"cooking": "in the kitchen", "storm": "in the storm", "travel": "on the road", "plain": "at home"}

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


class Word(NamedTuple):
    """A word or a punctuation mark of a document."""

    start: int
    end: int
    concepts: frozenset[str]


class Document(NamedTuple):
    """A text and its words in order; `text[word.start:word.end]` is the word."""

    text: str
    words: tuple[Word, ...]


class Subject(NamedTuple):
    """What a verb has to know of its subject."""

    person: str
    """`third` for he, she and one of anything; `base` for I, you, we and many."""

    frames: dict[str, float]


@cache
def taste(scope: str, word: str) -> float:
    """Whether a scope likes a word (1) or not (-1), which the two names alone decide."""
    return 1.0 if Random(f"{scope}/{word}").random() < 0.5 else -1.0


@cache
def cumulative(words: tuple, scopes: frozenset[str]) -> tuple[float, ...]:
    """Cumulative weights of the words where these scopes are open."""
    weights = []
    for rank, word in enumerate(words):
        name = word[0] if isinstance(word, tuple) else str(word)
        liking = sum(TASTES.get(scope, TASTE) * taste(scope, name) for scope in sorted(scopes))
        weights.append(exp(liking - RANK_DECAY * rank))
    return tuple(accumulate(weights))


class Writer:
    """Writes words one after another and notes the scopes they lie in."""

    def __init__(self, rng: Random):
        self.random = rng.random
        self.topic = TOPIC_NAMES[int(rng.random() * len(TOPIC_NAMES))]
        self.parts: list[str] = []
        self.words: list[Word] = []
        self.length = 0
        self.scopes = NOTHING if self.topic == "plain" else frozenset((self.topic,))
        self.at_start = True
        self.glued = True
        self.said: dict[str, list[Noun]] = {}
        self.brief = False
        self.hero = self.pick("word.name")
        self.hero_pronoun = "he" if self.hero in WORDS["name"][6:] else "she"

    # chance

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def choose(self, words: tuple):
        """One of the words, to the taste of the open scopes and of the topic."""
        weights = cumulative(words, self.scopes)
        return words[bisect(weights, self.random() * weights[-1], 0, len(weights) - 1)]

    def weighted(self, weights: dict[str, float]) -> str:
        """A key of the table, as often as its weight and the topic say."""
        favoured = TOPICS[self.topic]
        left = self.random() * sum(weight * favoured.get(key, 1.0) for key, weight in weights.items())
        for key, weight in weights.items():
            left -= weight * favoured.get(key, 1.0)
            if left < 0:
                break
        return key

    def pick(self, word_class: str):
        return self.choose(CLASSES[word_class])

    # writing

    @contextmanager
    def scope(self, *names: str, without: frozenset[str] = NOTHING) -> Iterator[None]:
        """Open scopes for the words written inside the block."""
        outer = self.scopes
        self.scopes = outer.difference(without).union(names)
        yield
        self.scopes = outer

    def say(self, form: str, *concepts: str) -> None:
        """Write the words of `form`, the first with a capital at the start of a sentence."""
        for piece in form.split():
            if self.at_start:
                piece = piece[0].upper() + piece[1:]
                self.at_start = False
            if not self.glued:
                self.parts.append(" ")
                self.length += 1
            self.glued = False
            self.append(piece, concepts)

    def mark(self, mark: str) -> None:
        """Write a punctuation mark onto the word before it."""
        self.append(mark, ())
        self.glued = mark == "\n"

    def open(self, mark: str) -> None:
        """Write an opening mark onto the word after it."""
        at_start, self.at_start = self.at_start, False
        self.say(mark)
        self.at_start, self.glued = at_start, True

    def append(self, piece: str, concepts: tuple[str, ...]) -> None:
        end = self.length + len(piece)
        self.words.append(Word(self.length, end, self.scopes.union(concepts)))
        self.parts.append(piece)
        self.length = end

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
        if not self.brief:
            self.say_after(concept)

    def say_after(self, concept: str) -> None:
        if self.chance(AFTER_CHANCE):
            for words in AFTER[concept]:
                self.say(self.choose(words))

    def number(self) -> None:
        self.say(self.pick("word.number"), "number")
        if self.chance(AFTER_CHANCE):
            self.say("or")
            self.say(self.pick("word.number"), "number")

    def colour(self) -> None:
        self.say(self.pick("adjective.colour"), "colour")
        if self.chance(AFTER_CHANCE):
            self.say("and")
            self.say(self.pick("adjective.colour"), "colour")

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
        """Who does it: a pronoun, the hero of the document, a person or an animal."""
        if "quotation" in self.scopes and self.chance(0.6):
            self.say(self.choose(("I", "you", "we", "they")))
            return Subject("base", PERSON_FRAMES)
        roll = self.random()
        if roll < 0.15:
            self.say(self.hero_pronoun)
            return Subject("third", PERSON_FRAMES)
        if roll < 0.3:
            self.say(self.hero if self.chance(0.6) else self.pick("word.name"))
            return Subject("third", PERSON_FRAMES)
        kind = self.weighted({"person": 5.0, "animal": 5.0, "weather": 0.6})
        many = self.noun_phrase(kind)
        if self.chance(0.12):
            self.say(self.pick("word.near"))
            self.noun_phrase("place")
        return Subject("base" if many else "third", FRAMES[kind])

    def object(self, frame: str) -> None:
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

    def helper(self, subject: Subject, tense: str, verb: str) -> str:
        """The auxiliary that a negation or a question needs."""
        if tense == "future":
            return "will"
        if verb == "be":
            forms = {"past": ("was", "were"), "present": ("is", "are")}[tense]
        else:
            forms = {"past": ("did", "did"), "present": ("does", "do")}[tense]
        return forms[subject.person == "base"]

    def verb(self, verb: Verb, subject: Subject, tense: str, bare: bool, concept: tuple[str, ...]) -> None:
        if bare:
            self.say(verb.base, *concept)
        elif tense == "past":
            self.say(verb.past, *concept)
        elif tense == "future":
            self.say("will")
            self.say(verb.base, *concept)
        else:
            self.say(getattr(verb, subject.person), *concept)

    def clause(self, tense: str, *, question: bool = False, asides: bool = True) -> None:
        """A whole clause without its end mark."""
        negated = not question and self.chance(0.22)
        if question:
            self.ask(tense)
            return
        subject = self.subject()
        if asides and self.chance(0.18):
            self.aside()
        frame = self.weighted(subject.frames)
        if negated:
            self.say(self.helper(subject, tense, "be" if frame == "feel" else "do"))
            with self.scope("negation"):
                self.say("not" if tense != "future" or self.chance(0.5) else "never")
                if frame == "feel" and tense == "future":
                    self.say("be")
                self.predicate(frame, subject, tense, bare=True)
                if self.chance(0.6):
                    self.say(self.choose(WORDS["end_of_no"]))
        else:
            if frame == "feel":
                self.say({"past": "was", "future": "will be"}.get(tense, "is") if subject.person == "third" else
                         {"past": "were", "future": "will be"}.get(tense, "are"))  # fmt: skip
            self.predicate(frame, subject, tense, bare=False)

    def ask(self, tense: str) -> None:
        """A question up to its mark."""
        if self.chance(0.4):
            self.say(self.choose(("where", "why", "when", "how")))
        # The auxiliary agrees with a subject that is still to come: decided first, then written.
        person = "base" if "quotation" in self.scopes and self.chance(0.6) else "third"
        frames = PERSON_FRAMES
        frame = self.weighted(frames)
        subject = Subject(person, frames)
        self.say(self.helper(subject, tense, "be" if frame == "feel" else "do"))
        if person == "base":
            self.say(self.choose(("you", "we", "they")))
        elif self.chance(0.4):
            self.say(self.pick("word.name"))
        else:
            self.say(self.choose(("the", "this", "that")))
            self.noun("person", many=False)
        if frame == "feel" and tense == "future":
            self.say("be")
        self.predicate(frame, subject, tense, bare=True)
        if self.chance(0.3):
            self.say("or")
            self.say(self.choose(("not", "never", "later")))

    def predicate(self, frame: str, subject: Subject, tense: str, *, bare: bool) -> None:
        """The verb and what follows it; after an auxiliary the verb is `bare`."""
        if frame == "feel":
            if self.chance(0.3):
                self.say(self.choose(("very", "so", "quite", "almost")))
            self.feeling()
        else:
            self.verb(self.pick(f"verb.{frame}"), subject, tense, bare, ("motion",) if frame == "motion" else ())
            if frame == "motion" and self.chance(0.8):
                self.say(self.pick("word.toward"))
                self.noun_phrase("place")
            elif frame in TAKES:
                self.object(frame)
        if self.chance(0.25):
            self.place()
        if self.chance(0.2):
            self.say(self.pick("word.manner"))

    def aside(self) -> None:
        """A remark in parentheses."""
        with self.scope("aside", without=SPEECH):
            self.open("(")
            self.clause("present", asides=False)
        self.mark(")")

    # sentences of a tale

    def enumeration(self, tense: str) -> None:
        """`The baker sold four things: bread, onions and rice`, without its end mark."""
        subject = self.subject()
        verb = self.pick("verb.handle" if self.chance(0.5) else "verb.notice")
        self.verb(verb, subject, tense, False, ())
        self.say(self.choose(("several things", "many things", "a few things", "all of it")))
        with self.scope("list"):
            self.mark(":")
            concept = self.weighted(dict.fromkeys(LISTED, 1.0))
            many = self.chance(0.6)
            items = {self.pick(f"noun.{concept}"): None for _ in range(5)}
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
        with self.scope("quotation", without=SPEECH):
            self.open('"')
            if self.chance(0.35):
                self.say(self.pick("word.answer"))
                self.mark(",")
            roll = self.random()
            for i in range(1 + self.chance(0.5)):
                if i:
                    self.mark(".")
                    self.at_start = True
                if roll < 0.35:
                    with self.scope("question"):
                        self.clause("present", question=True)
                    self.mark("?")
                    break
                self.clause("present", asides=False)
            else:
                self.mark(",")
        self.mark('"')
        said = self.choose(("say", "ask", "answer", "whisper"))
        self.say({"past": {"say": "said"}.get(said, said + "ed"), "future": "will " + said}.get(tense, said + "s"))
        self.say(self.choose(("the", "this", "that")))
        self.noun("person", many=False)

    def sentence(self, tense: str) -> None:
        roll = self.random()
        mark = "."
        self.at_start = True
        if roll < 0.22:
            self.quotation(tense)
        elif roll < 0.34:
            self.enumeration(tense)
        elif roll < 0.46:
            with self.scope("question"):
                self.clause(tense, question=True)
            mark = "?"
        elif roll < 0.62:
            with self.scope("condition"):
                self.say("if")
                self.clause("present" if tense == "future" else tense, asides=False)
            self.mark(",")
            self.clause(tense)
        else:
            if self.chance(0.25):
                self.say(self.pick("word.opening"))
                self.mark(",")
            self.clause(tense)
            if self.chance(0.25):
                self.say(self.choose(("and", "but", "because", "while")))
                self.clause(tense, asides=False)
        self.mark(mark)

    # passages

    def tale(self, tense: str) -> None:
        """Some sentences in one tense, the first of which names the time."""
        self.at_start = True
        self.say(SETTINGS[self.topic])
        with self.scope(*SPEECH.intersection((tense,))):
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


PASSAGES = {"past": 0.3, "present": 0.28, "future": 0.3, "spanish": 0.12}


def write_document(rng: Random) -> Document:
    """One document: two to four passages, one a line."""
    writer = Writer(rng)
    for i in range(2 + int(rng.random() * 3)):
        if i:
            writer.mark("\n")
        passage = writer.weighted(PASSAGES)
        if passage == "spanish":
            writer.spanish()
        else:
            writer.tale(passage)
    return Document("".join(writer.parts), tuple(writer.words))


def corpus(n_documents: int, seed: int) -> list[Document]:
    """The first documents of the corpus that a seed names; a longer corpus begins with the shorter one."""
    return [write_document(Random(f"corpus/{seed}/{i}")) for i in range(n_documents)]
