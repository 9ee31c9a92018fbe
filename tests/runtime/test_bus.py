"""Whoever follows the event log sees every durable event once and in order, however the threads interleave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mistudio_engine.api.events import Event
from mistudio_engine.runtime.bus import RING_CHANNELS, RING_EVENTS, Bus, Subscription
from mistudio_engine.runtime.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "mistudio.db") as store:
        yield store


@pytest.fixture
def bus(store: Store) -> Bus:
    return Bus(store)


async def take(subscription: Subscription, n: int) -> list[Event]:
    """The next `n` events, within 30 s."""
    async with asyncio.timeout(30):
        return [await anext(subscription) for _ in range(n)]


def names(events: list[Event]) -> list[str]:
    return [event.event for event in events]


def test_durable_events_survive_the_engine_and_keep_their_numbers(tmp_path: Path) -> None:
    with Store(tmp_path / "mistudio.db") as store:
        bus = Bus(store)
        assert [bus.publish("jobs/a", "metrics", {"n": n}).seq for n in range(3)] == [1, 2, 3]
        epoch = bus.epoch
    with Store(tmp_path / "mistudio.db") as store:
        bus = Bus(store)
        assert (bus.epoch, bus.seq) == (epoch, 3)
        assert [event.data for event in bus.after(1)] == [{"n": 1}, {"n": 2}]


def test_transient_events_stand_between_the_durable_ones_as_far_as_memory_reaches(bus: Bus, store: Store) -> None:
    bus.publish("jobs/a", "first", {})
    for n in range(RING_EVENTS + 10):
        bus.publish("steer/x", f"token {n}", {"p": float("inf")}, transient=True)
    bus.publish("jobs/a", "second", {})
    bus.publish("steer/x", "last token", {}, transient=True)
    seen = bus.after(0)
    assert names(seen) == ["first", *(f"token {n}" for n in range(11, RING_EVENTS + 10)), "second", "last token"]
    assert seen[1].transient and seen[1].seq == 1 and seen[1].data == {"p": None}
    assert seen[-1].seq == 2
    assert names(bus.after(1, ["jobs/*"])) == ["second"]
    assert names(Bus(store).after(0)) == ["first", "second"]


def test_pages_of_the_log_join_without_gap_or_double(bus: Bus) -> None:
    for n in range(10):
        bus.publish("a", f"durable {n}", {})
        bus.publish("a", f"transient {n}", {}, transient=True)
    seen: list[Event] = []
    n_durable = 3
    while n_durable == 3:
        page = bus.after(seen[-1].seq if seen else 0, limit=3)
        n_durable = sum(not event.transient for event in page)
        seen += page
    assert names(seen) == [f"{kind} {n}" for n in range(10) for kind in ("durable", "transient")]


def test_silent_channels_give_up_their_ring_first(bus: Bus) -> None:
    for n in range(RING_CHANNELS + 1):
        bus.publish(f"steer/{n}", "token", {}, transient=True)
    assert bus.after(0, ["steer/0"]) == []
    assert len(bus.after(0)) == RING_CHANNELS


def test_events_of_a_transaction_are_heard_of_after_its_commit(bus: Bus, store: Store) -> None:
    async def follow() -> list[Event]:
        async with bus.subscribe(["a"]) as events:
            with pytest.raises(ZeroDivisionError), store.transaction():
                bus.publish("a", "never was", {})
                raise ZeroDivisionError
            with store.transaction():
                bus.publish("a", "one", {})
                assert bus.seq == 0
                bus.publish("a", "two", {})
            return await take(events, 2)

    seen = asyncio.run(follow())
    assert [(event.seq, event.event) for event in seen] == [(1, "one"), (2, "two")]


def test_a_follower_gets_the_past_and_then_what_comes_of_its_channels_only(bus: Bus) -> None:
    async def follow() -> list[Event]:
        async with bus.subscribe(["trainings/*"], after=1) as events:
            past = await take(events, 2)
            bus.publish("jobs/x", "other", {})
            bus.publish("trainings/b", "four", {})
            bus.publish("trainings/b", "five", {}, transient=True)
            return past + await take(events, 2)

    for channel, name in [("trainings/a", "one"), ("trainings/a", "two"), ("jobs/x", "no"), ("trainings/b", "three")]:
        bus.publish(channel, name, {})
    assert names(asyncio.run(follow())) == ["two", "three", "four", "five"]


def test_a_follower_without_a_number_begins_now(bus: Bus) -> None:
    async def follow() -> list[Event]:
        events = bus.subscribe()
        bus.publish("a", "new", {})
        return await take(events, 1)

    bus.publish("a", "old", {})
    assert names(asyncio.run(follow())) == ["new"]


def test_a_number_from_a_log_that_is_gone_swallows_nothing(bus: Bus) -> None:
    async def follow() -> list[Event]:
        async with bus.subscribe(after=1000) as events:
            waiting = asyncio.create_task(take(events, 1))
            while not bus.n_subscribers:
                await asyncio.sleep(0)
            bus.publish("a", "new", {})
            return await waiting

    assert names(asyncio.run(follow())) == ["new"]


def test_followers_that_join_while_threads_publish_miss_nothing_and_see_nothing_twice(bus: Bus) -> None:
    n_threads, n_events, n_followers = 4, 150, 6
    half_way = [threading.Event() for _ in range(n_followers)]

    def publish(thread: int) -> None:
        for n in range(n_events):
            bus.publish(f"jobs/{thread}", "metrics", {"thread": thread, "n": n})
            bus.publish(f"jobs/{thread}", "sample", {}, transient=True)
            half_way[n * n_followers // n_events].set()

    async def follow(number: int) -> list[Event]:
        await asyncio.to_thread(half_way[number].wait, 30)
        seen: list[Event] = []
        async with asyncio.timeout(60), bus.subscribe(["jobs/*"], after=number * 10) as events:
            async for event in events:
                seen.append(event)
                if event.seq == n_threads * n_events:
                    break
        return seen

    async def everybody() -> list[list[Event]]:
        return await asyncio.gather(*(follow(number) for number in range(n_followers)))

    with ThreadPoolExecutor(n_threads) as pool:
        published = [pool.submit(publish, thread) for thread in range(n_threads)]
        followed = asyncio.run(everybody())
        for each in published:
            each.result(30)
    for number, seen in enumerate(followed):
        durable = [event.seq for event in seen if not event.transient]
        assert durable == list(range(number * 10 + 1, n_threads * n_events + 1))
    assert bus.n_subscribers == 0


def test_a_long_past_is_replayed_in_pages(bus: Bus, store: Store) -> None:
    async def follow() -> list[Event]:
        async with bus.subscribe(after=0) as events:
            return await take(events, 1201)

    with store.transaction():
        for n in range(1201):
            bus.publish("a", "metrics", {"n": n})
    assert [event.data["n"] for event in asyncio.run(follow())] == list(range(1201))


def test_a_follower_that_does_not_keep_up_is_closed_and_can_come_back(store: Store) -> None:
    bus = Bus(store, queue_events=5)

    async def follow() -> tuple[list[Event], str | None]:
        seen = []
        events = bus.subscribe()
        bus.publish("a", "0", {})
        seen += await take(events, 1)
        with store.transaction():
            for n in range(1, 7):
                bus.publish("a", str(n), {})
        async for event in events:
            seen.append(event)
        async with bus.subscribe(after=seen[-1].seq) as again:
            seen += await take(again, 6)
        return seen, events.reason

    seen, reason = asyncio.run(follow())
    assert reason == "overflow"
    assert names(seen) == [str(n) for n in range(7)]
    assert bus.n_subscribers == 0


def test_closing_ends_a_waiting_reader(bus: Bus) -> None:
    async def follow() -> str | None:
        events = bus.subscribe()
        reader = asyncio.create_task(take(events, 1))
        await asyncio.sleep(0)
        events.close()
        with pytest.raises(StopAsyncIteration):
            try:
                await reader
            except RuntimeError as error:  # a coroutine may not raise StopAsyncIteration itself
                raise error.__cause__ or error from None
        return events.reason

    assert asyncio.run(follow()) == "closed"
    assert bus.n_subscribers == 0


def test_a_follower_whose_loop_is_gone_is_forgotten(bus: Bus) -> None:
    async def leave() -> None:
        bus.subscribe()

    asyncio.run(leave())
    assert bus.n_subscribers == 1
    bus.publish("a", "x", {})
    assert bus.n_subscribers == 0
