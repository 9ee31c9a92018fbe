"""A spaCy pipeline, and what it says of the words of a context.

Where no trained pipeline was asked for, a blank one of no particular language cuts sentences and says nothing of parts
of speech, lemmas or entities; what is lacking is named, with what to install. A pipeline is a package made for spaCy or
a folder that spaCy wrote. It knows no features and no tokens: only words and where they stand in a text.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.api.errors import BadInput, CorruptFile, NotFound
from mistudio_engine.discovery.words import ContextWords

__all__ = [
    "DEFAULT_PIPELINE",
    "Pipeline",
    "WordFacts",
    "check_pipeline",
    "installed_pipelines",
    "is_folder",
    "load_pipeline",
]

DEFAULT_PIPELINE = "blank:xx"
"""spaCy's rules for no language in particular."""

_PROBE = "She saw two cats in Paris."
_FIELDS = {"part_of_speech": "TAG", "lemmas": "LEMMA", "entities": "ENT_IOB", "morphology": "MORPH"}
"""What an analysis shows, and the annotation of spaCy's that it is from."""

_FULL_STOPS = frozenset("。！？｡")
"""They end sentences and nothing else."""


class WordFacts(NamedTuple):
    """What is said of one word; None where the pipeline says nothing."""

    part_of_speech: str | None
    lemma: str | None
    entity: str | None
    """"" outside of entities."""

    morphology: tuple[str, ...] | None
    """Such as ("Number=Plur",)."""

    sentence_start: bool
    """Nothing but signs stands before it in its sentence."""


class Pipeline:
    """A loaded pipeline. Any thread may use it; one at a time does.

    Attributes:
        name: package and version, or `blank:xx`.
        missing: what it has nothing for.
        advice: what to install for that.
    """

    def __init__(self, nlp: Any, name: str) -> None:
        if not {"parser", "senter", "sentencizer"} & set(nlp.pipe_names):
            nlp.add_pipe("sentencizer", first=True)
        self._nlp, self._lock = nlp, threading.Lock()
        self.name = name
        probe = nlp(_PROBE)
        has = {field for field, attribute in _FIELDS.items() if probe.has_annotation(attribute)}
        if probe.has_annotation("POS"):
            has.add("part_of_speech")
        if any("lemmatizer" in name for name in nlp.pipe_names):  # a rule may have none for the words of the probe
            has.add("lemmas")
        if nlp.vocab.vectors_length:
            has.add("vectors")
        self.missing = [field for field in (*_FIELDS, "vectors") if field not in has]
        self.advice = ""
        if "part_of_speech" in self.missing:
            found = installed_pipelines()
            self.advice = (
                f"For parts of speech, lemmas and entities give pipeline={found[0]!r}, which is installed."
                if found
                else "For parts of speech, lemmas and entities install a spaCy pipeline "
                "(python -m spacy download en_core_web_sm) and name it."
            )

    def read(self, words: ContextWords) -> list[WordFacts]:
        """The facts of each word of a context, in order; special tokens part texts that have nothing to do with
        each other, and have no facts."""
        facts = [_NOTHING] * len(words.words)
        with self._lock, self._nlp.memory_zone():
            for number, (first, last) in enumerate(_texts(words)):
                # Nobody knows whether a sentence begins where the context does.
                self._read_text(words, first, last, facts, begins=number > 0)
        return facts

    def vectors(self, texts: list[str]) -> NDArray[np.float32] | None:
        """(n, d) word vectors of length 1, zero for words without one; None where the pipeline has none."""
        vocab = self._nlp.vocab
        if not vocab.vectors_length:
            return None
        rows = np.stack([np.asarray(vocab.get_vector(text), np.float32) for text in texts])
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)

    def _read_text(self, words: ContextWords, first: int, last: int, facts: list[WordFacts], *, begins: bool) -> None:
        at = words.words[first].begin
        end = words.words[last - 1]
        doc = self._nlp(words.text[at : end.begin + len(end.text)])
        starts = np.array([token.idx for token in doc]) + at
        ends = starts + np.array([len(token) for token in doc])
        sentence = np.cumsum([bool(token.is_sent_start) for token in doc])
        current, fresh = None, False
        for i in range(first, last):
            word = words.words[i]
            if not word.text.strip():
                continue
            token_at = _overlapping(starts, ends, word.begin, word.begin + len(word.text))
            if sentence[token_at] != current:
                fresh = begins or current is not None
                current = sentence[token_at]
            facts[i] = self._facts(doc[token_at], fresh)
            if any(c.isalnum() for c in word.text):
                fresh = False
            elif word.text[-1] in _FULL_STOPS:  # without a space after it the blank pipeline sees one long word
                fresh = True

    def _facts(self, token: Any, sentence_start: bool) -> WordFacts:
        def said(field: str, value: Any) -> Any:
            return None if field in self.missing else value

        return WordFacts(
            part_of_speech=said("part_of_speech", token.pos_ or token.tag_),
            lemma=said("lemmas", token.lemma_ or token.lower_),
            entity=said("entities", token.ent_type_),
            morphology=said("morphology", tuple(str(token.morph).split("|")) if str(token.morph) else ()),
            sentence_start=sentence_start,
        )


_NOTHING = WordFacts(None, None, None, None, False)


def _texts(words: ContextWords) -> Iterator[tuple[int, int]]:
    """First and one past the last word of each stretch between special tokens, white space at its ends left out."""
    first = None
    last = 0
    for i, word in enumerate(words.words):
        if word.special:
            if first is not None:
                yield first, last
            first = None
        elif word.text.strip():
            first, last = (i if first is None else first), i + 1
    if first is not None:
        yield first, last


def _overlapping(begins: NDArray, ends: NDArray, begin: int, end: int) -> int:
    """The token that shares most characters with [begin, end); the earliest of equals."""
    low = int(np.searchsorted(ends, begin, side="right"))
    high = max(low + 1, int(np.searchsorted(begins, end, side="left")))
    shared = np.minimum(ends[low:high], end) - np.maximum(begins[low:high], begin)
    return low + int(shared.argmax())


def installed_pipelines() -> list[str]:
    """Names of the pipeline packages that are installed here."""
    import spacy.util

    return sorted(spacy.util.get_installed_models())


def is_folder(name: str) -> bool:
    """Whether a pipeline's name is a path, not a package's name or a blank pipeline's."""
    return not name.startswith("blank:") and not name.replace("_", "").replace("-", "").isalnum()


def check_pipeline(name: str) -> None:
    """Refuse a name that stands for no pipeline here.

    Raises:
        NotFound: there is no such package, folder or language.
    """
    if name.startswith("blank:"):
        language = name.removeprefix("blank:")
        if not language.isidentifier() or find_spec(f"spacy.lang.{language}") is None:
            raise NotFound(f"spaCy has no language {language!r}.", fix=_LANGUAGES)
    elif is_folder(name):
        if not (Path(name) / "config.cfg").is_file():
            raise NotFound(f"There is no spaCy pipeline in {name!r}.", why="config.cfg is missing.", fix=_SAVE)
    elif name not in installed_pipelines():
        found = ", ".join(installed_pipelines()) or "none"
        raise NotFound(
            f"The spaCy pipeline {name!r} is not installed.",
            why=f"Installed are: {found}.",
            fix=f"Install it (python -m spacy download {name}), or leave pipeline out.",
        )


@lru_cache(maxsize=2)
def load_pipeline(name: str = DEFAULT_PIPELINE) -> Pipeline:
    """A pipeline: `blank:xx` (or another language's code), an installed package, or a folder that spaCy wrote.

    Raises:
        NotFound: there is no such package, folder or language.
        CorruptFile: the folder cannot be read.
        BadInput: the pipeline needs a package that is not installed.
    """
    check_pipeline(name)
    import spacy  # takes seconds

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a pipeline of another minor version of spaCy
            if name.startswith("blank:"):
                return Pipeline(spacy.blank(name.removeprefix("blank:")), name)
            nlp = spacy.load(name)
    except ImportError as error:
        raise BadInput(f"The pipeline {name!r} needs a package that is not installed: {error}.") from error
    except Exception as error:  # spaCy and what it reads with raise a dozen kinds for a torn file
        raise CorruptFile(f"The spaCy pipeline {name!r} cannot be read: {error}.", fix=_SAVE) from error
    return Pipeline(nlp, f"{nlp.meta['lang']}_{nlp.meta['name']} {nlp.meta['version']}")


_LANGUAGES = 'Use a code such as "blank:en", or "blank:xx" for any language.'
_SAVE = "Write it with nlp.to_disk(folder)."
