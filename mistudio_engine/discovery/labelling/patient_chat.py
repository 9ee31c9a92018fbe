"""A chat that is patient: one limit on how many requests are under way, and more tries for what fails in passing.

Waits between tries grow exponentially with full jitter (Brooker, "Exponential Backoff and Jitter", AWS 2015), and are
never shorter than what a server asks for. A question that waits holds no place. It knows no protocol: a `Server` makes
one try.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from mistudio_engine.api.errors import MistudioError, Unreachable
from mistudio_engine.discovery.labelling.budget import Budget
from mistudio_engine.discovery.labelling.chat import Answer, NoAnswer, NoAnswerReason, Question

__all__ = ["Passing", "PatientChat", "Server", "Usage"]

N_TRIES = 6
FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 30.0
LONGEST_ASKED_SECONDS = 300.0
"""A server that asks for a longer wait is asked again after this one."""

N_LOST_IN_A_ROW = 5
"""Questions that may fail in all tries with nothing answered in between; then the server is taken to be down."""


class Passing(Exception):
    """One try failed in a way that may pass.

    Args:
        reason: what NoAnswer says when it does not pass; None: nobody listens there, for no question.
        detail: in a few words.
        after_seconds: how long the server asks to be left alone.
        maybe_billed: the server may have counted tokens for it.
    """

    def __init__(
        self,
        reason: NoAnswerReason | None,
        detail: str,
        *,
        after_seconds: float | None = None,
        maybe_billed: bool = False,
    ) -> None:
        super().__init__(detail)
        self.reason: NoAnswerReason | None = reason
        self.detail, self.after_seconds, self.maybe_billed = detail, after_seconds, maybe_billed


class Server(Protocol):
    """Makes one try."""

    @property
    def id(self) -> str:
        """As of `Chat`."""
        ...

    async def send(self, question: Question) -> Answer:
        """The answer to one request.

        Raises:
            Passing: another try may succeed.
            NoAnswer: not for this question.
            MistudioError: not for any.
        """
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...


@dataclass
class Usage:
    """What a chat has used."""

    n_requests: int = 0
    n_repeated: int = 0
    """Of these, tries after the first."""

    n_prompt_tokens: int = 0
    n_completion_tokens: int = 0
    busy_seconds: float = 0.0
    """Summed over answered requests."""

    n_answered: int = 0

    @property
    def seconds_per_request(self) -> float | None:
        """Mean time to an answer; None before the first."""
        return self.busy_seconds / self.n_answered if self.n_answered else None


class PatientChat:
    """A `Chat` on a server. It belongs to the event loop that first asks it.

    Args:
        server: makes each try.
        n_parallel: requests under way at most.
        budget: what they may cost; no limit by default.
        redact: takes secrets out of what the server says.
        n_tries: for each question.
        first_backoff_seconds: the longest first wait; each next one is twice as long.
        seed: of the jitter.
    """

    def __init__(
        self,
        server: Server,
        *,
        n_parallel: int = 8,
        budget: Budget | None = None,
        redact: Callable[[str], str] = str,
        n_tries: int = N_TRIES,
        first_backoff_seconds: float = FIRST_BACKOFF_SECONDS,
        seed: int | None = None,
    ) -> None:
        self.usage = Usage()
        self.n_parallel = n_parallel
        self.budget = budget or Budget()
        self._server = server
        self._redact = redact
        self._redact_name = lru_cache(maxsize=8)(redact)  # redacting reads files, and it is the same model each time
        self._n_tries = n_tries
        self._first_backoff = first_backoff_seconds
        self._chance = random.Random(seed)
        self._places = asyncio.Semaphore(n_parallel)
        self._n_lost = 0

    @property
    def id(self) -> str:
        """Who answers, such as `openai/gpt-4o-mini`."""
        return self._server.id

    async def ask(self, question: Question, *, note: Callable[[str], object] | None = None) -> Answer:
        """The answer, after as many tries as it takes; `note` is told of each that failed in passing.

        Raises:
            NoAnswer: none came to this question.
            BudgetReached: it might cost more than is left.
            Unreachable: nobody listens, or nothing was answered for a while.
            MistudioError: no question will be answered.
        """
        for n_tried in range(1, self._n_tries + 1):
            try:
                answer = await self._try(question, again=n_tried > 1)
            except Passing as fault:
                if note is not None:
                    note(self._redact(fault.detail))
                if n_tried == self._n_tries:
                    raise self._lost(fault) from None
                await asyncio.sleep(self._wait_seconds(n_tried, fault.after_seconds))
            else:
                return self._cleaned(answer)
        raise AssertionError("unreachable: the last try returns or raises")

    async def close(self) -> None:
        """Close the server's connections."""
        await self._server.close()

    async def _try(self, question: Question, *, again: bool) -> Answer:
        async with self._places:
            hold = await self.budget.hold(question)
            answer, maybe_billed = None, True  # whatever happens, a cancellation too
            began_at = time.monotonic()
            self.usage.n_requests += 1
            self.usage.n_repeated += again
            try:
                answer = await self._server.send(question)
                return answer
            except Passing as fault:
                maybe_billed = fault.maybe_billed
                raise
            except NoAnswer as error:
                answer, maybe_billed = error.answer, False
                raise self._clean(error) from None
            except MistudioError as error:
                maybe_billed = False
                clean = self._redact
                raise type(error)(clean(error.what), why=clean(error.why), fix=clean(error.fix)) from None
            finally:
                if answer is not None:
                    self._count(answer, time.monotonic() - began_at)
                await self.budget.settle(hold, answer, maybe_billed=maybe_billed)

    def _count(self, answer: Answer, seconds: float) -> None:
        self._n_lost = 0  # a refusal, too, is an answer
        self.usage.n_answered += 1
        self.usage.busy_seconds += seconds
        self.usage.n_prompt_tokens += answer.n_prompt_tokens
        self.usage.n_completion_tokens += answer.n_completion_tokens

    def _clean(self, error: NoAnswer) -> NoAnswer:
        return NoAnswer(error.reason, self._redact(error.detail), answer=error.answer and self._cleaned(error.answer))

    def _cleaned(self, answer: Answer) -> Answer:
        """As it may be kept: without secrets, and without halves of surrogate pairs, which no file takes."""
        text, model = (each.encode("utf-8", "replace").decode() for each in (answer.text, answer.model))
        return answer._replace(text=self._redact(text), model=self._redact_name(model))

    def _wait_seconds(self, n_tried: int, asked: float | None) -> float:
        longest = min(LONGEST_BACKOFF_SECONDS, self._first_backoff * 2 ** (n_tried - 1))
        # After what the server asks for, not at once: all who were sent away then would come back together.
        return min(asked or 0.0, LONGEST_ASKED_SECONDS) + self._chance.uniform(0, longest if not asked else longest / 4)

    def _lost(self, fault: Passing) -> MistudioError:
        self._n_lost += 1
        detail = self._redact(fault.detail)
        if fault.reason is None or self._n_lost >= N_LOST_IN_A_ROW:
            return Unreachable(
                f"The language model server of {self.id} does not answer: {detail}",
                why=f"It was asked {self._n_tries} times"
                + (f", and so were {self._n_lost - 1} questions before." if self._n_lost > 1 else "."),
                fix="See that it runs and that the address is right (list_settings), then retry the job: what is "
                "labelled stays.",
            )
        return NoAnswer(fault.reason, f"{detail} (in each of {self._n_tries} tries)")
