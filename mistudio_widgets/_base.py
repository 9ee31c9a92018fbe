"""What every widget is built on: its built files, and trait updates that the notebook's wire can carry.

A kernel's output channel drops messages beyond 1000 a second, the last one included, so a widget never sets its synced
traits from where things happen: it hands values to a `Publisher`, which sends the newest of each at most ten times a
second, all from one thread. This file knows neither jobs nor the engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget

__all__ = ["PULSE_SECONDS", "SENDS_PER_SECOND", "Publisher", "Widget"]

SENDS_PER_SECOND = 10.0

PULSE_SECONDS = 2.0
"""A live widget says at least this often that its kernel is there; the browser waits for three pulses, then looks for
another way to the engine."""

FAREWELLS = 2
"""How often the last state is repeated: in a flood of messages one may be lost, and nothing else would correct it."""

STATIC = Path(__file__).parent / "static"


class Publisher:
    """Sends what it was given last, at most ten times a second; pulses between two states, is still after the last.

    Args:
        send: called from the publisher's thread, never twice at a time, with the newest value of each name and a
            `pulse` that counts up.
        name: of the thread.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None], *, name: str) -> None:
        self._send = send
        self._values: dict[str, Any] = {}
        self._changed = threading.Condition()
        self._fresh = self._closing = False
        self._repeats: float = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, **values: Any) -> None:
        """Send these soon, and pulse from then on; a value that is put again before it was sent is never sent."""
        self._take(values, repeats=float("inf"))

    def settle(self, **values: Any) -> None:
        """Send these as the last state for now: repeated twice, in case a message is lost, then nothing more."""
        self._take(values, repeats=FAREWELLS)

    def close(self) -> None:
        """Send what is still to be sent, once, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end after `close`; False when that takes longer than `timeout` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _take(self, values: dict[str, Any], *, repeats: float) -> None:
        with self._changed:
            self._values.update(values)
            self._fresh, self._repeats = True, repeats
            self._changed.notify()

    def _run(self) -> None:
        pulse, sent_at = 0, float("-inf")
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._fresh or self._closing, timeout=PULSE_SECONDS if self._repeats else None
                )
                if self._closing and not self._fresh:
                    return
            time.sleep(max(0.0, sent_at + 1.0 / SENDS_PER_SECOND - time.monotonic()))  # more may come meanwhile
            with self._changed:
                values = dict(self._values)
                if not self._fresh:
                    self._repeats -= 1
                self._fresh = False
            pulse, sent_at = pulse + 1, time.monotonic()
            self._send({**values, "pulse": pulse})


class Widget(anywidget.AnyWidget):
    """Base of the widgets; the class keyword `front_end="job_progress"` names `static/job_progress.js` and `.css`.

    The files are built by `npm run build` from `js/` and belong to the package; nothing is loaded from elsewhere.
    """

    def __init_subclass__(cls, *, front_end: str | None = None, **keywords: Any) -> None:
        if front_end is not None:  # else it is that of its base
            cls._esm = STATIC / f"{front_end}.js"
            cls._css = STATIC / f"{front_end}.css"
        super().__init_subclass__(**keywords)
