"""Handlers of api/operations/scores.py: labels are scored on held-out text, by their rules or by a language model."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.scores import ScoreLabels
from mistudio_engine.api.records import LabelRecord, Plan, TokensRecord
from mistudio_engine.api.scores import Distribution, MethodScore, ScoringReport
from mistudio_engine.discovery.labelling.budget import Budget, Prices
from mistudio_engine.discovery.labelling.cases import CaseMaker, Labelled, Unscorable
from mistudio_engine.discovery.labelling.chat_judge import ChatJudge, prompt_tokens
from mistudio_engine.discovery.labelling.lexicon import TokenLexicon
from mistudio_engine.discovery.labelling.negatives import Pool, RareWords, decoder_neighbours, firing, pool_contexts
from mistudio_engine.discovery.labelling.passages import Passage
from mistudio_engine.discovery.labelling.rule_judge import RuleJudge
from mistudio_engine.discovery.labelling.scoring import OTHER_LABEL, TOP_TOKEN, Case, Judged, method_score
from mistudio_engine.discovery.labelling.token_pattern import TokenPatternLabeller
from mistudio_engine.handlers.chats import budget_for, connection, open_chat, require_person_for_address
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.registry import Planned, plans, runs
from mistudio_engine.handlers.resources import fitting_model, language_model, open_tokens, sparse_autoencoder
from mistudio_engine.handlers.search_index import update_rows
from mistudio_engine.models.vocabulary import special_ids
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext

RULE = TokenPatternLabeller.id

TOKENS_A_STEP = 1024
"""Tokens run through the model between two looks at the signal."""

FEATURES_A_STEP = 256
"""Features whose decoder neighbours are looked for in one step."""

N_NEIGHBOURS = 32

EMBEDDED_AT_ONCE, SIMILAR_AMONG, COMPARED_WITH = 16, 1024, 3
"""Texts to a step; texts without the feature that are compared; texts with the feature that they are compared with."""

INDEXED_AT_ONCE, INDEX_SECONDS = 64, 5.0
"""Scores to one update of the search index, and how long one waits for it at most."""

PREPARED = 0.2
"""Share of the progress that getting ready takes."""

SAMPLES_SHOWN = 8

TOKENS_PER_VERDICT = 4

LLM_ONLY = (
    "model",
    "base_url",
    "n_parallel",
    "n_shown",
    "max_usd",
    "price_per_million_input",
    "price_per_million_output",
)
"""Arguments that only a language model has a use for."""


@plans(ScoreLabels)
def plan_score_labels(operation: ScoreLabels, engine: Engine) -> Planned:
    require_person_for_address(operation.base_url)
    with Knowledge.of(engine, operation.sae) as known:
        _ = known.record  # which says what to do where nothing was extracted
        fitting_model(engine, known.sae)
        engine.store.get(TokensRecord, known.record.tokens)
        _check(operation, known)
        wanted = _wanted(operation, known)
        if operation.provider == RULE:
            plan = _plan_by_rule(operation, known, wanted)
        else:
            plan = _plan_llm(operation, engine, known, wanted)
        return Planned(plan, subject=known.sae.ref)


def _wanted(operation: ScoreLabels, known: Knowledge) -> list[int]:
    """The features whose labels can be scored, of those that are asked for."""
    covered = set(known.extraction.indices.tolist())
    asked = known.labels if operation.features is None else dict.fromkeys(operation.features)
    return [index for index in asked if index in covered and _can(operation, known.labels.get(index))]


def _can(operation: ScoreLabels, label: LabelRecord | None) -> bool:
    return label is not None and (operation.provider != RULE or label.method == RULE)


def _check(operation: ScoreLabels, known: Knowledge) -> None:
    """Refuse what cannot be scored.

    Raises:
        NotFound: a feature that was asked for is not there, or none is labelled.
        BadInput: it has no label, or one that only a language model can judge.
    """
    for index in operation.features or []:
        known.check_index(index)
        known.extraction.feature(index)  # which says that the extraction was of other features
        if index not in known.labels:
            raise BadInput(
                f"Feature {index} of {known.sae.ref} has no label to score.",
                fix="Label it first: label_features, or set_label.",
                next_call=("label_features", {"sae": known.sae.slug, "features": [index]}),
            )
        if not _can(operation, known.labels[index]):
            raise _needs_a_reader(f"The label of feature {index} is in words", known.labels[index])
    if not known.labels:
        raise NotFound(
            f"No feature of {known.sae.ref} is labelled.",
            fix="Label them first.",
            next_call=("label_features", {"sae": known.sae.slug}),
        )
    if not any(_can(operation, label) for label in known.labels.values()):
        raise _needs_a_reader(f"None of the {len(known.labels)} labels is a token pattern", None)


def _needs_a_reader(what: str, label: LabelRecord | None) -> BadInput:
    author = f" (“{label.label}”, by {label.author})" if label is not None else ""
    return BadInput(
        f"{what}{author}.",
        why="Without a language model only token patterns can be scored: they are rules.",
        fix="Give provider and model: ollama, openai or compatible.",
    )


def _plan_by_rule(operation: ScoreLabels, known: Knowledge, wanted: list[int]) -> Plan:
    fields = type(operation).model_fields
    if idle := sorted(name for name in LLM_ONLY if getattr(operation, name) != fields[name].default):
        raise BadInput(
            f"{', '.join(idle)} would do nothing: token_pattern asks no language model.",
            fix="Leave it out, or give provider: openai, ollama or compatible.",
        )
    n_left_out = len(known.labels) - len(wanted) if operation.features is None else 0
    rest = f"; {n_left_out:,} labels in other words need a language model" if n_left_out else ""
    return Plan(
        summary=f"Score {len(wanted):,} labels of {known.sae.ref} by their own rules{rest}.",
        details={"n_features": len(wanted), "n_left_out": n_left_out, "n_requests": 0, "usd": 0.0},
    )


def _plan_llm(operation: ScoreLabels, engine: Engine, known: Knowledge, wanted: list[int]) -> Plan:
    to = connection(operation, engine, operation.provider)
    budget_for(to, operation.max_usd)
    n_items = 2 * operation.n
    n_claims = 3  # the label, another feature's, the top token
    n_each, n_prompt = 0, 0.0
    for method in operation.methods:
        n_rounds = 1 if method == "detection" else 2
        n_asked = n_rounds * math.ceil(n_items / n_rounds / operation.n_shown)
        n_each += n_claims * n_asked
        n_prompt += n_claims * (n_asked * prompt_tokens(method) + n_items * (operation.window + 8))
    n_requests, n_prompt = n_each * len(wanted), math.ceil(n_prompt * len(wanted))
    n_completion = n_claims * len(operation.methods) * n_items * TOKENS_PER_VERDICT * len(wanted)
    n_own = sum(known.labels[index].method == to.id for index in wanted)
    usd = None if to.prices is None else to.prices.usd(n_prompt, n_completion)
    cost = "for an unknown price" if usd is None else "free" if usd == 0 else f"for about ${usd:.2f}"
    return Plan(
        summary=f"Score {len(wanted):,} labels of {known.sae.ref} by {to.id} in {n_requests:,} requests, "
        f"{operation.n_parallel} at once, {cost}.",
        details={
            "n_features": len(wanted),
            "n_requests": n_requests,
            "prompt_tokens": n_prompt,
            "completion_tokens": n_completion,
            "usd": usd,
            "max_usd": operation.max_usd,
            "n_written_by_scorer": n_own,
            "how": "At most: a feature with fewer examples takes fewer requests. Tokens are counted in the SAE's own "
            "model's, which is an estimate. Requests that are repeated come on top."
            + (f" {n_own:,} of the labels were written by {to.id} itself: another model judges harder." * bool(n_own)),
        },
    )


@runs(ScoreLabels, lane="io", resumes="start")
def run_score_labels(
    operation: ScoreLabels, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, ScoringReport]:
    with Knowledge.of(engine, operation.sae) as known:
        book = _Book(operation, engine, context, known)
        to = None if operation.provider == RULE else connection(operation, engine, operation.provider)
        budget = Budget() if to is None else budget_for(to, operation.max_usd, book.usd(to.prices))
        signal = Signal.GO
        if book.wanted:
            desk = yield from _open_desk(operation, engine, known)
            book.similar_by = desk.similar_by
            if to is None:
                judge: RuleJudge | ChatJudge = RuleJudge(desk.lexicon)
            else:
                chat = open_chat(engine, to, n_parallel=operation.n_parallel, budget=budget)
                judge = ChatJudge(
                    chat, desk.shown_strings, pieces=known.words.pieces, n_shown=operation.n_shown, close=chat.close
                )
            judging = judge.judge_all(_cases(desk.maker, book))
            try:
                for judged in judging:
                    if judged is not None:
                        book.enter(judged, judge.id)
                    signal = yield book.progress()
                    if signal is Signal.STOP:
                        break
            finally:  # cancelled or not: what is scored is found
                judging.close()  # type: ignore[attr-defined]  # a generator
                book.index()
            if isinstance(judge, ChatJudge) and judge.stopped_by is not None:
                book.status = "max_usd_reached"
        if signal is Signal.STOP and book.n_left:
            book.status = "stopped"
        return book.report(RULE if to is None else to.id, budget.spent if to and to.prices else None)


def _cases(maker: CaseMaker, book: _Book) -> Iterator[Case | None]:
    for index in book.wanted:
        found = maker.case(index)
        if isinstance(found, Unscorable):
            book.fail(found.feature, found.reason, found.detail)
            yield None
        else:
            yield found


class _Desk:
    """What judging takes, once it is prepared."""

    def __init__(self, maker: CaseMaker, lexicon: TokenLexicon, shown_strings: list[str], similar_by: str | None):
        self.maker, self.lexicon, self.shown_strings, self.similar_by = maker, lexicon, shown_strings, similar_by


def _open_desk(operation: ScoreLabels, engine: Engine, known: Knowledge) -> Generator[Progress, Signal, _Desk]:
    strings = known.strings(range(1 + max(known.tokenizer.get_vocab().values())))
    special, unseen = known.uncounted_ids, special_ids(known.tokenizer)
    shown_strings = ["" if token_id in unseen else string for token_id, string in enumerate(strings)]
    lexicon = TokenLexicon(strings, special)
    pool = yield from _pool(operation, engine, known)
    wanted = _wanted(operation, known)
    neighbours: dict[int, list[int]] = {}
    if "decoder" in operation.negatives and "detection" in operation.methods:
        neighbours = yield from _neighbours(engine, known, wanted)
    likeness, similar_by = None, None
    if "similar" in operation.negatives and "detection" in operation.methods:
        likeness, similar_by = yield from _likeness(operation, engine, pool, lexicon, shown_strings)
    covered = set(known.extraction.indices.tolist())
    labels = {
        index: Labelled(label.label, label.version, label.method == RULE)
        for index, label in known.labels.items()
        if index in covered
    }
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
    return _Desk(maker, lexicon, shown_strings, similar_by)


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
        yield Progress(stage="running held-out text", fraction=PREPARED / 2 * (at + step) / (len(contexts) + step))
    return Pool(tokens, contexts, window, parts)


def _neighbours(
    engine: Engine, known: Knowledge, wanted: list[int]
) -> Generator[Progress, Signal, dict[int, list[int]]]:
    def look(some: list[int]) -> NDArray[np.int64]:
        with sparse_autoencoder(engine, known.sae.slug) as sae:
            return decoder_neighbours(sae.W_dec, some, N_NEIGHBOURS)

    found: dict[int, list[int]] = {}
    for at in range(0, len(wanted), FEATURES_A_STEP):
        some = wanted[at : at + FEATURES_A_STEP]
        found |= zip(some, engine.compute.run(partial(look, some)).tolist(), strict=True)
        yield Progress(stage="looking for like features", fraction=PREPARED / 2)
    return found


Likeness = Callable[[Sequence[Passage]], NDArray[np.float32]]


def _likeness(
    operation: ScoreLabels, engine: Engine, pool: Pool, lexicon: TokenLexicon, strings: list[str]
) -> Generator[Progress, Signal, tuple[Likeness, str]]:
    """How like texts are, by the embedder or by the rare words that they share; and by which."""
    some = np.random.default_rng([operation.seed, 3]).permutation(len(pool))[:SIMILAR_AMONG]
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
            yield Progress(stage="comparing texts", fraction=PREPARED * (1 + at / len(ids)) / 2)
        vectors = np.concatenate(parts)

    def likeness(shown: Sequence[Passage]) -> NDArray[np.float32]:
        found = np.full(len(pool), np.nan, dtype=np.float32)
        found[some] = (vectors @ vectors_of([each.token_ids for each in shown[:COMPARED_WITH]]).T).max(axis=1)
        return found

    return likeness, similar_by


class _Book:
    """What a job has scored so far; each score is written down as it comes, so a killed job finds it."""

    def __init__(self, operation: ScoreLabels, engine: Engine, context: JobContext, known: Knowledge) -> None:
        self._operation, self._engine, self._known, self._job = operation, engine, known, context.job.slug
        self.scores: dict[int, dict[str, MethodScore]] = {}
        self.failures: Counter[str] = Counter()
        self._failed: list[dict[str, Any]] = []
        self.status: Any = "completed"
        self.similar_by: str | None = None
        self.wanted: list[int] = []
        for index in _wanted(operation, known):
            before = _scored_by(known.labels[index], self._job)
            if before:
                self.scores[index] = before
            else:
                self.wanted.append(index)
        self._n_wanted = len(self.wanted)
        self._n_done = 0
        self._unindexed: list[int] = []
        self._indexed_at = self._began_at = time.monotonic()

    @property
    def n_left(self) -> int:
        return self._n_wanted - self._n_done

    def usd(self, prices: Prices | None) -> float:
        """What the scores that there are have cost; 0 where nobody has said the prices."""
        if prices is None:
            return 0.0
        every = [score for scores in self.scores.values() for score in scores.values()]
        return sum(prices.usd(score.n_prompt_tokens, score.n_completion_tokens) for score in every)

    def fail(self, index: int, reason: str, detail: str) -> None:
        """A label without a score."""
        self.failures[reason] += 1
        if len(self._failed) < SAMPLES_SHOWN:
            self._failed.append({"feature": index, "reason": reason, "detail": detail})
        self._n_done += 1

    def enter(self, judged: Judged, scorer: str) -> None:
        """Write down what a judge's answers come to."""
        case = judged.case
        found = {
            method: method_score(
                judged,
                method,
                scorer=scorer,
                job=self._job,
                extraction=self._known.record.slug,
                similar_by=self.similar_by,
                seed=self._operation.seed,
            )
            for method in case.rounds
        }
        scores = {method: score for method, score in found.items() if score is not None}
        if not scores:
            self.fail(case.feature, "too_few_answers", "Too few answers could be read, or none came.")
            return
        confidence = float(np.mean([score.balanced_accuracy for score in scores.values()]))
        self._engine.store.score_label(
            self._operation.sae,
            case.feature,
            case.version,
            {method: score.model_dump(mode="json") for method, score in scores.items()},
            confidence,
        )
        self.scores[case.feature] = dict(scores)
        self._n_done += 1
        self._unindexed.append(case.feature)
        if len(self._unindexed) >= INDEXED_AT_ONCE or time.monotonic() - self._indexed_at >= INDEX_SECONDS:
            self.index()

    def index(self) -> None:
        """Let searches see what was scored."""
        update_rows(self._engine, self._operation.sae, self._unindexed)
        self._unindexed, self._indexed_at = [], time.monotonic()

    def progress(self) -> Progress:
        seconds = max(time.monotonic() - self._began_at, 1e-9)
        fraction = PREPARED + (1 - PREPARED) * self._n_done / max(1, self._n_wanted)
        return Progress(stage="scoring", fraction=fraction, rate=self._n_done / seconds, unit="labels")

    def report(self, scorer: str, usd: float | None) -> ScoringReport:
        by_method = {
            method: [scores[method] for scores in self.scores.values() if method in scores]
            for method in self._operation.methods
        }
        every = [score for scores in by_method.values() for score in scores]
        n_answers = sum(score.n_questions - score.n_unanswered for score in every)
        return ScoringReport(
            sae=self._operation.sae,
            status=self.status,
            scorer=scorer,
            n_scored=len(self.scores),
            n_left=self.n_left,
            n_failed=sum(self.failures.values()),
            failures=dict(self.failures),
            failed=self._failed,
            balanced_accuracy={
                method: _distribution([score.balanced_accuracy for score in scores])
                for method, scores in by_method.items()
                if scores
            },
            baselines={method: _baselines(scores) for method, scores in by_method.items() if scores},
            n_beat_baselines={
                method: sum(score.beats_baselines is True for score in scores) for method, scores in by_method.items()
            },
            n_level_with_top_token={
                method: sum(_lead(score, TOP_TOKEN) == 0 for score in scores) for method, scores in by_method.items()
            },
            n_questions=sum(score.n_questions for score in every),
            usd=usd,
            parse_failure_rate=sum(score.n_unparsed for score in every) / n_answers if n_answers else 0.0,
            negatives=dict(sum((Counter(score.negatives) for score in every), Counter())),
            samples=self._samples(),
        )

    def _samples(self) -> list[dict[str, Any]]:
        def confidence(scores: dict[str, MethodScore]) -> float:
            return float(np.mean([score.balanced_accuracy for score in scores.values()]))

        best = sorted(self.scores.items(), key=lambda each: (-confidence(each[1]), each[0]))[:SAMPLES_SHOWN]
        return [
            {
                "feature": index,
                "label": self._known.labels[index].label,
                "confidence": confidence(scores),
                "verdict": next(iter(scores.values())).verdict,
            }
            for index, scores in best
        ]


def _scored_by(label: LabelRecord, job: str) -> dict[str, MethodScore]:
    """What this job wrote down before the engine was killed."""
    ours = {name: body for name, body in label.scores.items() if isinstance(body, dict) and body.get("job") == job}
    return {name: MethodScore.model_validate(body) for name, body in ours.items()}


def _lead(score: MethodScore, baseline: str) -> float | None:
    return score.baselines[baseline].lead if baseline in score.baselines else None


def _baselines(scores: list[MethodScore]) -> dict[str, Distribution]:
    values: dict[str, list[float]] = {OTHER_LABEL: [], TOP_TOKEN: []}
    for score in scores:
        for name, baseline in score.baselines.items():
            if baseline.balanced_accuracy is not None:
                values[name].append(baseline.balanced_accuracy)
    return {name: _distribution(found) for name, found in values.items() if found}


def _distribution(values: list[float]) -> Distribution:
    low, lower, median, upper, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return Distribution(
        n=len(values),
        mean=float(np.mean(values)),
        minimum=low,
        lower_quartile=lower,
        median=median,
        upper_quartile=upper,
        maximum=high,
        histogram=np.histogram(values, bins=10, range=(0, 1))[0].tolist(),
    )
