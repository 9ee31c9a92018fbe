"""SAELens's folder: `cfg.json`, `sae_weights.safetensors` and perhaps `sparsity.safetensors`, all versions of it.

Read as SAELens 6.54 reads it, but never silently wrong: where it guesses and the guess can be wrong, the SAE carries a
note; where it would compute something else than was trained, this refuses. Written as version 6 writes it. It does not
know the layouts of other programs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput, CorruptFile, Unsupported, WrongShape
from mistudio_engine.api.sae_config import SAEConfig, SAEConfigBase, parse_sae_config
from mistudio_engine.saes.architectures import new_sae
from mistudio_engine.saes.base import SAE, check_tensors
from mistudio_engine.saes.tensor_file import Header, is_finite, read_header, read_json, read_tensors, write_tensors

__all__ = ["is_in_saelens", "is_saelens", "read_saelens", "read_sparsity", "write_saelens", "write_sparsity"]

CFG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SPARSITY_FILE = "sparsity.safetensors"

_WRITTEN_AS = "6.54.12"
"""The version of SAELens whose layout is written. Without one SAELens takes a folder for an old one, drops its metadata
and fills in defaults."""

_SPARSITY_FLOOR = 1e-10
"""SAELens stores log10(frequency + this)."""

_METADATA_FIELDS = (
    "model_name",
    "hook_name",
    "hook_name_out",
    "hook_head_index",
    "prepend_bos",
    "context_size",
    "dataset_path",
    "neuronpedia_id",
)
"""SAELens's metadata that our configs have fields for; the rest is carried along as it is."""

_LEGACY_METADATA = (
    *_METADATA_FIELDS,
    "model_class_name",
    "model_from_pretrained_kwargs",
    "exclude_special_tokens",
    "seqpos_slice",
    "sae_lens_training_version",
    "hook_head_index_out",
)
"""What SAELens keeps of a config from before version 6, where these stood at the top level."""

_COMMON_KEYS = (
    "architecture",
    "d_in",
    "d_sae",
    "dtype",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
)
"""Keys that every architecture has, device and metadata aside."""

_OWN_KEYS = {
    "standard": (),
    "gated": (),
    "jumprelu": (),
    "topk": ("k", "rescale_acts_by_decoder_norm"),
    "transcoder": ("d_out",),
    "skip_transcoder": ("d_out",),
    "jumprelu_transcoder": ("d_out",),
    "jumprelu_skip_transcoder": ("d_out",),
}
"""The architectures that SAELens and we both have, with the keys that one alone has."""

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Names of before version 6, and what they became."""

_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_in_saelens(architecture: str) -> bool:
    """Whether SAELens has an architecture, so that such an SAE can be written for it."""
    return architecture in _OWN_KEYS


def is_saelens(folder: Path) -> bool:
    """Whether the folder has SAELens's two files."""
    return (folder / CFG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def read_saelens(folder: Path) -> SAE:
    """The SAE in a SAELens folder of any version.

    Raises:
        CorruptFile: a file that is damaged, contradicts itself, or does not say what only it can.
        WrongShape: tensors other than the config's.
        Unsupported: an architecture or activation that is not one of ours.
    """
    raw = read_json(folder / CFG_FILE)
    header = read_header(folder / WEIGHTS_FILE)
    notes: list[str] = []
    values = _modern(raw) if _major_version(raw) >= 6 else _from_before_6(raw, notes)
    cfg = _config(values, header, notes)
    shapes = {name: info.shape for name, info in header.tensors.items() if name != "scaling_factor"}
    if cfg.activation == "jumprelu" and "log_threshold" in shapes:
        shapes["threshold"] = shapes.pop("log_threshold")
    check_tensors(cfg, shapes)

    tensors = read_tensors(folder / WEIGHTS_FILE)
    scale = tensors.pop("scaling_factor", None)
    if scale is not None:
        _fold_scaling_factor(tensors, scale, raw, notes)
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    tensors = {name: tensor.to(getattr(torch, cfg.dtype)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CorruptFile(
                f"{name} overflows as {cfg.dtype}.", fix=f'Set "dtype": "float32" in {CFG_FILE}, as it was saved.'
            )
    sae = new_sae(cfg, tensors)
    sae.notes = tuple(notes)
    return sae


def write_saelens(sae: SAE, folder: Path, provenance: dict[str, Any]) -> None:
    """Write an SAE as SAELens 6 does, into a folder that exists: exactly its tensors, all nine common keys.

    Raises:
        Unsupported: SAELens has no such architecture.
    """
    if not is_in_saelens(sae.cfg.architecture):
        raise Unsupported(
            f"SAELens has no architecture {sae.cfg.architecture!r}, so this SAE cannot be written in its format.",
            why=f"It has {', '.join(_OWN_KEYS)}.",
            fix="Write it in miStudio's own format (native).",
        )
    write_tensors(folder / WEIGHTS_FILE, dict(sae.named_parameters()))
    (folder / CFG_FILE).write_text(dump_json(_to_saelens(sae.cfg, provenance)), encoding="utf-8")


def read_sparsity(folder: Path) -> Tensor | None:
    """How often each feature fired in training, (d_sae,) between 0 and 1; None where nobody recorded it."""
    if not (folder / SPARSITY_FILE).is_file():
        return None
    tensors = read_tensors(folder / SPARSITY_FILE)
    if "sparsity" not in tensors:
        raise CorruptFile(f"{SPARSITY_FILE} has no tensor called sparsity.", fix="Delete the file; it is not needed.")
    return (10 ** tensors["sparsity"].float() - _SPARSITY_FLOOR).clamp(0, 1)


def write_sparsity(folder: Path, sparsity: Tensor, d_sae: int) -> None:
    """Write firing frequencies (d_sae,) as SAELens does, as their decimal logarithm."""
    if tuple(sparsity.shape) != (d_sae,):
        raise WrongShape(f"sparsity has the shape {tuple(sparsity.shape)}, expected ({d_sae},): one number a feature.")
    if not bool(((sparsity >= 0) & (sparsity <= 1)).all()):
        raise BadInput(
            "sparsity has to be firing frequencies, between 0 and 1.", fix="Give frequencies, not their logs."
        )
    write_tensors(folder / SPARSITY_FILE, {"sparsity": (sparsity.float() + _SPARSITY_FLOOR).log10()})


def dump_json(data: dict[str, Any]) -> str:
    """JSON for a file, in the order given.

    Raises:
        BadInput: something in it is no JSON, a NaN for example.
    """
    try:
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise BadInput(
            "The SAE's metadata cannot be written as JSON.", why=str(error), fix="Remove that value."
        ) from error


def _config(values: dict[str, Any], header: Header, notes: list[str]) -> SAEConfig:
    """Check what both generations of cfg.json share."""
    architecture = values.get("architecture")
    if not isinstance(architecture, str) or architecture not in _OWN_KEYS:
        raise Unsupported(
            f"{CFG_FILE} says architecture {architecture!r}, which miStudio cannot run.",
            why=f"Of SAELens's architectures it runs {', '.join(_OWN_KEYS)}.",
        )
    if architecture == "topk" and values.get("k") is None:
        raise CorruptFile(
            f"{CFG_FILE} describes a TopK SAE and does not say k.",
            why="SAELens would take 100, whatever it was trained with.",
            fix='Add "k" to it; the repository it came from names it.',
        )
    if architecture == "jumprelu" and "apply_b_dec_to_input" not in values:
        notes.append(
            "The config does not say whether b_dec is subtracted from the input; as in SAELens, it is. Gemma Scope's "
            "SAEs do not subtract it: if reconstructions are poor, set apply_b_dec_to_input to false."
        )
    if values.get("normalize_activations") in ("expected_average_only_in", "covariance_whitening"):
        notes.append(
            f"normalize_activations is {values['normalize_activations']}, which does nothing when an SAE runs: the "
            "scale has to be in the weights already. If it is not, reconstructions are poor, and no file has the scale."
        )
    if values.get("dtype") is None:
        values["dtype"] = _DTYPE_NAMES.get(header.tensors["W_enc"].dtype if "W_enc" in header.tensors else "F32")
        notes.append(f"The config has no dtype; the tensors are {values['dtype']}.")
    values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    if values.get("metadata", {}).get("model_from_pretrained_kwargs"):
        notes.append(
            "It was trained on a language model loaded with "
            f"{values['metadata']['model_from_pretrained_kwargs']}; loaded otherwise, its activations differ."
        )
    try:
        return parse_sae_config(values)
    except BadInput as error:
        raise CorruptFile(f"{CFG_FILE} does not describe an SAE.", why=error.why, fix="Fix the file.") from error


def _modern(raw: dict[str, Any]) -> dict[str, Any]:
    """Our config's values from a version 6 cfg.json."""
    metadata = raw.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise CorruptFile(f"The metadata in {CFG_FILE} is no JSON object.", fix="Fix the file.")
    return _values(raw, metadata)


def _from_before_6(raw: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Our config's values from a cfg.json of versions 3 to 5, or from one that does not say its version."""
    old = {_RENAMED.get(key, key): value for key, value in raw.items()}
    old.setdefault("architecture", "standard")
    old.setdefault("prepend_bos", True)
    activation = old.get("activation_fn", "relu")
    kwargs = old.get("activation_fn_kwargs") or {}
    if activation == "topk":
        old["architecture"] = "topk"
        old["k"] = kwargs.get("k") if isinstance(kwargs, dict) else None
    elif activation not in ("relu", old["architecture"]):
        raise Unsupported(
            f"{CFG_FILE} says activation {activation!r}, which miStudio cannot run.",
            why="SAELens 6 would run a ReLU in its place.",
        )
    if isinstance(old.get("normalize_activations"), bool):
        old["normalize_activations"] = "expected_average_only_in" if old["normalize_activations"] else "none"
    if "reshape_activations" not in old and "hook_z" in str(old.get("hook_name") or ""):
        old["reshape_activations"] = "hook_z"
    metadata = {key: old[key] for key in _LEGACY_METADATA if key in old}
    nested = raw.get("metadata")
    if isinstance(nested, dict) and nested:
        metadata = {**nested, **metadata}
        notes.append(
            "The config does not say which version of SAELens wrote it, so it was read as an old one; its metadata was "
            "kept, which SAELens would drop."
        )
    return _values(old, metadata)


def _values(top: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Top-level keys that the architecture has, and metadata split into fields and the rest; others are ignored."""
    names = {*_COMMON_KEYS, *_OWN_KEYS.get(str(top.get("architecture")), ())}
    values = {name: top[name] for name in names if top.get(name) is not None}
    values |= {name: metadata[name] for name in _METADATA_FIELDS if metadata.get(name) is not None}
    values["metadata"] = {
        name: value
        for name, value in metadata.items()
        if name not in (*_METADATA_FIELDS, "sae_lens_version") and (name, value) != ("model_from_pretrained_kwargs", {})
    }
    return values


def _to_saelens(cfg: SAEConfigBase, provenance: dict[str, Any]) -> dict[str, Any]:
    """A version 6 cfg.json."""
    fields = cfg.model_dump(mode="json")
    rest = fields.pop("metadata")
    known = {name: fields.pop(name) for name in _METADATA_FIELDS}
    if known["hook_name_out"] is None:
        del known["hook_name_out"]
    metadata = {"model_from_pretrained_kwargs": {}, **rest, **known, "sae_lens_version": _WRITTEN_AS}
    ours = {**rest.get("mistudio", {}), **provenance}
    if ours:
        metadata["mistudio"] = ours
    return {**fields, "device": "cpu", "metadata": metadata}


def _major_version(raw: dict[str, Any]) -> int:
    nested = raw.get("metadata")
    version = raw.get("sae_lens_version") or (nested.get("sae_lens_version") if isinstance(nested, dict) else None)
    if not version:
        return 0
    try:
        return int(str(version).split(".")[0])
    except ValueError as error:
        raise CorruptFile(f"{CFG_FILE} says SAELens version {version!r:.40}.", fix="Fix the file.") from error


def _fold_scaling_factor(tensors: dict[str, Tensor], scale: Tensor, raw: dict[str, Any], notes: list[str]) -> None:
    """Early versions multiplied activations by a finetuned factor before decoding; most files have it as all ones."""
    if torch.allclose(scale, torch.ones_like(scale)):
        return
    if not raw.get("finetuning_scaling_factor"):
        raise CorruptFile(
            "The weights have a scaling_factor, and the config says that none was used.",
            fix="Set finetuning_scaling_factor in the config if the SAE was finetuned, or delete the tensor if not.",
        )
    if scale.shape != tensors["W_dec"].shape[:1]:
        raise WrongShape(f"scaling_factor has the shape {tuple(scale.shape)}, expected ({tensors['W_dec'].shape[0]},).")
    tensors["W_dec"] = tensors["W_dec"] * scale[:, None]
    notes.append("Its finetuned scaling_factor was folded into W_dec.")
