"""The contexts that the examples of an extraction stand in: one Arrow file of token ids, written and read in batches.

Reading is a look into the mapped file: it costs what is looked at, not what there is. It knows no features.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["ContextReader", "writing_contexts"]

IDS_PER_BATCH = 1 << 22
"""Token ids that are gathered and written in one step: 16 MiB."""


def writing_contexts(
    path: Path, contexts: NDArray[np.int64], ids: NDArray[np.int32], n_real: NDArray[np.int32]
) -> Iterator[None]:
    """Write some contexts, a batch a step.

    Args:
        path: the file.
        contexts: which, in ascending order.
        ids: (n_contexts, context_size) of all contexts there are.
        n_real: (n_contexts,) how many of them are no padding.
    """
    context_size = ids.shape[1]
    schema = pa.schema(
        [("context", pa.int32()), ("n_real", pa.int32()), ("token_ids", pa.list_(pa.int32(), context_size))]
    )
    n_together = max(1, IDS_PER_BATCH // context_size)
    with pa.ipc.new_file(str(path), schema) as file:
        for start in range(0, len(contexts), n_together):
            some = contexts[start : start + n_together]
            columns = [
                pa.array(some.astype(np.int32)),
                pa.array(n_real[some]),
                pa.FixedSizeListArray.from_arrays(pa.array(ids[some].reshape(-1)), context_size),
            ]
            file.write_batch(pa.record_batch(columns, schema=schema))
            yield


class _Batch(NamedTuple):
    numbers: NDArray[np.int32]
    n_real: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    """(n, context_size)"""


class ContextReader:
    """Reads such a file.

    Raises:
        OSError, pa.ArrowInvalid: it is torn.
    """

    def __init__(self, path: Path) -> None:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [
            _Batch(
                batch.column("context").to_numpy(),
                batch.column("n_real").to_numpy(),
                batch.column("token_ids").values.to_numpy().reshape(batch.num_rows, -1),
            )
            for batch in map(file.get_batch, range(file.num_record_batches))
        ]

    def ids(self, context: int) -> NDArray[np.int32]:
        """(n_tokens,) ids of a context that was written, without its padding."""
        batch = self._batches[bisect_left(self._batches, context, key=lambda batch: int(batch.numbers[-1]))]
        at = int(np.searchsorted(batch.numbers, context))
        return batch.token_ids[at, : batch.n_real[at]]
