"""Decoder directions of an SAE at length 1, kept on disk so that comparing them needs neither the SAE nor the card.

The file lies with the search index and is made again when it is missing or of other weights. It knows no ranking.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from mistudio_engine.api.errors import BadInput
from mistudio_engine.api.records import SAERecord
from mistudio_engine.discovery.neighbours import read_directions, unit_rows, write_directions
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.saes import load_sae

__all__ = ["directions", "forget_directions", "same_space"]

_making = threading.Lock()


def directions(engine: Engine, sae: SAERecord) -> NDArray[np.float32]:
    """(d_sae, d_out) unit rows of W_dec, memory-mapped; the first time they are made here, on the caller's thread."""
    folder = engine.home / "index" / "directions"
    path = folder / f"{sae.slug}-{sae.sha256[:12]}.npy"
    if not path.is_file():
        with _making:  # whoever looks for those of another SAE does not wait
            if not path.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                forget_directions(engine, sae.slug)
                write_directions(path, unit_rows(load_sae(engine.home / sae.folder).W_dec))
    return read_directions(path)


def forget_directions(engine: Engine, slug: str) -> None:
    """Remove what is kept of an SAE."""
    for old in (engine.home / "index" / "directions").glob("*.npy"):
        if old.name.rpartition("-")[0] == slug:
            old.unlink(missing_ok=True)


def same_space(engine: Engine, one: SAERecord, other: SAERecord, *, refuse: bool = True) -> bool:
    """Whether two SAEs write to the same place of the same model, so that their directions can be compared.

    Raises:
        BadInput: they do not, and `refuse`.
    """
    places = [(sae.model, sae.config.get("hook_name_out") or sae.hook_name, sae.d_in) for sae in (one, other)]
    same = one.slug == other.slug or (places[0] == places[1] and one.model is not None)
    if not same and refuse:
        said = " and ".join(
            f"{sae.ref} is of {place[1]} in model/{place[0]}" for sae, place in zip((one, other), places, strict=True)
        )
        raise BadInput(
            "Directions of different models or hooks cannot be compared.",
            why=f"{said}.",
            fix="Compare SAEs of one hook, or compare meanings (mode=meaning, by=label).",
        )
    return same
