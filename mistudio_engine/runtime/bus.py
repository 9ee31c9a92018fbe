"""The event log: everybody publishes here, and whoever follows sees durable events without a gap and without a double.

Durable events (states, metrics, labels) are rows of the store with a sequence number; transient ones (generated tokens,
system samples) live in a short ring per channel and carry the number of the last durable event before them. It does not
know what events mean, nor how they reach a client.

Threads: publish and read from any thread. Lock order: the store's, then the bus's; a listener is called with both held,
so it only puts the event into its queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import from_json, to_json

from mistudio_engine.api.events import Event
from mistudio_engine.runtime.store import NewEvent, Store

__all__ = ["Bus", "Subscription"]

RING_EVENTS = 256
"""Transient events kept per channel: eight minutes of a sample every 2 s."""

RING_CHANNELS = 256
"""Channels that have a ring; the one that has been silent longest gives up its own."""

QUEUE_EVENTS = 2000
"""Events that may wait for one subscriber before it is closed as too slow."""

PAGE_EVENTS = 500
"""Events read at once while a subscriber catches up."""

UNLIMITED = 2**31


class _Entry(NamedTuple):
    """An event in memory; `ordinal` numbers the transient ones, durable ones have 0."""

    ordinal: int
    event: Event


class Bus:
    """The event log of one engine.

    `epoch` names the log: a sequence number from another epoch means nothing here. `seq` is the number of the latest
    durable event.
    """

    def __init__(self, store: Store, *, queue_events: int = QUEUE_EVENTS) -> None:
        self._store = store
        self._queue_events = queue_events
        self._lock = threading.Lock()
        self._rings: OrderedDict[str, deque[_Entry]] = OrderedDict()
        self._ordinal = 0
        self._subscriptions: set[Subscription] = set()
        self.epoch = store.epoch()
        self.seq = store.last_seq()
        store.listen(self._committed)

    def publish(self, channel: str, event: str, data: Mapping[str, Any], *, transient: bool = False) -> Event:
        """Adds an event to the log.

        A durable one is on the disk when this returns, or with the end of the surrounding `store.transaction()`;
        followers hear of it then. Numbers that JSON cannot carry become null.
        """
        if not transient:
            return self._store.append_events([NewEvent(channel, event, data)])[0]
        plain = from_json(to_json(data, inf_nan_mode="null"))
        with self._lock:
            self._ordinal += 1
            made = Event(seq=self.seq, at=time.time(), channel=channel, event=event, data=plain, transient=True)
            entry = _Entry(self._ordinal, made)
            self._rings.setdefault(channel, deque(maxlen=RING_EVENTS)).append(entry)
            self._rings.move_to_end(channel)
            if len(self._rings) > RING_CHANNELS:
                self._rings.popitem(last=False)
            self._offer([entry])
        return made

    def after(self, seq: int, channels: Sequence[str] | None = None, limit: int = 1000) -> list[Event]:
        """Events after number `seq`, oldest first: at most `limit` durable ones, with the transient ones between them.

        `channels` names channels, or all below one as `trainings/*`; None means every one. Go on from the largest
        number that came. Transient events that follow `seq` itself are included, as far as memory reaches; somebody
        who saw them already sees them again.
        """
        return [entry.event for entry in self._read(seq, channels, limit)]

    def subscribe(self, channels: Sequence[str] | None = None, after: int | None = None) -> Subscription:
        """Follows channels (as in `after`) from number `after` on, or from now; to be called in an asyncio loop."""
        subscription = Subscription(self, channels, after)
        if after is None:
            self._add(subscription)
        return subscription

    def close(self) -> None:
        """Ends every subscription, from any thread; those who follow see the end of their iteration."""
        with self._lock:
            for subscription in self._subscriptions:
                subscription.reason = subscription.reason or "closed"
                with contextlib.suppress(RuntimeError):  # its loop has been closed before
                    subscription._loop.call_soon_threadsafe(subscription._wake.set)
            self._subscriptions.clear()

    @property
    def n_subscribers(self) -> int:
        """How many follow at the moment."""
        with self._lock:
            return len(self._subscriptions)

    def _read(self, seq: int, channels: Sequence[str] | None, limit: int) -> list[_Entry]:
        # The ring first: a durable event that is committed in between then comes too late to be left out by `end`.
        with self._lock:
            rings = [list(ring) for channel, ring in self._rings.items() if _matches(channel, channels)]
        durable = self._store.events_after(seq, channels, limit)
        end = durable[-1].seq if len(durable) == limit else None  # what follows belongs to the next page
        transient = [
            entry
            for ring in rings
            for entry in ring
            if entry.event.seq >= seq and (end is None or entry.event.seq < end)
        ]
        entries = [_Entry(0, event) for event in durable] + transient
        return sorted(entries, key=lambda entry: (entry.event.seq, entry.ordinal))

    def _committed(self, events: list[Event]) -> None:
        with self._lock:
            self.seq = events[-1].seq
            self._offer([_Entry(0, event) for event in events])

    def _offer(self, entries: list[_Entry]) -> None:
        for subscription in list(self._subscriptions):
            if not subscription._take(entries):
                self._subscriptions.discard(subscription)

    def _add(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions.add(subscription)

    def _remove(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions.discard(subscription)


class Subscription:
    """An async iterator of events: first what was missed, then what comes.

    At most `QUEUE_EVENTS` wait for a slow reader; then the iteration ends with `reason` "overflow", and the reader
    subscribes again after the last number that it saw. Use it in `async with`, or call `close`.
    """

    def __init__(self, bus: Bus, channels: Sequence[str] | None, after: int | None) -> None:
        self.reason: str | None = None
        """Why it ended: "closed" or "overflow"; None while it goes on."""
        self._bus = bus
        self._channels = channels
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._queue: deque[_Entry] = deque()  # shared between threads; guarded by the bus's lock
        self._past: deque[_Entry] = deque()
        # A number from the future (of a log that was deleted) must not swallow the events to come.
        self._seq = bus.seq if after is None else min(after, bus.seq)
        self._ordinal = 0
        self._live = after is None

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        while True:
            while self._past:
                entry = self._past.popleft()
                if self._is_new(entry):
                    return entry.event
            if self.reason is not None:
                raise StopAsyncIteration
            if not self._live:
                await self._catch_up()
                continue
            self._wake.clear()
            with self._bus._lock:
                self._past.extend(self._queue)
                self._queue.clear()
            if not self._past and self.reason is None:
                await self._wake.wait()

    async def _catch_up(self) -> None:
        """Reads one more page of the past; after a short one joins the living, and then reads once more.

        Whatever was committed before joining is in that last page, whatever comes after is in the queue, and what is in
        both is recognised by its number.
        """
        page = await asyncio.to_thread(self._bus._read, self._seq, self._channels, PAGE_EVENTS)
        if sum(entry.ordinal == 0 for entry in page) < PAGE_EVENTS:
            self._bus._add(self)
            page = await asyncio.to_thread(self._bus._read, self._seq, self._channels, UNLIMITED)
            self._live = True
        self._past.extend(page)

    def _is_new(self, entry: _Entry) -> bool:
        if entry.ordinal:
            new = entry.ordinal > self._ordinal
            self._ordinal = max(self._ordinal, entry.ordinal)
        else:
            new = entry.event.seq > self._seq
            self._seq = max(self._seq, entry.event.seq)
        return new

    def _take(self, entries: list[_Entry]) -> bool:
        """Puts new events into the queue; called on any thread with the bus's lock held. False when it has ended."""
        wanted = [entry for entry in entries if _matches(entry.event.channel, self._channels)]
        if not wanted:
            return True
        if len(self._queue) + len(wanted) > self._bus._queue_events:
            self.reason = "overflow"
            self._queue.clear()
        else:
            self._queue.extend(wanted)
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # its loop has been closed: nobody will read this
            self.reason = "closed"
        return self.reason is None

    def close(self) -> None:
        """Ends it; a reader that waits stops iterating."""
        self.reason = self.reason or "closed"
        self._bus._remove(self)
        self._past.clear()
        self._wake.set()

    async def __aenter__(self) -> Subscription:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def _matches(channel: str, channels: Sequence[str] | None) -> bool:
    """Is the channel one of these? `trainings/*` stands for all that begin with `trainings/`."""
    if channels is None:
        return True
    return any(channel.startswith(each[:-1]) if each.endswith("*") else channel == each for each in channels)
