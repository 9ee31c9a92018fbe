"""What a call leaves open, as it was settled when it was submitted: from which extraction, by which language model, at
what price.

It is settled with the plan, so that a dry run shows it and the job keeps it (`Job.settled`): whatever is set or
extracted meanwhile, a job costs what was agreed to, and is of one extraction. A retry settles anew. It holds no key.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from mistudio_engine.api.errors import Conflict
from mistudio_engine.api.operations.labels import LabelFeatures
from mistudio_engine.api.operations.scores import ScoreLabels
from mistudio_engine.api.records import ExtractionRecord, SAERecord
from mistudio_engine.handlers.chats import Connection, connection, keys_fit, still_allowed
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.settings import setting
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.jobs import JobContext

__all__ = ["Settled", "settle", "settled"]


class Settled(NamedTuple):
    """What a call left open."""

    extraction: str
    """Slug of the extraction that it works from."""

    sha256: str
    """Of its data: another one may take its name."""

    to: Connection | None
    """Whom it asks; None where that is no language model."""

    def as_data(self) -> dict[str, Any]:
        """As of `Job.settled`."""
        asked = {"provider": "token_pattern"} if self.to is None else self.to.as_data()
        return {"extraction": self.extraction, "extraction_sha256": self.sha256, **asked}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Self:
        """From what `as_data` gave."""
        to = None if data["provider"] == "token_pattern" else Connection.from_data(data)
        return cls(data["extraction"], data["extraction_sha256"], to)

    def knowledge(self, engine: Engine, sae: str) -> Knowledge:
        """What is known of the SAE's features from this extraction, be it the current one or not.

        Raises:
            Conflict: it was deleted meanwhile.
        """
        found = engine.store.all(ExtractionRecord, sae=sae)
        if not any((each.slug, each.sha256) == (self.extraction, self.sha256) for each in found):
            raise Conflict(
                f"extraction/{self.extraction}, which this job works from, has been deleted.",
                fix="Retry the job for the SAE's current extraction, or extract first where it has none.",
            )
        return Knowledge(engine, engine.store.get(SAERecord, sae).model_copy(update={"extraction": self.extraction}))


def settle(operation: LabelFeatures | ScoreLabels, engine: Engine, known: Knowledge) -> Settled:
    """What holds for a call now: what it says itself, else what is set.

    Raises:
        NotFound: nothing was extracted.
        BadInput, Unsupported: as of `connection`.
    """
    provider = operation.provider or setting(engine, "labelling_provider")
    to = None if provider == "token_pattern" else connection(operation, engine, provider)
    return Settled(known.record.slug, known.record.sha256, to)


def settled(operation: LabelFeatures | ScoreLabels, engine: Engine, context: JobContext) -> Settled:
    """What its job keeps to; a retried job settles it here.

    Raises:
        NotFound, BadInput: as of `settle`, for a retried job.
        BadInput, Unsupported: the key is gone, or the engine is offline now.
        Conflict: as of `keys_fit`.
    """
    if context.job.settled:
        found = Settled.from_data(context.job.settled)
        if found.to is not None:
            still_allowed(engine, found.to)
            if operation.base_url is None:
                keys_fit(engine, found.to)
        return found
    with Knowledge.of(engine, operation.sae) as known:
        found = settle(operation, engine, known)
    engine.jobs.settle(context.job.slug, found.as_data())
    return found
