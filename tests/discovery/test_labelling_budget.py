"""The cap is never passed, whatever a server counts; and what is left is used."""

from __future__ import annotations

import asyncio
import random

import pytest

from mistudio_engine.discovery.labelling.budget import Budget, BudgetReached, Prices
from mistudio_engine.discovery.labelling.chat import Answer, Question

PRICES = Prices(1.0, 2.0)
QUESTION = Question("s" * 100, "u" * 900, {}, max_tokens=100)
"""A thousand bytes."""


def answer(n_prompt: int = 250, n_completion: int = 50) -> Answer:
    return Answer("", "", n_prompt, n_completion)


def test_a_price_is_for_a_million_tokens():
    assert PRICES.usd(1_000_000, 500_000) == 2.0


async def spend_all(budget: Budget, reply: Answer | None, *, parallel: int = 4, maybe_billed: bool = False) -> int:
    """Ask until there is no money, several at once; how many were asked."""
    n_asked = 0

    async def worker() -> None:
        nonlocal n_asked
        while True:
            try:
                hold = await budget.hold(QUESTION)
            except BudgetReached:
                return
            n_asked += 1
            await asyncio.sleep(0)
            await budget.settle(hold, reply, maybe_billed=maybe_billed)

    await asyncio.gather(*(worker() for _ in range(parallel)))
    return n_asked


@pytest.mark.parametrize("n_prompt", [1, 50, 250, 500, 1000])
def test_the_cap_is_not_passed_and_nearly_all_of_it_is_used(n_prompt):
    cap = 0.05
    budget = Budget(PRICES, cap)
    n_asked = asyncio.run(spend_all(budget, answer(n_prompt, 100)))
    each = PRICES.usd(n_prompt, 100)
    assert budget.spent == pytest.approx(n_asked * each)
    assert cap - 2e-3 < budget.spent <= cap
    assert budget.held == 0


def test_the_first_questions_wait_for_one_another_when_they_might_be_too_dear_together():
    budget = Budget(PRICES, cap=0.0015)  # one question may cost 0.001264 before anything is known
    assert asyncio.run(spend_all(budget, answer(10, 10), parallel=8)) > 1
    assert budget.spent <= 0.0015


def test_what_may_have_been_billed_counts_as_the_most():
    budget = Budget(PRICES, cap=0.01)
    assert asyncio.run(spend_all(budget, None, maybe_billed=True)) == 7
    assert budget.spent <= 0.01


def test_answers_of_a_server_that_counts_no_tokens_are_not_free():
    budget = Budget(PRICES, cap=0.01)
    assert asyncio.run(spend_all(budget, answer(0, 0))) == 7
    assert 0.008 < budget.spent <= 0.01


def test_rounding_leaves_nothing_held():
    async def many(budget: Budget) -> None:
        chance, under_way = random.Random(0), []
        for _ in range(2000):
            if under_way and chance.random() < 0.5:
                await budget.settle(under_way.pop(chance.randrange(len(under_way))), answer())
            else:
                under_way.append(await budget.hold(QUESTION._replace(user="u" * chance.randrange(1, 3000))))
        for hold in under_way:
            await budget.settle(hold, answer())

    budget = Budget(Prices(9e5, 9e5), cap=None)
    asyncio.run(many(budget))
    assert budget.held == 0


def test_what_was_refused_is_free():
    async def once(budget: Budget) -> None:
        await budget.settle(await budget.hold(QUESTION), None)

    budget = Budget(PRICES, cap=0.01)
    asyncio.run(once(budget))
    assert (budget.spent, budget.held) == (0, 0)


def test_what_was_spent_before_counts():
    budget = Budget(PRICES, cap=0.01, spent=0.0099)
    with pytest.raises(BudgetReached, match=r"\$0\.0001 of \$0\.01 is left"):
        asyncio.run(budget.hold(QUESTION))


def test_without_prices_nothing_is_counted():
    async def many(budget: Budget) -> None:
        for _ in range(100):
            await budget.settle(await budget.hold(QUESTION), answer())

    budget = Budget()
    asyncio.run(many(budget))
    assert budget.spent == 0


@pytest.mark.parametrize("cap", [0.05, None])
def test_what_goes_out_is_noted_before_it_does_and_not_each_time(cap):
    noted: list[float] = []
    budget = Budget(PRICES, cap, spent=0.001, note=noted.append)

    async def worker(n: int) -> None:
        for _ in range(n):
            try:
                hold = await budget.hold(QUESTION)
            except BudgetReached:
                return
            assert noted[-1] >= budget.spent + budget.held, "a kill now forgets nothing"
            await asyncio.sleep(0)
            await budget.settle(hold, answer(250, 100), maybe_billed=True)

    async def many() -> None:
        await asyncio.gather(*(worker(40) for _ in range(4)))

    asyncio.run(many())
    assert noted == sorted(noted) and len(noted) < 40
    if cap is not None:
        assert budget.spent > cap * 0.95 and noted[-1] <= cap, "what is noted ahead is no more than there is"


def test_a_server_that_counts_more_than_it_may_is_noted_too():
    noted: list[float] = []

    async def once(budget: Budget) -> None:
        await budget.settle(await budget.hold(QUESTION), answer(1_000_000, 100))

    budget = Budget(PRICES, cap=0.01, note=noted.append)
    asyncio.run(once(budget))
    assert noted[-1] == budget.spent > 1


def test_an_answer_whose_words_were_not_counted_is_charged_with_all_that_it_may_have():
    async def once(budget: Budget, reply: Answer) -> float:
        await budget.settle(await budget.hold(QUESTION), reply)
        return budget.spent

    assert asyncio.run(once(Budget(PRICES), Answer("words", "", 250, 0))) == PRICES.usd(250, 100)
    assert asyncio.run(once(Budget(PRICES), Answer("", "", 250, 0))) == PRICES.usd(250, 0)
