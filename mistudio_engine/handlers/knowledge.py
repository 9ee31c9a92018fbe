"""What is known of an SAE's features, joined: its records, its current extraction, its logit effects, its labels.

Reads only, and never waits for the compute thread. Search rows, feature cards and exports are all made from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from mistudio_engine.api.errors import NotFound
from mistudio_engine.api.features import Example, FeatureCard, FeatureRow, Histogram, LogitToken, TopToken
from mistudio_engine.api.records import ExtractionRecord, LabelRecord, ModelRecord, SAERecord
from mistudio_engine.api.refs import FeatureKey
from mistudio_engine.discovery.extraction_store import DENSE_ABOVE, ExtractionStore, load_extraction
from mistudio_engine.discovery.logit_store import LogitReader, read_logits
from mistudio_engine.models.checkpoint import load_tokenizer
from mistudio_engine.models.vocabulary import token_strings
from mistudio_engine.runtime.engine import Engine

__all__ = ["DATA_FOLDER", "LOGITS_FILE", "Knowledge"]

DATA_FOLDER = "data"
LOGITS_FILE = "logits.safetensors"

INDEXED_TOKENS = 12
"""Top tokens of a feature that search looks at."""

INDEXED_EXAMPLES, INDEXED_WINDOW = 3, 6
"""Top examples that search looks at, and the tokens of them around the prime one."""


class Knowledge:
    """What is known of the features of one SAE. Use it in a `with` block."""

    def __init__(self, engine: Engine, sae: SAERecord) -> None:
        self.engine, self.sae = engine, sae
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @classmethod
    def of(cls, engine: Engine, slug: str) -> Self:
        """Of the SAE with this slug; NotFound without one."""
        return cls(engine, engine.store.get(SAERecord, slug))

    @cached_property
    def record(self) -> ExtractionRecord:
        """The current extraction.

        Raises:
            NotFound: there is none yet.
        """
        if self.sae.extraction is None:
            raise NotFound(
                f"The features of {self.sae.ref} have not been extracted.",
                fix="Run extract first.",
                next_call=("extract", {"sae": self.sae.slug}),
            )
        return self.engine.store.get(ExtractionRecord, self.sae.extraction)

    @cached_property
    def extraction(self) -> ExtractionStore:
        """Its data."""
        return load_extraction(self.folder / DATA_FOLDER)

    @property
    def folder(self) -> Path:
        """Where the current extraction lies."""
        return self.engine.home / self.record.folder

    @cached_property
    def labels(self) -> dict[int, LabelRecord]:
        """Every feature's current label."""
        return self.engine.store.labels(self.sae.slug)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the model that the extraction was made with."""
        return load_tokenizer(self.engine.home / self.engine.store.get(ModelRecord, self.record.model).folder)

    @cached_property
    def logits(self) -> LogitReader | None:
        """Logit effects; None where the SAE does not write into the residual stream."""
        path = self.folder / LOGITS_FILE
        return self._open.enter_context(read_logits(path)) if path.exists() else None

    def check_index(self, index: int) -> None:
        """Refuse a feature that the SAE does not have."""
        if not 0 <= index < self.sae.d_sae:
            raise NotFound(
                f"{self.sae.ref} has no feature {index}.",
                why=f"It has {self.sae.d_sae} features, 0 to {self.sae.d_sae - 1}.",
                fix="Use an index below that; search_features lists them.",
                next_call=("search_features", {"sae": self.sae.slug}),
            )

    def strings(self, ids: Any) -> list[str]:
        """Tokens as a person reads them."""
        return token_strings(self.tokenizer, [int(each) for each in ids])

    def row(self, index: int, **matched: Any) -> FeatureRow:
        """A feature in a list."""
        stats = self.extraction.feature(index)
        label = self.labels.get(index)
        key = FeatureKey(self.sae.slug, index)
        return FeatureRow(
            ref=key.ref,
            id=key.id,
            sae=self.sae.slug,
            index=index,
            label=label.label if label else None,
            category=label.category if label else None,
            confidence=label.confidence if label else None,
            activation_frequency=stats.frequency,
            max_activation=stats.max,
            mean_activation=stats.mean,
            **matched,
        )

    def top_tokens(self, index: int, n: int) -> list[TopToken]:
        """Tokens on which a feature fires most often."""
        found = self.extraction.top_tokens(index, n=n)
        strings = self.strings(each.token_id for each in found)
        return [
            TopToken(
                token=string,
                token_id=each.token_id,
                count=each.count,
                mean_activation=each.mean,
                max_activation=each.max,
            )
            for string, each in zip(strings, found, strict=True)
        ]

    def histogram(self, index: int, bins: int) -> Histogram:
        """Activations above zero in linear bins."""
        found = self.extraction.histogram(index, bins)
        return Histogram(bin_edges=[float(edge) for edge in found.edges], counts=[int(count) for count in found.counts])

    def logit_tokens(self, index: int, k: int) -> tuple[list[LogitToken], list[LogitToken]] | None:
        """The tokens that a feature promotes and suppresses most, strongest first."""
        if self.logits is None:
            return None
        # The file has a row for each feature of the extraction, which may be a selection.
        effects = self.logits.feature(int(np.searchsorted(self.extraction.indices, index)), k)
        return (
            self._logit_tokens(effects.promoted_ids, effects.promoted_values),
            self._logit_tokens(effects.suppressed_ids, effects.suppressed_values),
        )

    def _logit_tokens(self, ids: Any, values: Any) -> list[LogitToken]:
        rows = zip(self.strings(ids), ids, values, strict=True)
        return [LogitToken(token=string, token_id=int(each), value=float(value)) for string, each, value in rows]

    def examples(self, index: int, group: Any, n: int, window: int) -> list[Example]:
        """At most n examples of each group, with `window` tokens around the prime one."""
        shown: list[Example] = []
        seen: dict[str, int] = {}
        for each in self.extraction.examples(index, group, window=window):
            seen[each.group] = seen.get(each.group, 0) + 1
            if seen[each.group] > n:
                continue
            shown.append(
                Example(
                    group=each.group,
                    tokens=self.strings(each.token_ids),
                    values=[float(value) for value in each.values],
                    position=each.prime,
                    value=each.value,
                    context=each.context,
                    position_in_context=each.position,
                )
            )
        return shown

    def card(self, index: int, *, n: int, sampling: str, window: int, bins: int) -> FeatureCard:
        """All that is known of one feature; what only an extraction knows is None before there is one."""
        self.check_index(index)
        key = FeatureKey(self.sae.slug, index)
        history = self.engine.store.label_history(self.sae.slug, index)
        if self.sae.extraction is None:
            label = history[0] if history else None
            return FeatureCard(
                ref=key.ref,
                id=key.id,
                sae=self.sae.slug,
                index=index,
                label=label.label if label else None,
                category=label.category if label else None,
                labels=history,
            )
        stats = self.extraction.feature(index)
        logits = self.logit_tokens(index, 20)
        return FeatureCard(
            **self.row(index).model_dump(),
            extraction=self.record.slug,
            n_tokens=self.record.n_tokens,
            dead=stats.dead,
            dense=stats.dense,
            statistics={
                "activation_frequency": stats.frequency,
                "max_activation": stats.max,
                "mean_activation": stats.mean,
                "n_active": float(stats.n_active),
            },
            histogram=None if stats.dead else self.histogram(index, bins),
            top_tokens=self.top_tokens(index, 50),
            promoted=logits[0] if logits else None,
            suppressed=logits[1] if logits else None,
            examples=self.examples(index, None if sampling == "all" else sampling, n, window),
            labels=history,
        )

    def search_row(self, index: int) -> dict[str, Any]:
        """What the search index holds of a feature, without its vectors."""
        stats = self.extraction.feature(index)
        label = self.labels.get(index)
        tokens = [each.token.strip() for each in self.top_tokens(index, INDEXED_TOKENS)]
        examples = self.extraction.examples(index, "top", window=INDEXED_WINDOW)[:INDEXED_EXAMPLES]
        texts = ["".join(self.strings(each.token_ids)).strip() for each in examples]
        return {
            "id": FeatureKey(self.sae.slug, index).id,
            "sae": self.sae.slug,
            "index": index,
            "label": label.label if label else "",
            "category": label.category if label else "",
            "text": " ".join(token for token in dict.fromkeys(tokens) if token),
            "example_text": " … ".join(texts),
            "frequency": stats.frequency,
            "max_activation": stats.max,
            "dense": stats.dense,
        }

    def alive(self) -> Iterator[int]:
        """Indices of the features that fired at least once."""
        yield from (int(index) for index in self.extraction.indices[self.extraction.n_active > 0])

    def listed(self, include_dense: bool) -> list[int]:
        """Living features, those that fire most often first."""
        frequency = self.extraction.frequency
        shown = frequency > 0 if include_dense else (frequency > 0) & (frequency <= DENSE_ABOVE)
        order = np.lexsort((self.extraction.indices, -frequency))
        return [int(self.extraction.indices[row]) for row in order if shown[row]]

    def hidden(self, include_dense: bool) -> dict[str, int]:
        """How many features a list leaves out, and why."""
        counts = {"dead": self.record.n_features - self.record.n_alive}
        if not include_dense:
            counts["dense"] = self.record.n_dense
        return {reason: count for reason, count in counts.items() if count}
