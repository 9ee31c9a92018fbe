"""What a job may have spent on a language model, written down before it is spent, so that no kill makes it forgotten.

It is kept in the job's events (`spent`, with US dollars of all attempts together): the newest counts. While requests
are under way it is ahead of what they have cost, and once they are back it is exact; after a kill it stays ahead. It
does not know what is asked.
"""

from __future__ import annotations

from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext

__all__ = ["Ledger"]


class Ledger:
    """What one job has spent.

    Attributes:
        usd: US dollars, as was last written; 0 at the beginning.
    """

    def __init__(self, engine: Engine, context: JobContext) -> None:
        self._publish, self._channel = context.publish, f"jobs/{context.job.slug}"
        newest = engine.store.events_after(0, [self._channel], 1, names=["spent"], newest_first=True)
        self.usd: float = newest[0].data["usd"] if newest else 0.0

    def write(self, usd: float) -> None:
        """So much may have been spent; it is on the disk when this returns. From any thread."""
        if usd != self.usd:
            self._publish(self._channel, "spent", {"usd": usd})
            self.usd = usd
