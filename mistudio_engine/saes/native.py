"""miStudio's own folder: `config.json`, `model.safetensors`, perhaps `training_metadata.json` and the sparsity file.

The config is ours field by field and carries a mark, so that a language model's folder, which has the same two names,
is never taken for it. Weights are oriented as everywhere here: a feature is a row of W_dec.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mistudio_engine.api.errors import BadInput, CorruptFile, Unsupported
from mistudio_engine.api.sae_config import parse_sae_config
from mistudio_engine.saes.architectures import new_sae
from mistudio_engine.saes.base import SAE, check_tensors
from mistudio_engine.saes.saelens import dump_json
from mistudio_engine.saes.tensor_file import read_header, read_json, read_tensors, write_tensors

__all__ = ["is_native", "read_native", "write_native"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TRAINING_FILE = "training_metadata.json"

_MARK = "mistudio-sae"
_VERSION = 1


def is_native(folder: Path) -> bool:
    """Whether the folder has the two files and the config our mark."""
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        return False
    return read_json(folder / CONFIG_FILE).get("format") == _MARK


def read_native(folder: Path) -> SAE:
    """The SAE in a folder of ours; what training_metadata.json says stands under `cfg.metadata["mistudio"]`.

    Raises:
        CorruptFile: a file that is damaged.
        WrongShape: tensors other than the config's.
        Unsupported: written by a newer miStudio.
    """
    raw = read_json(folder / CONFIG_FILE)
    version = raw.pop("format_version", None)
    del raw["format"]
    if version != _VERSION:
        raise Unsupported(
            f"{CONFIG_FILE} has the format version {version!r}; this miStudio reads version {_VERSION}.",
            fix="Update miStudio, or export the SAE in SAELens's format.",
        )
    if (folder / TRAINING_FILE).is_file():
        raw["metadata"] = {**raw.get("metadata", {}), "mistudio": read_json(folder / TRAINING_FILE)}
    try:
        cfg = parse_sae_config(raw)
    except BadInput as error:
        raise CorruptFile(f"{CONFIG_FILE} does not describe an SAE.", why=error.why, fix="Fix the file.") from error
    header = read_header(folder / WEIGHTS_FILE)
    check_tensors(cfg, {name: info.shape for name, info in header.tensors.items()})
    return new_sae(cfg, read_tensors(folder / WEIGHTS_FILE))


def write_native(sae: SAE, folder: Path, provenance: dict[str, Any]) -> None:
    """Write an SAE into a folder that exists."""
    fields = sae.cfg.model_dump(mode="json")
    training = {**fields["metadata"].pop("mistudio", {}), **provenance}
    write_tensors(folder / WEIGHTS_FILE, dict(sae.named_parameters()), metadata={"format": _MARK})
    (folder / CONFIG_FILE).write_text(
        dump_json({"format": _MARK, "format_version": _VERSION, **fields}), encoding="utf-8"
    )
    if training:
        (folder / TRAINING_FILE).write_text(dump_json(training), encoding="utf-8")
