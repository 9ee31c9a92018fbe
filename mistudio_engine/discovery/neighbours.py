"""How near the features of a dictionary are to a direction or to each other: by decoder row, and by logit effects.

Decoder directions can be compared only where they lie in the same space: within one hook of one model. Everything here
is plain arrays; it knows no records and no labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open

from mistudio_engine.api.errors import BadInput, CorruptFile, WrongShape
from mistudio_engine.discovery.logit_store import LogitEffects
from mistudio_engine.saes.folders import new_file

__all__ = [
    "cosines",
    "extremes",
    "logit_cosines",
    "logit_effect",
    "read_directions",
    "read_effects",
    "unit_rows",
    "write_directions",
]

_ROWS = 4096
"""Rows of a matrix taken into memory at a time."""


def unit_rows(W_dec: torch.Tensor) -> NDArray[np.float32]:
    """The decoder's rows (d_sae, d_out) brought to length 1; a row of zeros stays one."""
    rows = W_dec.detach().to("cpu", torch.float32)
    return torch.nn.functional.normalize(rows, dim=-1).numpy()


def write_directions(path: Path, rows: NDArray[np.float32]) -> None:
    """Keep unit rows in a file that is whole or not there."""
    with new_file(path) as part, part.open("wb") as file:
        np.save(file, np.ascontiguousarray(rows, np.float32), allow_pickle=False)


def read_directions(path: Path) -> NDArray[np.float32]:
    """Unit rows (d_sae, d_out), memory-mapped.

    Raises:
        CorruptFile: it is torn.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptFile(f"{path.name} cannot be read: {error}.", fix="Delete it; it is made again.") from error


def cosines(rows: NDArray[np.float32], direction: ArrayLike) -> NDArray[np.float32]:
    """Of unit rows (n, d) with a direction (d,) of any length: (n,), -1 to 1.

    Raises:
        WrongShape: the direction has another width.
        BadInput: it is zero or not finite.
    """
    array = np.asarray(direction, np.float64)
    if array.shape != rows.shape[1:]:
        raise WrongShape(f"A direction of shape {array.shape} cannot be compared with rows of width {rows.shape[1]}.")
    norm = np.linalg.norm(array)
    if not (np.isfinite(norm) and norm > 0):
        raise BadInput("A direction without a length has no neighbours.", why=f"Its length is {norm}.")
    unit = (array / norm).astype(np.float32)
    parts = [rows[at : at + _ROWS] @ unit for at in range(0, len(rows), _ROWS)]
    return np.clip(np.concatenate(parts), -1, 1) if parts else np.zeros(0, np.float32)


class Extremes(NamedTuple):
    """The ends of a ranking."""

    highest: NDArray[np.int64]
    """Places, the highest value first."""

    lowest: NDArray[np.int64]
    """Places, the lowest value first."""


def extremes(values: NDArray, k: int, among: NDArray[np.bool_] | None = None) -> Extremes:
    """The k highest and the k lowest values (n,), of equal ones the earlier first, nan left out; highest ones are above
    zero and lowest ones below it, so none is both.
    """
    shown = ~np.isnan(values) if among is None else among & ~np.isnan(values)
    above, below = np.flatnonzero(shown & (values > 0)), np.flatnonzero(shown & (values < 0))
    return Extremes(
        above[np.argsort(-values[above], kind="stable")[:k]], below[np.argsort(values[below], kind="stable")[:k]]
    )


def read_effects(path: Path) -> LogitEffects:
    """The logit effects of all features at once, each array (n_features, k).

    Raises:
        CorruptFile: the file is torn.
    """
    try:
        with safe_open(path, framework="np") as file:
            return LogitEffects(*(file.get_tensor(name) for name in LogitEffects._fields))
    except SafetensorError as error:
        raise CorruptFile(f"{path.name} cannot be read: {error}.", fix="Run the extraction again.") from error


def logit_cosines(effects: LogitEffects, row: int, others: LogitEffects | None = None) -> NDArray[np.float64]:
    """Cosine of a feature's logit effects with every feature's, (n,), -1 to 1.

    Only what was kept counts: the tokens that each promotes and suppresses most, the others as 0. So it is near the
    cosine of all effects where those few tokens carry most of them, and 0 where none is in common.
    """
    others = effects if others is None else others
    d_vocab = 1 + max(int(ids.max(initial=0)) for each in (effects, others) for ids in (each[0], each[2]))
    dense = np.zeros(d_vocab)
    for ids, values in ((effects.promoted_ids, effects.promoted_values), (effects.suppressed_ids, effects[3])):
        dense[ids[row]] = values[row]
    found = np.zeros(len(others.promoted_ids))
    for at in range(0, len(found), _ROWS):
        part = slice(at, at + _ROWS)
        ids = np.concatenate([others.promoted_ids[part], others.suppressed_ids[part]], axis=1)
        values = np.concatenate([others.promoted_values[part], others.suppressed_values[part]], axis=1).astype(float)
        # A vocabulary smaller than what is kept at both ends puts a token into both: it counts once.
        values[_repeated(ids)] = 0.0
        norms = np.linalg.norm(values, axis=1) * np.linalg.norm(dense)
        found[part] = np.einsum("ij,ij->i", values, dense[ids]) / np.where(norms > 0, norms, 1.0)
    return np.clip(found, -1, 1)


def _repeated(ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which ids of a row (n, k) stand in it before."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    repeated = np.zeros(ids.shape, bool)
    np.put_along_axis(repeated, order, again, axis=1)
    return repeated


def logit_effect(
    ids: NDArray[np.int32], values: NDArray[np.float32], tokens: Sequence[set[int]]
) -> NDArray[np.float64]:
    """How much each feature changes the logits of some tokens, (n,): the sum over the tokens, each by its strongest id.

    Args:
        ids: the tokens kept at one end of each feature's logits, (n, k).
        values: their logits, (n, k), with the sign in which they count: below zero counts as none.
        tokens: ids that read as each token; one that is not among those kept counts 0.
    """
    total = np.zeros(len(ids))
    for wanted in tokens:
        total += np.where(np.isin(ids, list(wanted)), values, 0.0).max(axis=1, initial=0.0)
    return total
