"""Handlers of api/operations/labels.py: features are labelled by a job, by people and by agents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator

from mistudio_engine.api.errors import BadInput, Conflict
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.features import LabellingReport
from mistudio_engine.api.operations.labels import LabelFeatures, LabelHistory, LabellingAttempts, SetLabel
from mistudio_engine.api.records import Finding, Job, LabelRecord, Page, Plan, SAERecord
from mistudio_engine.api.refs import feature_of
from mistudio_engine.discovery.analysis_store import read_analysis
from mistudio_engine.discovery.labelling.budget import Budget
from mistudio_engine.discovery.labelling.labeller import Labeller, gather_evidence
from mistudio_engine.discovery.labelling.llm import LLMLabeller
from mistudio_engine.discovery.labelling.prompts import SYSTEM_MESSAGE, USER_PROMPT, Notes, Place, Prompt
from mistudio_engine.discovery.labelling.token_pattern import TokenPatternLabeller
from mistudio_engine.handlers.chats import Connection, budget_for, open_chat, require_person_for_address
from mistudio_engine.handlers.knowledge import DERIVED_FOLDER, Knowledge
from mistudio_engine.handlers.label_book import LabelBook, asked_for, stays
from mistudio_engine.handlers.ledger import Ledger
from mistudio_engine.handlers.registry import Planned, handles, plans, runs
from mistudio_engine.handlers.search_index import update_rows
from mistudio_engine.handlers.settled import settle, settled
from mistudio_engine.runtime.engine import Engine, caller
from mistudio_engine.runtime.jobs import JobContext

PLANNED_PROMPTS = 32
"""Prompts that a plan builds to see how long they are."""

CHARACTERS_PER_TOKEN = 4
"""Of English text in the usual tokenizers; a plan says that it is an estimate."""

ANSWER_TOKENS = (60, 400)
"""A short answer, and the longest."""

LLM_ONLY = (
    *("model", "base_url", "temperature", "n_examples", "n_negatives", "n_parallel", "system_message", "user_prompt"),
    *("max_usd", "price_per_million_input", "price_per_million_output"),
)
"""Arguments that only a language model has a use for."""


@plans(LabelFeatures)
def plan_label_features(operation: LabelFeatures, engine: Engine) -> Planned:
    require_person_for_address(operation.base_url)
    with Knowledge.of(engine, operation.sae) as known:
        covered = set(known.extraction.indices.tolist()) if operation.features else set()
        for index in operation.features or []:
            known.check_index(index)
            if index not in covered:
                known.extraction.feature(index)  # which says that the extraction was of other features
        agreed = settle(operation, engine, known)
        if agreed.to is None:
            plan = _plan_token_pattern(operation, known)
        else:
            plan = _plan_llm(operation, engine, known, agreed.to)
        return Planned(plan, subject=known.sae.ref, settled=agreed.as_data())


def _plan_token_pattern(operation: LabelFeatures, known: Knowledge) -> Plan:
    fields = type(operation).model_fields
    if idle := sorted(name for name in LLM_ONLY if getattr(operation, name) != fields[name].default):
        raise BadInput(
            f"{', '.join(idle)} would do nothing: token_pattern asks no language model.",
            fix="Leave it out, or give provider: openai, ollama or compatible.",
        )
    n = len(operation.features) if operation.features is not None else known.record.n_alive
    return Plan(summary=f"Label {n:,} features of {known.sae.ref} by their token patterns.", details={"n_features": n})


def _plan_llm(operation: LabelFeatures, engine: Engine, known: Knowledge, to: Connection) -> Plan:
    budget_for(to, operation.max_usd)
    wanted = [index for index in asked_for(operation, known) if not stays(operation, known.labels.get(index))]
    prompt, notes = _prompt(operation, known), _notes(known)
    sample = wanted[:: max(1, len(wanted) // PLANNED_PROMPTS)][:PLANNED_PROMPTS]
    questions = [prompt.question(gather_evidence(known.extraction, index), notes(index)).question for index in sample]
    n_characters = sum(len(each.system) + len(each.user) for each in questions) / max(1, len(questions))
    n_tokens = math.ceil(n_characters / CHARACTERS_PER_TOKEN)
    seconds_each = _measured_seconds(engine, to.id)
    seconds = None if seconds_each is None else len(wanted) * seconds_each / operation.n_parallel
    least, most = (None if to.prices is None else to.prices.usd(n_tokens, n) * len(wanted) for n in ANSWER_TOKENS)
    cost = "free" if most == 0 else "for an unknown price" if most is None else f"for ${least:.2f} to ${most:.2f}"
    return Plan(
        summary=f"Label {len(wanted):,} features of {known.sae.ref} by {to.id}, {operation.n_parallel} at once, "
        f"{cost}.",
        seconds=seconds,
        details={
            "n_features": len(wanted),
            "n_requests": len(wanted),
            "prompt_tokens_each": n_tokens,
            "prompt_tokens": n_tokens * len(wanted),
            "completion_tokens": [n * len(wanted) for n in ANSWER_TOKENS],
            "usd": None if most is None else [least, most],
            "max_usd": operation.max_usd,
            "seconds_per_request": seconds_each,
            "how": f"{len(questions)} prompts were built; a token was taken to be {CHARACTERS_PER_TOKEN} characters, "
            f"which is an estimate. An answer has {ANSWER_TOKENS[0]} to {ANSWER_TOKENS[1]} tokens. Requests that are "
            "repeated come on top. "
            + ("The time is unknown until this model has labelled here once." if seconds_each is None else ""),
        },
    )


def _measured_seconds(engine: Engine, method: str) -> float | None:
    """Seconds to an answer in the last job that asked this model; None before the first."""
    for job in reversed(engine.store.all(Job, operation=LabelFeatures.tool, state="completed")):
        if job.result and job.result.get("method") == method and job.result.get("seconds_per_request"):
            return job.result["seconds_per_request"]
    return None


@runs(LabelFeatures, lane="io", resumes="start")
def run_label_features(
    operation: LabelFeatures, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, LabellingReport]:
    agreed, ledger = settled(operation, engine, context), Ledger(engine, context)
    with agreed.knowledge(engine, operation.sae) as known:
        book, to = LabelBook(operation, engine, context, known), agreed.to
        budget = Budget(spent=ledger.usd)  # an earlier attempt may have asked one
        if to is not None:
            budget = budget_for(to, operation.max_usd, ledger.usd, ledger.write)
        if to is None:
            labeller: Labeller = _token_pattern(known)
        else:
            chat = open_chat(
                engine, to, temperature=operation.temperature, n_parallel=operation.n_parallel, budget=budget
            )
            labeller = LLMLabeller(chat, _prompt(operation, known), _notes(known))
        found = labeller.label_all(gather_evidence(known.extraction, index) for index in book.wanted)
        signal = Signal.GO
        try:
            for outcome in found:
                if outcome is not None:
                    book.enter(outcome)
                book.keep()
                signal = yield book.progress()
                if signal is Signal.STOP:
                    break
        finally:  # cancelled or not: what came is kept, and found
            found.close()  # type: ignore[attr-defined]  # a generator
            ledger.write(budget.spent + budget.held)
            book.close()
        report = book.report(labeller.id)
        if isinstance(labeller, LLMLabeller):
            usage = labeller.chat.usage
            report.n_requests, report.seconds_per_request = usage.n_requests, usage.seconds_per_request
            report.n_prompt_tokens, report.n_completion_tokens = usage.n_prompt_tokens, usage.n_completion_tokens
            report.usd = None if to is None or to.prices is None else budget.spent
            if labeller.stopped_by is not None:
                report.status = "max_usd_reached"
        if signal is Signal.STOP and report.n_left:
            report.status = "stopped"
        return report


def _token_pattern(known: Knowledge) -> Labeller:
    vocabulary = known.tokenizer.get_vocab()
    strings = known.strings(range(1 + max(vocabulary.values())))
    return TokenPatternLabeller(strings, known.uncounted_ids)


def _prompt(operation: LabelFeatures, known: Knowledge) -> Prompt:
    """The prompt of a call: its own words, or ours."""
    # Paths that people, agents and language models chose; those of token patterns describe positions, not meanings.
    named = [label for label in known.labels.values() if label.category and label.method != TokenPatternLabeller.id]
    categories = Counter(label.category for label in named)
    place = Place(
        sae=known.sae.slug,
        model=known.record.model,
        hook=known.record.hook_name,
        layer=known.sae.layer,
        categories=[category for category, _ in categories.most_common(30)],
    )
    return Prompt(
        known.strings,
        place,
        pieces=known.words.pieces,
        system_message=operation.system_message or SYSTEM_MESSAGE,
        user_prompt=operation.user_prompt or USER_PROMPT,
        n_examples=operation.n_examples,
        n_negatives=operation.n_negatives,
    )


def _notes(known: Knowledge) -> Callable[[int], Notes]:
    """What is known of a feature beside its contexts: logit effects, and the analysis if one was made."""
    folder = known.folder / DERIVED_FOLDER

    def of(index: int) -> Notes:
        logits = known.logit_tokens(index, 10)
        promoted, suppressed = ([(each.token, each.value) for each in side] for side in logits or ([], []))
        found = read_analysis(folder, index)
        return Notes(promoted, suppressed, found.summary if found is not None else "")

    return of


@handles(SetLabel)
def set_label(operation: SetLabel, engine: Engine) -> LabelRecord:
    key = feature_of(operation.feature)
    label = LabelRecord(
        sae=key.sae,
        index=key.index,
        label=operation.label,
        category=operation.category,
        author=caller(),
        evidence=operation.evidence,
    )
    with engine.store.transaction():
        sae = engine.store.get(SAERecord, key.sae)
        if key.index >= sae.d_sae:
            raise BadInput(
                f"{sae.ref} has no feature {key.index}.",
                why=f"Its features are 0 to {sae.d_sae - 1}.",
                fix="Use one of them.",
            )
        written = engine.store.add_label(label.model_copy(update={"extraction": sae.extraction}))
        if written is None:
            raise Conflict(f"{key.ref} has a label that {caller()} may not replace.", fix="Ask a person to change it.")
        if written.version == 1:  # counting them all would take as long as there are labels
            engine.store.update(SAERecord, key.sae, n_labelled=sae.n_labelled + 1)
    engine.bus.publish(f"saes/{key.sae}", "label", written.model_dump(mode="json"))
    update_rows(engine, key.sae, [key.index])
    return written


@handles(LabelHistory)
def label_history(operation: LabelHistory, engine: Engine) -> Page[LabelRecord]:
    with Knowledge.of(engine, operation.sae) as known:
        known.check_index(operation.index)
    rows = engine.store.label_history(operation.sae, operation.index)
    return Page[LabelRecord](rows=rows, total=len(rows), shown=len(rows))


@handles(LabellingAttempts)
def labelling_attempts(operation: LabellingAttempts, engine: Engine) -> Page[Finding]:
    with Knowledge.of(engine, operation.sae) as known:
        known.check_index(operation.index)
    rows = engine.store.findings(operation.sae, operation.index, "attempt")
    shown = rows[: operation.limit]
    return Page[Finding](rows=shown, total=len(rows), shown=len(shown))
