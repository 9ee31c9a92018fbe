"""Loading and saving: which format a folder has, found by what is in it.

Another format is a file beside saelens.py and a line in FORMATS. It does not know the hub: a folder is on this disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mistudio_engine.api.errors import BadInput, NotFound, Unsupported
from mistudio_engine.saes.base import SAE
from mistudio_engine.saes.folders import new_folder
from mistudio_engine.saes.native import is_native, read_native, write_native
from mistudio_engine.saes.saelens import is_in_saelens, is_saelens, read_saelens, write_saelens, write_sparsity
from mistudio_engine.saes.tensor_file import is_finite

__all__ = ["FORMATS", "Format", "detect_format", "format_for", "load_sae", "save_sae"]


class Format(NamedTuple):
    """How one kind of folder is told, read and written."""

    matches: Callable[[Path], bool]
    read: Callable[[Path], SAE]
    write: Callable[[SAE, Path, dict[str, Any]], None]


FORMATS: dict[str, Format] = {
    "saelens": Format(is_saelens, read_saelens, write_saelens),
    "native": Format(is_native, read_native, write_native),
}


def format_for(architecture: str) -> str:
    """The format in which an SAE is kept: SAELens's, which can be taken anywhere, where it has the architecture."""
    return "saelens" if is_in_saelens(architecture) else "native"


def detect_format(folder: Path) -> str:
    """The name of the folder's format, a key of FORMATS.

    Raises:
        NotFound: no such folder.
        Unsupported: no format of ours; says what is in the folder.
    """
    if not folder.is_dir():
        raise NotFound(f"There is no folder {folder.name}.", fix="Give the folder of an SAE.")
    for name, known in FORMATS.items():
        if known.matches(folder):
            return name
    found = sorted(file.name for file in folder.iterdir())
    raise Unsupported(
        f"The folder {folder.name} holds no SAE in a format that miStudio reads.",
        why=f"It has {', '.join(found[:6]) + (', …' if len(found) > 6 else '') or 'no files'}.",
        fix="Give a folder with cfg.json and sae_weights.safetensors (SAELens), or one that miStudio saved.",
    )


def load_sae(folder: Path | str, device: str = "cpu") -> SAE:
    """The SAE in a folder, ready to run; `.notes` says what had to be assumed.

    Raises:
        NotFound: no such folder.
        CorruptFile: a file that is torn, hostile, contradicts itself, or has NaN weights.
        WrongShape: tensors other than the config's: missing, too many, or of another shape.
        Unsupported: a format or an architecture that is not one of ours.
    """
    folder = Path(folder)
    return FORMATS[detect_format(folder)].read(folder).to(device)


def save_sae(
    sae: SAE,
    folder: Path | str,
    *,
    format: str = "saelens",
    sparsity: Tensor | None = None,
    provenance: dict[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Write an SAE; the folder appears whole or not at all.

    Args:
        sae: what to write, from any device.
        folder: where; its parents are made.
        format: a key of FORMATS.
        sparsity: how often each feature fires, (d_sae,) between 0 and 1.
        provenance: JSON that says where it came from, kept under `metadata.mistudio`.
        replace: overwrite a folder that exists.

    Returns:
        The folder.

    Raises:
        BadInput: NaN or infinite weights, which are never saved; an unknown format.
        Conflict: the folder exists.
        DiskFull: there is no room.
    """
    if format not in FORMATS:
        raise BadInput(f"There is no SAE format {format!r}.", fix=f"Use one of: {', '.join(FORMATS)}.")
    for name, tensor in sae.named_parameters():
        if not is_finite(tensor):
            raise BadInput(
                f"{name} has NaN or infinite values, and such weights are never saved.",
                fix="Go back to an earlier checkpoint; a lower lr usually prevents it.",
            )
    folder = Path(folder)
    with new_folder(folder, replace=replace) as part:
        FORMATS[format].write(sae, part, provenance or {})
        if sparsity is not None:
            write_sparsity(part, sparsity, sae.cfg.d_sae)
    return folder
