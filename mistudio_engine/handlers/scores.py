"""Handlers of api/operations/scores.py: labels are scored on held-out text, by their rules or by a language model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterator
from typing import NamedTuple, TypeVar

from mistudio_engine.api.errors import BadInput, NotFound
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations.scores import ScoreLabels
from mistudio_engine.api.records import LabelRecord, Plan, TokensRecord
from mistudio_engine.api.scores import ScoringReport
from mistudio_engine.discovery.labelling.budget import Budget
from mistudio_engine.discovery.labelling.cases import Unscorable
from mistudio_engine.discovery.labelling.chat_judge import ChatJudge, prompt_tokens
from mistudio_engine.discovery.labelling.rule_judge import RuleJudge
from mistudio_engine.discovery.labelling.scoring import Case
from mistudio_engine.handlers.chats import Connection, budget_for, open_chat, require_person_for_address
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.ledger import Ledger
from mistudio_engine.handlers.registry import Planned, plans, runs
from mistudio_engine.handlers.resources import fitting_model
from mistudio_engine.handlers.score_book import ScoreBook
from mistudio_engine.handlers.score_desk import RULE, Desk, Wanted, labels_in_turn, open_desk, read_labels
from mistudio_engine.handlers.settled import settle, settled
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext

T = TypeVar("T")

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
        _check(operation, engine, known)
        found = _count(operation, engine, known)
        if not found.n_wanted:
            raise _nothing_to_score(known, found)
        agreed = settle(operation, engine, known)
        if agreed.to is None:
            plan = _plan_by_rule(operation, known, found)
        else:
            plan = _plan_llm(operation, known, found, agreed.to)
        return Planned(plan, subject=known.sae.ref, settled=agreed.as_data())


class _Found(NamedTuple):
    """How many labels there are, and by what method those were made that are to be scored."""

    n_labels: int
    methods: Counter[str]

    @property
    def n_wanted(self) -> int:
        return self.methods.total()


def _count(operation: ScoreLabels, engine: Engine, known: Knowledge) -> _Found:
    wanted, n_labels, methods = Wanted(operation), 0, Counter[str]()
    for label in labels_in_turn(engine, known):
        n_labels += 1
        methods[label.method] += label in wanted
    return _Found(n_labels, methods)


def _check(operation: ScoreLabels, engine: Engine, known: Knowledge) -> None:
    """Refuse features that were asked for and cannot be scored.

    Raises:
        NotFound: one is not there.
        BadInput: one has no label, or one that only a language model can judge.
    """
    wanted = Wanted(operation)
    for index in operation.features or []:
        known.check_index(index)
        known.extraction.feature(index)  # which says that the extraction was of other features
        label = engine.store.label(known.sae.slug, index)
        if label is None:
            raise BadInput(
                f"Feature {index} of {known.sae.ref} has no label to score.",
                fix="Label it first: label_features, or set_label.",
                next_call=("label_features", {"sae": known.sae.slug, "features": [index]}),
            )
        if label not in wanted:
            raise _needs_a_reader(f"The label of feature {index} is in words", label)


def _nothing_to_score(known: Knowledge, found: _Found) -> Exception:
    if found.n_labels:
        return _needs_a_reader(f"None of the {found.n_labels} labels is a token pattern", None)
    return NotFound(
        f"No feature of {known.sae.ref} that {known.record.ref} covers is labelled.",
        fix="Label them first.",
        next_call=("label_features", {"sae": known.sae.slug}),
    )


def _needs_a_reader(what: str, label: LabelRecord | None) -> BadInput:
    author = f" (“{label.label}”, by {label.author})" if label is not None else ""
    return BadInput(
        f"{what}{author}.",
        why="Without a language model only token patterns can be scored: they are rules.",
        fix="Give provider and model: ollama, openai or compatible.",
    )


def _plan_by_rule(operation: ScoreLabels, known: Knowledge, found: _Found) -> Plan:
    fields = type(operation).model_fields
    if idle := sorted(name for name in LLM_ONLY if getattr(operation, name) != fields[name].default):
        raise BadInput(
            f"{', '.join(idle)} would do nothing: token_pattern asks no language model.",
            fix="Leave it out, or give provider: openai, ollama or compatible.",
        )
    n_left_out = found.n_labels - found.n_wanted if operation.features is None else 0
    rest = f"; {n_left_out:,} labels in other words need a language model" if n_left_out else ""
    return Plan(
        summary=f"Score {found.n_wanted:,} labels of {known.sae.ref} by their own rules{rest}.",
        details={"n_features": found.n_wanted, "n_left_out": n_left_out, "n_requests": 0, "usd": 0.0},
    )


def _plan_llm(operation: ScoreLabels, known: Knowledge, found: _Found, to: Connection) -> Plan:
    budget_for(to, operation.max_usd)
    n_items = 2 * operation.n
    n_claims = 3  # the label, another feature's, the top token
    n_each, n_prompt = 0, 0.0
    for method in operation.methods:
        n_rounds = 1 if method == "detection" else 2
        n_asked = n_rounds * math.ceil(n_items / n_rounds / operation.n_shown)
        n_each += n_claims * n_asked
        n_prompt += n_claims * (n_asked * prompt_tokens(method) + n_items * (operation.window + 8))
    n_requests, n_prompt = n_each * found.n_wanted, math.ceil(n_prompt * found.n_wanted)
    n_completion = n_claims * len(operation.methods) * n_items * TOKENS_PER_VERDICT * found.n_wanted
    n_own = found.methods[to.id]
    usd = None if to.prices is None else to.prices.usd(n_prompt, n_completion)
    cost = "for an unknown price" if usd is None else "free" if usd == 0 else f"for about ${usd:.2f}"
    return Plan(
        summary=f"Score {found.n_wanted:,} labels of {known.sae.ref} by {to.id} in {n_requests:,} requests, "
        f"{operation.n_parallel} at once, {cost}.",
        details={
            "n_features": found.n_wanted,
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
    agreed, ledger = settled(operation, engine, context), Ledger(engine, context)
    with agreed.knowledge(engine, operation.sae) as known:
        to, scorer = agreed.to, RULE if agreed.to is None else agreed.to.id
        book = ScoreBook(operation, engine, context.job.slug, agreed.extraction, scorer)
        budget = Budget() if to is None else budget_for(to, operation.max_usd, ledger.usd, ledger.write)
        labels, wanted = yield from read_labels(operation, engine, known, book)
        desk = None
        if wanted:
            desk = yield from _until_stopped(open_desk(operation, engine, known, labels, wanted))
            book.status = "completed" if desk else "stopped"
        if desk is not None:
            book.similar_by = desk.similar_by
            if to is None:
                judge: RuleJudge | ChatJudge = RuleJudge(desk.lexicon)
            else:
                chat = open_chat(engine, to, n_parallel=operation.n_parallel, budget=budget)
                judge = ChatJudge(
                    chat, desk.shown_strings, pieces=known.words.pieces, n_shown=operation.n_shown, close=chat.close
                )
            judging, signal = judge.judge_all(_cases(desk, book)), Signal.GO
            try:
                for judged in judging:
                    if judged is not None:
                        book.enter(judged)
                    book.keep()
                    signal = yield book.progress()
                    if signal is Signal.STOP:
                        break
            finally:  # cancelled or not: what is scored is kept, and found
                judging.close()  # type: ignore[attr-defined]  # a generator
                ledger.write(budget.spent + budget.held)
                book.keep(now=True)
            if isinstance(judge, ChatJudge) and judge.stopped_by is not None:
                book.status = "max_usd_reached"
            if signal is Signal.STOP and book.n_left:
                book.status = "stopped"
        return book.report(budget.spent if to and to.prices else None)


def _until_stopped(work: Generator[Progress, Signal, T]) -> Generator[Progress, Signal, T | None]:
    """The result of some work; None where it was told to stop before there was one."""
    try:
        while True:
            if (yield next(work)) is Signal.STOP:
                return None
    except StopIteration as end:
        return end.value
    finally:
        work.close()


def _cases(desk: Desk, book: ScoreBook) -> Iterator[Case | None]:
    for index in desk.wanted:
        found = desk.maker.case(index)
        if isinstance(found, Unscorable):
            book.fail(found.feature, found.reason, found.detail)
            yield None
        else:
            yield found
