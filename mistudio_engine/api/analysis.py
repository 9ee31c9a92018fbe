"""What a feature's words have in common, and where features lie on a map, as both travel. It knows no library."""

from __future__ import annotations

from typing import Any, Literal

from mistudio_engine.api.records import Data

__all__ = [
    "AnalysisReport",
    "ContextPattern",
    "FeatureAnalysis",
    "FeatureMap",
    "MapReport",
    "SemanticGroup",
    "Share",
    "WordShare",
]


class Share(Data):
    """How much of a feature is of one kind, against text on which it is silent."""

    name: str
    n: int
    """Examples of this kind."""

    share: float
    """Share of the activation of all examples that is on them, 0 to 1."""

    base: float | None = None
    """Share of the words on which the feature is silent that are of this kind; None where there are none."""

    lift: float | None = None
    """share / base, with one more silent word of this kind, so that it is finite; 1 is no more than anywhere."""


class WordShare(Share):
    """A word under the prime tokens; words that differ only in case are one."""

    pieces: list[str] = []
    """The tokens that it is made of, as first seen."""


class SemanticGroup(Share):
    """Words that belong together."""

    by: Literal["lemma", "entity", "vectors", "morphology", "ending", "script", "shape"]
    members: list[str] = []
    """Its words, strongest first."""


class ContextPattern(Share):
    """Words that stand around the prime word; `name` has them in their order."""

    where: Literal["before", "after", "near before", "near after"]
    """before and after: right beside it; near: within eight words."""


class FeatureAnalysis(Data):
    """What the words that a feature fires on have in common. Words come from a dataset: they are data."""

    sae: str = ""
    index: int
    extraction: str = ""
    pipeline: str
    """spaCy pipeline, such as en_core_web_sm 3.8.0, or blank:xx where none was asked for."""

    missing: list[str] = []
    """What the pipeline has nothing for: part_of_speech, lemmas, entities, morphology, vectors."""

    advice: str = ""
    """What to install for it."""

    n_examples: int
    """Places at which it fires that were looked at: top, quantile and random examples, each once."""

    n_contexts: int
    n_silent_contexts: int
    n_silent_words: int
    """Words on which it is silent, signs and white space of its own among them; the bases are shares of them."""

    n_silent_beside: int = 0
    """How many of them stand in contexts in which it fires elsewhere: taken where silent contexts are too few."""

    tokens: list[Share]
    """Prime tokens as the tokenizer cut them; their bases are shares of the silent words' tokens."""

    words: list[WordShare]
    """The words in which the prime tokens lie."""

    part_of_speech: list[Share] | None = None
    """None where the pipeline has no tagger; so are the next three without theirs."""

    lemmas: list[Share] | None = None
    entities: list[Share] | None = None
    """Labels of named entities; examples that are in none make up what is missing to 1."""

    morphology: list[Share] | None = None
    shapes: list[Share]
    """number, date, url, identifier, punctuation, capitalised, …"""

    scripts: list[Share]
    groups: list[SemanticGroup]
    patterns: list[ContextPattern]
    """What stands before and after it, more often than elsewhere."""

    positions: list[Share]
    """context_start, document_start, sentence_start, after_newline, in_quotes."""

    summary: str
    """The most telling of it in a few lines, for prompts: only of contexts that labels are made from, not of those that
    they are scored on; empty where it fires in none of them."""

    stored: bool = False
    """It is kept with the extraction; else it was computed for this answer."""


class AnalysisReport(Data):
    """What a job of analyses did."""

    sae: str
    extraction: str
    pipeline: str
    missing: list[str] = []
    advice: str = ""
    n_analysed: int
    n_dead: int = 0
    """Features that were asked for and never fire."""


class MapReport(Data):
    """A map that was made."""

    sae: str
    extraction: str
    what: str
    method: str
    n_features: int
    n_left_out: int = 0
    """Features without a label, where labels are mapped."""

    settings: dict[str, Any] = {}


class FeatureMap(Data):
    """Features on a plane, in columns of one length."""

    sae: str
    extraction: str
    what: str
    """decoder: near features write in like directions; labels: near features have labels of like meaning."""

    method: str
    settings: dict[str, Any] = {}
    """What it was made with, the seed and the embedder among it."""

    explained_variance: list[float] | None = None
    """Share of the variance along x and along y; of PCA only."""

    index: list[int]
    x: list[float]
    y: list[float]
    label: list[str | None]
    category: list[str | None]
    frequency: list[float]
    """Share of tokens on which each fires."""

    total: int
    """Features on the map that fit the filters."""

    shown: int
    next_cursor: str | None = None
    hidden: dict[str, int] = {}
    """How many the filters left out, and why."""
