"""What judging labels takes, prepared in small steps: the labels in short, the vocabulary, a pool of held-out texts.

Which of these are like each other, and which features are like each other, is found out here as well. It does not know
who judges.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.api.errors import EmptyData
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.scores import ScoreLabels
from mistudio_engine.api.records import ExtractionRecord, LabelRecord, TokensRecord
from mistudio_engine.discovery.extraction_store import ExtractionStore, load_extraction
from mistudio_engine.discovery.labelling.cases import CaseMaker, Labelled
from mistudio_engine.discovery.labelling.lexicon import TokenLexicon
from mistudio_engine.discovery.labelling.negatives import Pool, RareWords, decoder_neighbours, firing, pool_contexts
from mistudio_engine.discovery.labelling.passages import Passage
from mistudio_engine.discovery.labelling.token_pattern import TokenPatternLabeller
from mistudio_engine.handlers.knowledge import DATA_FOLDER, Knowledge
from mistudio_engine.handlers.resources import fitting_model, language_model, open_tokens, sparse_autoencoder
from mistudio_engine.handlers.score_book import PREPARED, ScoreBook
from mistudio_engine.models.vocabulary import special_ids
from mistudio_engine.runtime.engine import Engine

__all__ = ["RULE", "Desk", "Wanted", "labels_in_turn", "open_desk", "read_labels"]

RULE = TokenPatternLabeller.id

TOKENS_A_STEP = 1024
"""Tokens run through the model between two looks at the signal."""

FEATURES_A_STEP = 256
"""Features whose decoder neighbours are looked for in one step."""

N_NEIGHBOURS = 32

EMBEDDED_AT_ONCE, SIMILAR_AMONG, COMPARED_WITH = 16, 1024, 3
"""Texts to a step; texts without the feature that are compared; texts with the feature that they are compared with."""

LABELS_A_STEP, STRINGS_A_STEP = 1024, 16_384
"""Labels that are read in one step, and tokens of the vocabulary that are turned into text."""

BEGINS_AT = {
    "reading labels": 0.0,
    "running held-out text": 0.1,
    "looking for like features": 0.6,
    "comparing texts": 0.7,
}
"""Stages of getting ready, and which share of it is done when they begin."""


class Wanted:
    """The labels that a call asks for and that its judge can judge."""

    def __init__(self, operation: ScoreLabels) -> None:
        self._features = None if operation.features is None else frozenset(operation.features)
        self._by_rule = operation.provider == RULE

    def __contains__(self, label: LabelRecord) -> bool:
        is_asked = self._features is None or label.index in self._features
        return is_asked and (label.method == RULE or not self._by_rule)


def labels_in_turn(engine: Engine, known: Knowledge) -> Iterator[LabelRecord]:
    """The labels that count of the features that the extraction covers, one at a time.

    With their scores those of a large dictionary would fill a gigabyte.
    """
    for index in known.extraction.indices.tolist():
        if (label := engine.store.label(known.sae.slug, index)) is not None:
            yield label


Likeness = Callable[[int, Sequence[Passage]], NDArray[np.float32]]


class Desk(NamedTuple):
    """What judging takes, once it is prepared."""

    wanted: Sequence[int]
    """Features whose labels are to be scored yet."""

    maker: CaseMaker
    lexicon: TokenLexicon
    shown_strings: list[str]
    """Text of each id; "" for ids that stand for no text."""

    similar_by: str | None
    """What found similar texts."""


def _ready(stage: str, share: float) -> Progress:
    """How far getting ready is, at this share of a stage."""
    begins = [*BEGINS_AT.values(), 1.0]
    begin, end = begins[list(BEGINS_AT).index(stage) :][:2]
    return Progress(stage=stage, fraction=PREPARED * (begin + (end - begin) * min(share, 1.0)))


def open_desk(
    operation: ScoreLabels, engine: Engine, known: Knowledge, labels: Mapping[int, Labelled], wanted: Sequence[int]
) -> Generator[Progress, Signal, Desk]:
    """What it takes to judge some labels; all of them serve as baselines."""
    special, unseen = known.uncounted_ids, special_ids(known.tokenizer)
    strings = yield from _strings(known)
    shown_strings = ["" if token_id in unseen else string for token_id, string in enumerate(strings)]
    yield _ready("reading labels", 1.0)
    lexicon = TokenLexicon(strings, special)
    pool = yield from _pool(operation, engine, known)
    neighbours: Mapping[int, Sequence[int]] = {}
    if "decoder" in operation.negatives and "detection" in operation.methods:
        neighbours = yield from _neighbours(engine, known, wanted)
    likeness, similar_by = None, None
    if "similar" in operation.negatives and "detection" in operation.methods:
        likeness, similar_by = yield from _likeness(operation, engine, pool, lexicon, shown_strings)
    maker = CaseMaker(
        known.extraction,
        labels,
        pool,
        lexicon,
        methods=operation.methods,
        n=operation.n,
        kinds=operation.negatives,
        special_ids=special,
        neighbours=neighbours,
        likeness=likeness,
        by_rule=operation.provider == RULE,
        seed=operation.seed,
    )
    return Desk(wanted, maker, lexicon, shown_strings, similar_by)


def read_labels(
    operation: ScoreLabels, engine: Engine, known: Knowledge, book: ScoreBook
) -> Generator[Progress, Signal, tuple[dict[int, Labelled], list[int]]]:
    """All labels, in short, and the features whose ones are to be scored yet; the book takes note of both."""
    found: dict[int, Labelled] = {}
    wanted: list[int] = []
    asked, sources = Wanted(operation), _Sources(engine, known)
    for n, label in enumerate(labels_in_turn(engine, known)):
        if n % LABELS_A_STEP == 0:
            yield _ready("reading labels", n / len(known.extraction))
        found[label.index] = Labelled(label.label, label.version, label.method == RULE, sources.of(label))
        if label in asked and not book.recall(label):
            wanted.append(label.index)
    book.n_wanted = len(wanted)
    return found, wanted


class _Sources:
    """The extractions that labels were made from, each opened once."""

    def __init__(self, engine: Engine, known: Knowledge) -> None:
        self._engine, self._current = engine, known.record.slug
        self._opened: dict[str, ExtractionStore | None] = {}

    def of(self, label: LabelRecord) -> ExtractionStore | None:
        """None where it is the one that items are from, was none, or has been deleted."""
        slug = label.extraction
        if slug is None or slug == self._current:
            return None
        if slug not in self._opened:
            there = self._engine.store.exists(ExtractionRecord, slug)
            record = self._engine.store.get(ExtractionRecord, slug) if there else None
            self._opened[slug] = (
                load_extraction(self._engine.home / record.folder / DATA_FOLDER)
                if record is not None and record.sae == label.sae
                else None
            )
        return self._opened[slug]


def _strings(known: Knowledge) -> Generator[Progress, Signal, list[str]]:
    """The text of each id of the vocabulary."""
    strings: list[str] = []
    n_ids = 1 + max(known.tokenizer.get_vocab().values())
    for at in range(0, n_ids, STRINGS_A_STEP):
        strings += known.strings(range(at, min(at + STRINGS_A_STEP, n_ids)))
        yield _ready("reading labels", 1.0)
    return strings


def _pool(operation: ScoreLabels, engine: Engine, known: Knowledge) -> Generator[Progress, Signal, Pool]:
    """Held-out text run through the model and the SAE, in small steps on the compute thread."""
    tokens = open_tokens(engine, engine.store.get(TokensRecord, known.record.tokens))
    model = fitting_model(engine, known.sae)
    size = tokens.info.context_size
    window = min(operation.window, size)
    # Fuzzing has no use for texts without the feature.
    n_contexts = max(1, operation.n_tokens // size) if "detection" in operation.methods else 1
    contexts = pool_contexts(len(tokens), n_contexts, operation.seed)
    if not len(contexts):
        raise EmptyData(
            f"None of the {len(tokens)} contexts of tokens/{known.record.tokens} is held out.",
            fix="Extract from more text.",
        )

    def look(some: NDArray[np.int64]) -> Any:
        with language_model(engine, model.slug) as lm, sparse_autoencoder(engine, known.sae.slug) as sae:
            return firing(lm, sae, known.record.hook_name, tokens, some, window)

    parts = []
    step = max(1, TOKENS_A_STEP // size)
    for at in range(0, len(contexts), step):
        parts.append(engine.compute.run(partial(look, contexts[at : at + step])))
        yield _ready("running held-out text", (at + step) / len(contexts))
    return Pool(tokens, contexts, window, parts)


def _neighbours(
    engine: Engine, known: Knowledge, wanted: Sequence[int]
) -> Generator[Progress, Signal, Mapping[int, Sequence[int]]]:
    def look(some: Sequence[int]) -> NDArray[np.int32]:
        with sparse_autoencoder(engine, known.sae.slug) as sae:
            return decoder_neighbours(sae.W_dec, some, N_NEIGHBOURS).astype(np.int32)

    found: dict[int, NDArray[np.int32]] = {}
    for at in range(0, len(wanted), FEATURES_A_STEP):
        some = wanted[at : at + FEATURES_A_STEP]
        found |= zip(some, engine.compute.run(partial(look, some)), strict=True)
        yield _ready("looking for like features", (at + len(some)) / len(wanted))
    return found  # type: ignore[return-value]  # rows of numbers


def _likeness(
    operation: ScoreLabels, engine: Engine, pool: Pool, lexicon: TokenLexicon, strings: list[str]
) -> Generator[Progress, Signal, tuple[Likeness, str]]:
    """How like texts are, by the embedder or by the rare words that they share; and by which."""
    some = np.random.default_rng([operation.seed, 3]).permutation(len(pool))[:SIMILAR_AMONG]
    place = np.full(len(pool), -1)
    place[some] = np.arange(len(some))
    ids = pool.token_ids(some)
    embedder = engine.embedder  # another one may be set meanwhile
    if embedder is None:
        words = RareWords(ids, lexicon.key[: lexicon.pad])
        vectors, vectors_of = words.vectors(ids), words.vectors
        similar_by = "shared rare words"
    else:
        similar_by = embedder.id

        def vectors_of(passages: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
            texts = ["".join(strings[token_id] for token_id in each.tolist()) for each in passages]
            return np.asarray(embedder.embed(texts), dtype=np.float32)

        parts = []
        for at in range(0, len(ids), EMBEDDED_AT_ONCE):
            parts.append(vectors_of(ids[at : at + EMBEDDED_AT_ONCE]))
            yield _ready("comparing texts", at / len(ids))
        vectors = np.concatenate(parts)

    def likeness(index: int, shown: Sequence[Passage]) -> NDArray[np.float32]:
        firing_in = place[pool.with_feature(index)]
        known = firing_in[firing_in >= 0][:COMPARED_WITH]
        # To embed others takes most of the time there is, and only rare features have too few of these.
        to = vectors[known] if len(known) else vectors_of([each.token_ids for each in shown[:COMPARED_WITH]])
        found = np.full(len(pool), np.nan, dtype=np.float32)
        found[some] = (vectors @ to.T).max(axis=1)
        return found

    return likeness, similar_by
