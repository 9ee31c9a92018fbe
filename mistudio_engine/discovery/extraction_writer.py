"""The files that an extraction makes of its totals, some features at a time.

extraction_store.py says what is in the files and reads them. This one knows neither the model nor the SAE, nor how the
folder gets its final name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mistudio_engine.discovery.activation_block import rank_in_run
from mistudio_engine.discovery.coactivation import strongest
from mistudio_engine.discovery.context_store import writing_contexts
from mistudio_engine.discovery.examples import Chosen, joined
from mistudio_engine.discovery.extraction_store import CONTEXTS_FILE, EXAMPLES_FILE, FEATURES_FILE
from mistudio_engine.discovery.histogram import N_LOG_BINS
from mistudio_engine.discovery.top_tokens import TokenTable, best_tokens
from mistudio_engine.discovery.totals import FeatureTotals

if TYPE_CHECKING:
    from mistudio_engine.models.tokens import PackedTokens

__all__ = ["ExtractionWriter"]

_FEATURES_PER_PART = 128
"""Features in a row group: one is read when one feature is looked at."""


class ExtractionWriter:
    """Writes the files of an extraction, some features at a time."""

    def __init__(
        self,
        folder: Path,
        tokens: PackedTokens,
        selection: NDArray[np.int64],
        totals: FeatureTotals,
        n_quantiles: int,
        n_per_quantile: int,
        n_top_tokens: int,
        n_partners: int,
    ) -> None:
        self.folder, self.tokens, self.selection, self.totals = folder, tokens, selection, totals
        self.n_quantiles, self.n_per_quantile, self.n_top_tokens = n_quantiles, n_per_quantile, n_top_tokens
        self.n_partners = n_partners
        self.n_real = tokens.n_real.numpy()

    def write(self) -> Iterator[float]:
        """Yields the share that is done."""
        table = self.totals.top_tokens.table()
        yield 0.0
        together = self.totals.coactivation.matrix()
        n_sampled = self.totals.coactivation.n_active
        n = len(self.selection)
        used = np.zeros(len(self.tokens), dtype=bool)
        to_features = to_examples = None
        try:
            for start in range(0, n, _FEATURES_PER_PART):
                features = slice(start, min(start + _FEATURES_PER_PART, n))
                examples, contexts, n_examples = self._examples(features)
                used[contexts] = True
                rows = self._features(features, table, n_examples)
                partners = strongest(together, n_sampled, features, self.n_partners)
                of_feature = np.searchsorted(partners.feature, np.arange(features.start, features.stop + 1))
                for name, column in {
                    "n_sampled": pa.array(n_sampled[features]),
                    "partners": _lists(of_feature, self.selection[partners.partner].astype(np.int32)),
                    "partner_counts": _lists(of_feature, partners.count),
                }.items():
                    rows = rows.append_column(name, column)
                if to_features is None or to_examples is None:
                    to_features = pq.ParquetWriter(self.folder / FEATURES_FILE, rows.schema, compression="zstd")
                    to_examples = pq.ParquetWriter(self.folder / EXAMPLES_FILE, examples.schema, compression="zstd")
                to_features.write_table(rows)
                to_examples.write_table(examples)
                yield features.stop / n
        finally:
            for writer in (to_features, to_examples):
                if writer is not None:
                    writer.close()
        contexts = np.flatnonzero(used)
        for _ in writing_contexts(self.folder / CONTEXTS_FILE, contexts, self.tokens.ids.numpy(), self.n_real):
            yield 1.0

    def _features(self, features: slice, table: TokenTable, n_examples: NDArray[np.int64]) -> pa.Table:
        totals = self.totals
        n_active, total = totals.n_active[features], totals.sum[features]
        counts = totals.histograms.counts[features]
        filled = counts > 0
        first = filled.argmax(axis=1)
        length = np.where(filled.any(axis=1), N_LOG_BINS - filled[:, ::-1].argmax(axis=1) - first, 0)
        bins = np.arange(N_LOG_BINS)
        inside = (bins >= first[:, None]) & (bins < (first + length)[:, None])
        begin, end = np.searchsorted(table.feature, (features.start, features.stop))
        best = best_tokens(table.rows(slice(begin, end)), self.n_top_tokens)
        of_feature = np.searchsorted(best.feature, np.arange(features.start, features.stop + 1))
        return pa.table(
            {
                "feature": self.selection[features].astype(np.int32),
                "n_active": n_active,
                "frequency": n_active / totals.n_tokens,
                "max": totals.max[features],
                "mean": total / np.maximum(n_active, 1),
                "sum": total,
                "undercount": totals.top_tokens.undercount[features],
                "n_examples": n_examples.astype(np.int32),
                "histogram_first": first.astype(np.int16),
                "histogram_counts": _lists(np.append(0, np.cumsum(length)), counts[inside]),
                "token_ids": _lists(of_feature, best.token_id.astype(np.int32)),
                "token_counts": _lists(of_feature, best.count),
                "token_means": _lists(of_feature, best.mean),
                "token_maxima": _lists(of_feature, best.max),
            }
        )

    def _examples(self, features: slice) -> tuple[pa.Table, NDArray[np.int64], NDArray[np.int64]]:
        """The example rows of these features, the contexts they stand in, and how many each feature has."""
        pool = self.totals.examples
        quantile, part = self._quantiles(features)
        zero_feature, zero_context = pool.zero(features)
        n_zero = len(zero_feature)
        middle = np.maximum(self.n_real[zero_context] - 1, 0) // 2
        none = np.full(n_zero, -1)
        zero = Chosen(zero_feature, zero_context, middle, np.zeros(n_zero, dtype=np.float32), none)
        groups = (pool.top(features), quantile, pool.random(features), zero)
        chosen = joined(groups)
        code = np.repeat(np.arange(4), [len(group.feature) for group in groups])
        which = np.full(len(code), -1)
        which[code == 1] = part
        order = np.lexsort((np.arange(len(code)), code, chosen.feature))
        chosen, code, which = chosen.take(order), code[order], which[order]

        offsets, positions, values = pool.activations(chosen.record)
        table = pa.table(
            {
                "feature": self.selection[chosen.feature].astype(np.int32),
                "group": pa.DictionaryArray.from_arrays(
                    pa.array(code.astype(np.int8)), pa.array(["top", "quantile", "random", "zero"])
                ),
                "quantile": pa.array(which.astype(np.int8), mask=which < 0),
                "context": chosen.context.astype(np.int32),
                "position": chosen.position.astype(np.int32),
                "value": chosen.value,
                "active_positions": _lists(offsets, positions),
                "active_values": _lists(offsets, values),
            }
        )
        n_examples = np.bincount(chosen.feature - features.start, minlength=features.stop - features.start)
        return table, chosen.context, n_examples

    def _quantiles(self, features: slice) -> tuple[Chosen, NDArray[np.int64]]:
        """Quantile examples from the highest part down, and the part of each."""
        chosen = self.totals.examples.stratified(features)
        share = chosen.value.astype(np.float64) / self.totals.max[chosen.feature]
        part = np.minimum((share * self.n_quantiles).astype(np.int64), self.n_quantiles - 1)
        order = np.lexsort((chosen.record, -part, chosen.feature))
        chosen, part = chosen.take(order), part[order]
        first = rank_in_run(chosen.feature * self.n_quantiles + part) < self.n_per_quantile
        return chosen.take(first), part[first]


def _lists(offsets: NDArray, values: NDArray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
