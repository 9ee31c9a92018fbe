"""What is known of an SAE's features, joined: its records, its current extraction, its logit effects, its labels.

Reads only, and never waits for the compute thread. Search rows, feature cards and exports are all made from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mistudio_engine.api.errors import NotFound
from mistudio_engine.api.feature_card import FeatureCard
from mistudio_engine.api.features import Example, FeatureRow, Histogram, LogitToken, Partner, TopToken
from mistudio_engine.api.records import ExtractionRecord, LabelRecord, ModelRecord, SAERecord
from mistudio_engine.api.refs import FeatureKey
from mistudio_engine.discovery.extraction_store import DENSE_ABOVE, ExtractionStore, load_extraction
from mistudio_engine.discovery.extraction_store import Example as StoredExample
from mistudio_engine.discovery.logit_store import LogitReader, read_logits
from mistudio_engine.discovery.words import WordReader
from mistudio_engine.models.checkpoint import load_tokenizer
from mistudio_engine.models.vocabulary import special_ids, token_strings
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.store import Store

__all__ = ["DATA_FOLDER", "DERIVED_FOLDER", "INTERPRETABILITY_FILE", "LOGITS_FILE", "Knowledge"]

DATA_FOLDER = "data"
LOGITS_FILE = "logits.safetensors"
INTERPRETABILITY_FILE = "interpretability.parquet"

DERIVED_FOLDER = "derived"
"""Beside the extraction's own files: what is made of it later."""

WINDOW = 12
"""Tokens shown around the prime one where the extraction does not say."""


class Labels(Mapping[int, LabelRecord]):
    """The labels of one SAE that count, by feature index, each as it was when it was first looked at.

    Of those that are asked for by index only these are read: all of a large dictionary, with their scores, fill a
    gigabyte. Whoever goes through them reads them all.
    """

    def __init__(self, store: Store, sae: str) -> None:
        self._store, self._sae = store, sae
        self._read: dict[int, LabelRecord | None] = {}
        self._has_all = False

    def __getitem__(self, index: int) -> LabelRecord:
        if index not in self._read and not self._has_all:
            self._read[index] = self._store.label(self._sae, index)
        if (label := self._read.get(index)) is None:
            raise KeyError(index)
        return label

    def __iter__(self) -> Iterator[int]:
        if not self._has_all:
            self._read = {**self._store.labels(self._sae), **self._read}
            self._has_all = True
        return (index for index, label in self._read.items() if label is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


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

    @property
    def window(self) -> int:
        """Tokens that are shown around the prime one unless somebody says how many."""
        return int(self.record.settings.get("window", WINDOW))

    @cached_property
    def interpretability(self) -> NDArray[np.float64]:
        """(n_features,) how well the text alone tells where each feature fires; NaN where it is not known."""
        path = self.folder / INTERPRETABILITY_FILE
        if not path.exists():  # of an older version
            return np.full(len(self.extraction), np.nan)
        return pq.read_table(path, columns=["score"]).column(0).to_numpy()

    @cached_property
    def labels(self) -> Labels:
        """Every feature's current label."""
        return Labels(self.engine.store, self.sae.slug)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the model that the extraction was made with."""
        return load_tokenizer(self.engine.home / self.engine.store.get(ModelRecord, self.record.model).folder)

    @cached_property
    def uncounted_ids(self) -> frozenset[int]:
        """Tokens that say nothing of where a feature fires: special ones, and those that the extraction left out."""
        return special_ids(self.tokenizer) | frozenset(self.record.settings.get("exclude_token_ids", ()))

    @cached_property
    def words(self) -> WordReader:
        """Puts tokens together to words."""
        return WordReader(self.tokenizer)

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

    def at(self, index: int) -> int:
        """Row of a feature in everything that has a row for each feature of the extraction."""
        return int(np.searchsorted(self.extraction.indices, index))

    def interpretability_of(self, index: int) -> float | None:
        """Of one feature of the extraction."""
        score = float(self.interpretability[self.at(index)])
        return None if math.isnan(score) else score

    def named(self, index: int) -> FeatureRow:
        """A feature with its label, and nothing that only an extraction knows."""
        label, key = self.labels.get(index), FeatureKey(self.sae.slug, index)
        return FeatureRow(
            ref=key.ref,
            id=key.id,
            sae=self.sae.slug,
            index=index,
            label=label.label if label else None,
            category=label.category if label else None,
            confidence=label.confidence if label else None,
        )

    def row(self, index: int) -> FeatureRow:
        """A feature in a list; NotFound where the extraction does not cover it."""
        stats = self.extraction.feature(index)
        known = {
            "activation_frequency": stats.frequency,
            "max_activation": stats.max,
            "mean_activation": stats.mean,
            "interpretability": self.interpretability_of(index),
        }
        return self.named(index).model_copy(update=known)

    def row_of_any(self, index: int) -> FeatureRow:
        """A feature in a list with what is known of it, be it only its name."""
        covered = self.sae.extraction is not None and index in self.extraction.indices
        return self.row(index) if covered else self.named(index)

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
        effects = self.logits.feature(self.at(index), k)
        return (
            self._logit_tokens(effects.promoted_ids, effects.promoted_values),
            self._logit_tokens(effects.suppressed_ids, effects.suppressed_values),
        )

    def _logit_tokens(self, ids: Any, values: Any) -> list[LogitToken]:
        rows = zip(self.strings(ids), ids, values, strict=True)
        return [LogitToken(token=string, token_id=int(each), value=float(value)) for string, each, value in rows]

    def logit_histogram(self, index: int) -> Histogram | None:
        """How its effects on the logits are distributed over the vocabulary."""
        if self.logits is None:
            return None
        found = self.logits.distribution(self.at(index))
        return Histogram(
            bin_edges=[float(edge) for edge in found.bin_edges], counts=[int(each) for each in found.counts]
        )

    def partners(self, index: int, n: int) -> list[Partner] | None:
        """The features that fire together with it most; None where the extraction did not count them."""
        if self.extraction.info.format_version < 2:
            return None
        return [
            Partner(
                ref=FeatureKey(self.sae.slug, each.feature).ref,
                index=each.feature,
                label=label.label if (label := self.labels.get(each.feature)) else None,
                count=each.count,
                cosine=each.cosine,
                lift=each.lift,
            )
            for each in self.extraction.partners(index, n)
        ]

    def examples(self, index: int, group: Any, n: int, window: int | None) -> list[Example]:
        """At most n examples of each group, with `window` tokens around the prime one."""
        window = self.window if window is None else window
        shown: list[Example] = []
        seen: dict[str, int] = {}
        for each in self.extraction.examples(index, group, window=window):
            seen[each.group] = seen.get(each.group, 0) + 1
            if seen[each.group] > n:
                continue
            shown.append(self._example(each))
        return shown

    def _example(self, each: StoredExample) -> Example:
        read = self.words.read(each.token_ids)
        return Example(
            group=each.group,
            tokens=self.strings(each.token_ids),
            values=[float(value) for value in each.values],
            position=each.prime,
            value=each.value,
            words=[word.text for word in read.words],
            word=read.words[read.word_of[each.prime]].text,
            context=each.context,
            position_in_context=each.position,
        )

    def card(self, index: int, *, n: int, sampling: str, window: int | None, bins: int) -> FeatureCard:
        """All that is known of one feature; what only an extraction knows is None before there is one."""
        self.check_index(index)
        history = self.engine.store.label_history(self.sae.slug, index)
        if self.sae.extraction is None:
            return FeatureCard(**self.named(index).model_dump(), labels=history)
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
                # Only where there were more tokens than could be counted: how many a count may lack.
                **({"top_token_undercount": float(stats.undercount)} if stats.undercount else {}),
            },
            histogram=None if stats.dead else self.histogram(index, bins),
            top_tokens=self.top_tokens(index, 50),
            promoted=logits[0] if logits else None,
            suppressed=logits[1] if logits else None,
            logit_histogram=self.logit_histogram(index),
            partners=self.partners(index, 10),
            examples=self.examples(index, None if sampling == "all" else sampling, n, window),
            labels=history,
        )

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
