"""A model's folder as the hub lays it out, checked and read into memory.

Only safetensors are accepted (a pickle can run code when it is read) and no code that comes with a model is run. What
transformers would pass over in silence, such as weights that are in no file, is an error here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from mistudio_engine.api.errors import CorruptFile, NotFound, Unsupported

__all__ = [
    "CONFIG_FAULTS",
    "DTYPES",
    "Precision",
    "causal_config",
    "check_precision",
    "check_weights",
    "load_tokenizer",
    "load_weights",
    "read_config",
    "read_json",
    "supported_precisions",
]

Precision = Literal["fp32", "bf16", "fp16", "int8", "nf4"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_QUANTISED: tuple[Precision, ...] = ("int8", "nf4")

QUANTISED_NEEDS = ("bitsandbytes", "accelerate")
"""Packages without which transformers quantises nothing."""

CONFIG_FAULTS = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError)
"""What transformers raises for a config whose values make no sense, depending on where it stumbles."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")

_BLOCK = re.compile(r"\.(?:h|layers|blocks)\.(\d+)\.")

TOKENIZERS_KEPT = 4
"""Models whose tokenizers stay in memory."""

_FETCH = "Bring the model in again (its download may have been cut short), or copy the folder again."


def supported_precisions(device: str) -> tuple[Precision, ...]:
    """The precisions that a device can hold a model in: all of them on CUDA, no quantised ones elsewhere."""
    every: tuple[Precision, ...] = get_args(Precision)
    if torch.device(device).type == "cuda":
        return every
    return tuple(precision for precision in every if precision not in _QUANTISED)


def check_precision(precision: Precision, device: str) -> None:
    """Whether a model can be held in this precision on this device; never a silent larger one.

    Raises:
        Unsupported: it cannot, or the device is not there; the message has what is supported.
    """
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    here += ["mps"] if torch.backends.mps.is_available() else []
    if device not in here and not (device == "cuda" and "cuda:0" in here):
        raise Unsupported(f"There is no device {device!r} here.", fix=f"Use one of: {', '.join(here)}.")
    supported = supported_precisions(device)
    if precision not in supported:
        reason = "8-bit and 4-bit weights need CUDA." if precision in _QUANTISED else ""
        raise Unsupported(
            f"Precision {precision!r} is not supported on {device!r}.",
            why=reason,
            fix=f"Supported here: {', '.join(supported)}.",
        )
    missing = [package for package in QUANTISED_NEEDS if precision in _QUANTISED and find_spec(package) is None]
    if missing:
        raise Unsupported(
            f"Precision {precision!r} needs {' and '.join(missing)}, not installed here.",
            fix=f"pip install {' '.join(missing)}; or use fp32, bf16 or fp16.",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CorruptFile: it is not there, not UTF-8, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CorruptFile(f"{path.name} is missing from {path.parent.name!r}.", fix=_FETCH) from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptFile(f"{path.name} in {path.parent.name!r} is not JSON: {error}.", fix=_FETCH) from error
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise CorruptFile(f"{path.name} in {path.parent.name!r} holds a {kind}, not an object.", fix=_FETCH)
    return data


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json.

    Raises:
        NotFound: there is no such folder.
        CorruptFile: config.json is missing or unreadable, or does not say its `model_type`.
    """
    if not folder.is_dir():
        raise NotFound(f"There is no folder {str(folder)!r}.", fix="Give the folder that has the model's config.json.")
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise CorruptFile(f"config.json in {folder.name!r} does not say its model_type.", fix=_FETCH)
    return config


def check_weights(folder: Path) -> list[Path]:
    """The safetensors files of a model, each with a whole header and as long as its header says.

    Raises:
        CorruptFile: none are there, one of the index is missing, or one is torn.
        Unsupported: the weights are there as a pickle only.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CorruptFile(f"{index.name} in {folder.name!r} has no weight_map.", fix=_FETCH)
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = ["model.safetensors"]
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CorruptFile(f"{index.name} in {folder.name!r} names {name!r}, no file of this folder.", fix=_FETCH)
        if not (folder / name).is_file():
            _raise_missing(folder, name)
        _check_whole(folder / name)
    return [folder / name for name in names]


def _raise_missing(folder: Path, name: str) -> None:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if name == "model.safetensors" and pickles:
        raise Unsupported(
            f"The weights of {folder.name!r} are in {pickles[0]}, a format that can run code when it is read.",
            why="Only safetensors are loaded.",
            fix="Convert them once where you trust the file: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) with transformers writes safetensors; many hub models have them already.",
        )
    raise CorruptFile(f"{name} is missing from {folder.name!r}.", fix=_FETCH)


def _check_whole(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            if not file.keys():
                raise CorruptFile(f"{path.name} in {path.parent.name!r} holds no tensors.", fix=_FETCH)
    except SafetensorError as error:
        where = f"{path.name} in {path.parent.name!r}"
        raise CorruptFile(f"{where} is torn or is no safetensors: {error}.", fix=_FETCH) from error


def causal_config(config: dict[str, Any], name: str) -> Any:
    """The config as transformers' object, if it is one of a causal language model.

    Raises:
        Unsupported, CorruptFile: as `n_params`.
    """
    model_type = config.get("model_type")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    classes = {known} if isinstance(known, str) else set(known or ())
    asked = config.get("architectures") or []
    if not classes or (asked and not classes & set(asked)):
        what = f"{asked[0]} ({model_type})" if asked else repr(model_type)
        raise Unsupported(
            f"{name!r} is {what}, which is not a causal language model that transformers knows.",
            why="Code that comes with a model is never run." if "auto_map" in config else "",
            fix="Use a causal language model, such as a GPT-2, Llama, Gemma, Qwen, Pythia, Phi or OPT.",
        )
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    if "quantization_config" in config:
        raise Unsupported(
            f"{name!r} was saved quantised.",
            fix="Use the model's unquantised weights, and choose precision 'int8' or 'nf4' when loading.",
        )
    try:
        return AutoConfig.for_model(**fields)
    except CONFIG_FAULTS as error:
        raise CorruptFile(f"config.json of {name!r} contradicts itself: {error}.", fix=_FETCH) from error


def load_tokenizer(folder: Path) -> Any:
    """A model folder's tokenizer; one object for all who ask while its files stay as they are, so nobody may change it.

    Calls with truncation or padding do change it, and fail while another thread is in one.

    Raises:
        CorruptFile: its files are missing or cannot be read.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return _tokenizer(
        folder.absolute(), tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    )


@lru_cache(maxsize=TOKENIZERS_KEPT)
def _tokenizer(folder: Path, files: tuple[tuple[str, int, int], ...]) -> Any:
    """Read anew when a file is another one: 50,000 tokens take 0.3 s, and each look at a feature wants them."""
    rules = [p for p in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model") if (folder / p).is_file()]
    if not rules:
        raise CorruptFile(
            f"{folder.name!r} has no tokenizer.",
            why="Looked for tokenizer.json, tokenizer.model, vocab.json and spiece.model.",
            fix="Bring the model in again, or copy its tokenizer files into the folder.",
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
        raise CorruptFile(f"The tokenizer of {folder.name!r} cannot be read: {error}.", fix=_FETCH) from error
    backend = getattr(found, "backend_tokenizer", None)
    if backend is not None:  # what its file says of these, the first plain call would take away, at anybody's side
        backend.no_truncation()
        backend.no_padding()
    return found


def load_weights(folder: Path, config: Any, precision: Precision, device: str) -> Any:
    """The model of a folder whose files `check_weights` found whole, on a device and in a precision that go together.

    Raises:
        CorruptFile: tensors that the config asks for are missing, have another shape, or are more than it asks for.
        Unsupported: it needs a package that is not installed.
        torch.OutOfMemoryError: it does not fit; the caller knows what could be unloaded.
    """
    options: dict[str, Any] = {"device_map": device} if precision in _QUANTISED else {}
    if precision == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=DTYPES.get(precision, torch.bfloat16),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except ImportError as error:
        raise Unsupported(f"{folder.name!r} needs a package that is not installed: {error}.") from error
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CorruptFile(f"The weights of {folder.name!r} do not load: {error}.", fix=_FETCH) from error
    hf, report = loaded
    _check_complete(folder.name, config, report)
    return hf if options else hf.to(device)


def _check_complete(name: str, config: Any, report: dict[str, Any]) -> None:
    """transformers fills what it does not find with random numbers, leaves out what it does not expect, and goes on."""
    absent = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise CorruptFile(
            f"The weights of {name!r} lack {', '.join(absent[:5])}{more}, or have them in another shape.",
            why="The config asks for these tensors; a model with random ones in their place would be worthless.",
            fix="Bring the model in again, or correct its config.json.",
        )
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    blocks = [int(found[1]) for key in report["unexpected_keys"] if (found := _BLOCK.search(key))]
    if n_layers is not None and max(blocks, default=0) >= n_layers:
        raise CorruptFile(
            f"The weights of {name!r} have at least {max(blocks) + 1} layers, and config.json says {n_layers}.",
            fix="Bring the model in again, or correct its config.json.",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bar and load report: what matters in them is raised as an error."""
    bar, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bar:
            hf_logging.enable_progress_bar()
