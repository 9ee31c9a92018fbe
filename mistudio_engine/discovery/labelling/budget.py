"""Money: what has been spent, and what may still be, with never more under way than the cap allows.

A request is charged with the most that it could cost before it goes out, and with what it did cost once it is back.
Whoever keeps the books is told before it goes out, so that they are never behind, however a run ends. Prices are the
user's; it knows none by itself, and no model, and not where the books are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from mistudio_engine.api.errors import MistudioError
from mistudio_engine.discovery.labelling.chat import Answer, Question

__all__ = ["Budget", "BudgetReached", "Hold", "Prices", "n_bytes_of"]

_HEADROOM = 1.25
"""Tokens a byte that are held, in the largest ratio that was seen so far."""

_FRAME_TOKENS = 64
"""Tokens that a server's own template adds to a question at most."""

_NOTED_AHEAD, _NOTED_SHARE = 16, 0.05
"""How far ahead is noted: so many requests, or so much of the cap if that is less. Each note waits for a disk, and what
is noted ahead counts as spent after a kill."""


class Prices(NamedTuple):
    """US dollars for a million tokens."""

    per_million_input: float
    per_million_output: float

    def usd(self, n_prompt_tokens: float, n_completion_tokens: float) -> float:
        """What so many tokens cost."""
        return (n_prompt_tokens * self.per_million_input + n_completion_tokens * self.per_million_output) / 1e6


class BudgetReached(MistudioError):
    """Another request could cost more than is left. It has not been made."""

    code: ClassVar[str] = "budget_reached"
    status: ClassVar[int] = 402


class Hold(NamedTuple):
    """What one request may cost at most."""

    n_bytes: int
    n_prompt_tokens: float
    n_completion_tokens: int
    usd: float


@dataclass
class Budget:
    """The money of one run. One event loop uses it.

    What a question costs is not known before the server has counted its tokens. Until the first answer each byte is
    held to be a token, which no tokenizer exceeds; then the largest ratio seen counts, and a quarter more.
    """

    prices: Prices | None = None
    """None: nothing is counted and `cap` must be None."""

    cap: float | None = None
    """US dollars; None is no limit."""

    spent: float = 0.0
    """US dollars so far, in an earlier attempt too."""

    note: Callable[[float], object] | None = None
    """Is told what may have been spent before it is, on another thread; once it returns, that is not forgotten."""

    held: float = 0.0
    """US dollars that requests under way may cost."""

    _n_held: int = 0
    _ratio: float | None = None
    _noted: float = 0.0
    _settled: asyncio.Condition = field(default_factory=asyncio.Condition)

    def __post_init__(self) -> None:
        self._noted = self.spent

    async def hold(self, question: Question) -> Hold:
        """Put aside what a question may cost, once there is enough left.

        Raises:
            BudgetReached: there is not, and nothing is under way that might turn out cheaper.
        """
        n_bytes = n_bytes_of(question)
        async with self._settled:
            while True:
                hold = self._most(n_bytes, question.max_tokens)
                if self.cap is None or self.spent + self.held + hold.usd <= self.cap:
                    await self._note(hold.usd)
                    self.held += hold.usd
                    self._n_held += 1
                    return hold
                if not self._n_held:
                    raise BudgetReached(
                        f"Another request may cost ${hold.usd:.4f}, and ${max(0.0, self.cap - self.spent):.4f} of "
                        f"${self.cap:g} is left.",
                        fix="Raise max_usd to go on.",
                    )
                await self._settled.wait()

    async def settle(self, hold: Hold, answer: Answer | None, *, maybe_billed: bool = False) -> None:
        """The request is back: with an answer, without one and free, or nobody knows, which counts as the most.

        Tokens of an answer that the server did not count (`usage` is optional in OpenAI's protocol) were not free
        either.
        """
        async with self._settled:
            self._n_held -= 1
            self.held = self.held - hold.usd if self._n_held else 0.0  # what is left of rounding holds nobody up
            if answer is not None:
                wrote_nothing = answer.n_prompt_tokens and not answer.text
                n_completion = answer.n_completion_tokens or (0 if wrote_nothing else hold.n_completion_tokens)
                self.spent += self._usd(answer.n_prompt_tokens or hold.n_prompt_tokens, n_completion)
            elif maybe_billed:
                self.spent += hold.usd
            if answer is not None and answer.n_prompt_tokens:
                ratio = max(0, answer.n_prompt_tokens - _FRAME_TOKENS) / max(1, hold.n_bytes)
                self._ratio = ratio if self._ratio is None else max(ratio, self._ratio)
            self._settled.notify_all()
            await self._note(0.0)  # a server may count more than was held

    async def _note(self, usd: float) -> None:
        """See to it that so much more is noted."""
        needed = self.spent + self.held + usd
        if self.note is None or needed <= self._noted:
            return
        ahead = usd * _NOTED_AHEAD
        if self.cap is not None:
            ahead = min(ahead, self.cap * _NOTED_SHARE, max(0.0, self.cap - needed))
        await asyncio.to_thread(self.note, needed + ahead)
        self._noted = needed + ahead

    def _most(self, n_bytes: int, max_tokens: int) -> Hold:
        # Never less than a token in eight bytes, whatever a server has counted.
        ratio = 1.0 if self._ratio is None else max(self._ratio * _HEADROOM, 0.125)
        n_prompt = n_bytes * ratio + _FRAME_TOKENS
        return Hold(n_bytes, n_prompt, max_tokens, self._usd(n_prompt, max_tokens))

    def _usd(self, n_prompt_tokens: float, n_completion_tokens: float) -> float:
        return 0.0 if self.prices is None else self.prices.usd(n_prompt_tokens, n_completion_tokens)


def n_bytes_of(question: Question) -> int:
    """Bytes of both messages."""
    return len(question.system.encode()) + len(question.user.encode())
