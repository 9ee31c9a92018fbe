"""Labels by a language model: many questions at once, each answer read, asked again where it is none.

The questions run in an event loop on a thread of this labeller's own; evidence is drawn and written into prompts on
another, so that neither waits for the other nor for whoever keeps the labels. It knows which chat it asks, and neither
the server behind it nor where labels go.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from mistudio_engine.discovery.labelling.answers import Written, read_label
from mistudio_engine.discovery.labelling.budget import BudgetReached
from mistudio_engine.discovery.labelling.chat import Answer, NoAnswer
from mistudio_engine.discovery.labelling.labeller import Evidence, FailureReason, Label, LabelFailure
from mistudio_engine.discovery.labelling.patient_chat import PatientChat
from mistudio_engine.discovery.labelling.prompts import Notes, Prompt, Shown, firing

__all__ = ["LLMLabeller"]

N_ASKED = 3
"""How often one feature is asked about, when what comes back is no label."""

MIN_CONTEXTS = 2
"""Contexts with firing tokens to build a label from."""

FEWEST_EXAMPLES = 2
"""To this many a prompt that is too long is cut down."""

LONGEST_KEPT = 20_000
"""Characters of an answer that are kept for inspection: more than the longest that is asked for has."""

SILENCE_SECONDS = 0.4
"""After so long without an outcome the iterator says that it is alive."""

STOP_SECONDS = 4.0
"""How long closing waits for the thread."""

_Outcome = Label | LabelFailure


class LLMLabeller:
    """Labels features by asking a language model; for one run.

    Args:
        chat: who is asked.
        prompt: makes the questions.
        notes: what is known of a feature beside its contexts; called on the thread that draws evidence, as `prompt` is.
    """

    def __init__(
        self, chat: PatientChat, prompt: Prompt, notes: Callable[[int], Notes] = lambda feature: Notes()
    ) -> None:
        self.chat, self.prompt, self.notes = chat, prompt, notes
        self.stopped_by: BudgetReached | None = None
        """Why it stopped before the end, if the budget made it."""

    @property
    def id(self) -> str:
        """Such as `openai/gpt-4o-mini`."""
        return self.chat.id

    def label_all(self, evidence: Iterable[Evidence]) -> Iterator[Label | LabelFailure | None]:
        """A label or a failure for each, as they come; None where none came for a while.

        Closing it ends what is under way. When the budget is reached it ends early: see `stopped_by`.

        Raises:
            MistudioError: no question will be answered. What was given stays.
        """
        run = _Run(self, iter(evidence))
        try:
            yield from run.outcomes()
        finally:
            run.close()

    def begin(self, evidence: Evidence) -> _Conversation | LabelFailure:
        """The first question about a feature, or why there is none to ask."""
        feature = evidence.stats.feature
        if evidence.stats.dead:
            return LabelFailure(feature, "dead", "It never fired on these tokens.", self.id)
        n_found = len(firing(evidence.explain, len(evidence.explain)))
        if n_found < MIN_CONTEXTS:
            detail = f"It fires in {n_found} contexts to build a label from, and {MIN_CONTEXTS} are needed."
            return LabelFailure(feature, "too_few_examples", detail, self.id)
        return _Conversation(self, evidence, self.notes(feature))


class _Try(NamedTuple):
    """One answer, and what was wrong with it."""

    answer: Answer | None
    reason: FailureReason | None
    detail: str

    def as_data(self) -> dict[str, Any]:
        usage = {}
        if self.answer is not None:
            usage = {
                "answer": self.answer.text[:LONGEST_KEPT],
                "model": self.answer.model,
                "n_prompt_tokens": self.answer.n_prompt_tokens,
                "n_completion_tokens": self.answer.n_completion_tokens,
            }
        return {**usage, "problem": self.reason, "detail": self.detail}


class _Conversation:
    """The questions about one feature, until there is a label or no hope."""

    def __init__(self, labeller: LLMLabeller, evidence: Evidence, notes: Notes) -> None:
        self._labeller, self._evidence, self._notes = labeller, evidence, notes
        self._n_examples = labeller.prompt.n_examples
        self._shown: Shown = labeller.prompt.question(evidence, notes)
        self._tries: list[_Try] = []
        self._faults: list[str] = []

    async def label(self) -> _Outcome:
        """The label, or why there is none.

        Raises:
            MistudioError: no question will be answered, or there is no money for another.
        """
        question = self._shown.question
        for _ in range(N_ASKED):
            answer = None
            try:
                answer = await self._labeller.chat.ask(question, note=self._faults.append)
            except NoAnswer as error:
                self._tries.append(_Try(error.answer, error.reason, error.detail))
                if error.reason == "prompt_too_long" and self._n_examples > FEWEST_EXAMPLES:
                    question = self._with_fewer_examples()
                elif error.reason == "cut_off":
                    question = question._replace(max_tokens=question.max_tokens * 2)
                elif error.reason != "empty":
                    break
                continue
            read = read_label(answer.text)
            if isinstance(read, Written):
                self._tries.append(_Try(answer, None, ""))
                return self._label(read)
            self._tries.append(_Try(answer, read.reason, read.detail))
            if read.final:
                break
            again = f"Your last answer cannot be used: {read.detail}. Answer with the JSON object only."
            question = question._replace(user=f"{self._shown.question.user}\n\n{again}")
        return self._failure()

    def _with_fewer_examples(self) -> Any:
        self._n_examples = max(FEWEST_EXAMPLES, self._n_examples // 2)
        self._shown = self._labeller.prompt.question(self._evidence, self._notes, n_examples=self._n_examples)
        return self._shown.question

    def _label(self, read: Written) -> Label:
        shown, silent = self._shown.contexts, self._shown.silent
        return Label(
            feature=self._evidence.stats.feature,
            label=read.label,
            category=read.category,
            confidence=None,
            evidence=f"{read.reasoning} (From {len(shown)} contexts in which it fires, {_numbers(shown)}"
            + (f", and {len(silent)} in which it is silent.)" if silent else ".)"),
            method=self._labeller.id,
            numbers={"n_explain_contexts": len(shown), "n_silent_contexts": len(silent), "n_asked": len(self._tries)},
            attempt=self._attempt(),
        )

    def _failure(self) -> LabelFailure:
        last = self._tries[-1]
        assert last.reason is not None
        times = f" (asked {len(self._tries)} times)" if len(self._tries) > 1 else ""
        feature = self._evidence.stats.feature
        return LabelFailure(feature, last.reason, f"{last.detail}{times}", self._labeller.id, self._attempt())

    def _attempt(self) -> dict[str, Any]:
        question = self._shown.question
        return {
            "messages": [
                {"role": "system", "content": question.system},
                {"role": "user", "content": question.user},
            ],
            "contexts": self._shown.contexts,
            "silent_contexts": self._shown.silent,
            "tries": [each.as_data() for each in self._tries],
            "faults": self._faults,
        }


def _numbers(contexts: list[int]) -> str:
    shown = ", ".join(map(str, contexts[:8]))
    return f"numbers {shown}{', …' if len(contexts) > 8 else ''}"


class _End(NamedTuple):
    """The end of a run."""

    error: BaseException | None


class _Run:
    """One run: a thread with the loop, one that draws evidence, and a queue of outcomes between them and us."""

    def __init__(self, labeller: LLMLabeller, evidence: Iterator[Evidence]) -> None:
        self._labeller, self._evidence = labeller, evidence
        self._outcomes: queue.SimpleQueue[_Outcome | _End] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mistudio-labelling", daemon=True)
        self._thread.start()

    def outcomes(self) -> Iterator[_Outcome | None]:
        """What comes, until the end."""
        while True:
            try:
                found = self._outcomes.get(timeout=SILENCE_SECONDS)
            except queue.Empty:
                yield None
                continue
            if isinstance(found, _End):
                if found.error is not None:
                    raise found.error
                return
            yield found

    def close(self) -> None:
        """End whatever is under way, and wait for the thread, not for long."""
        self._closing.set()
        if self._loop is not None and self._main is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join(STOP_SECONDS)

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            asyncio.run(self._all())
        except asyncio.CancelledError:
            pass
        except BaseException as fault:  # an edge: whoever iterates is to see it
            error = fault
        self._outcomes.put(_End(error))

    async def _all(self) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        if self._closing.is_set():
            return
        chat = self._labeller.chat
        # Twice as many as there are places: some wait between two tries, and others take their places.
        drawn: asyncio.Queue[_Conversation | LabelFailure | None] = asyncio.Queue(maxsize=chat.n_parallel)
        with ThreadPoolExecutor(1, thread_name_prefix="mistudio-evidence") as thread:
            try:
                async with asyncio.TaskGroup() as group:
                    asking = [group.create_task(self._ask(drawn)) for _ in range(2 * chat.n_parallel)]
                    group.create_task(self._draw(drawn, thread, len(asking)))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_SECONDS / 2):
                        await chat.close()

    async def _draw(self, drawn: asyncio.Queue[Any], thread: ThreadPoolExecutor, n_asking: int) -> None:
        """Draws evidence as there is room for it."""
        loop = asyncio.get_running_loop()
        while self._labeller.stopped_by is None:
            found = await loop.run_in_executor(thread, self._next)
            if found is None:
                break
            await drawn.put(found)
        for _ in range(n_asking):
            await drawn.put(None)

    def _next(self) -> _Conversation | LabelFailure | None:
        evidence = None if self._closing.is_set() else next(self._evidence, None)
        return None if evidence is None else self._labeller.begin(evidence)

    async def _ask(self, drawn: asyncio.Queue[Any]) -> None:
        """Asks about one feature after the other."""
        while (found := await drawn.get()) is not None:
            if self._labeller.stopped_by is not None:
                continue  # what was drawn before the budget was reached is left for another time
            try:
                self._outcomes.put(found if isinstance(found, LabelFailure) else await found.label())
            except BudgetReached as error:
                self._labeller.stopped_by = error
