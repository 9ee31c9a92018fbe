"""A causal language model from a local folder: weights, tokenizer, and the few facts that everything else asks for.

It reads folders in Hugging Face's layout and never the network, never a pickle, never code that came with a model. It
does not know the hub, SAEs or steering; hook points are in hooks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mistudio_engine.api.errors import BadInput, CorruptFile, EmptyData, WrongShape
from mistudio_engine.models import hooks, vocabulary
from mistudio_engine.models.checkpoint import (
    CONFIG_FAULTS,
    DTYPES,
    Precision,
    causal_config,
    check_precision,
    check_weights,
    load_tokenizer,
    load_weights,
    read_config,
    supported_precisions,
)
from mistudio_engine.models.layout import Layout, find_layout

__all__ = [
    "LanguageModel",
    "Precision",
    "architecture",
    "n_params",
    "supported_precisions",
    "unembedding",
    "weight_bytes",
]

UNBOUNDED_CONTEXT = 2048
"""Tokens of context for models that state no limit (ALiBi): what BLOOM and MPT were trained with."""


class LanguageModel:
    """A causal language model in evaluation mode whose parameters ask for no gradients.

    Attributes:
        name: what messages call it.
        hf: the transformers model.
        layout: where its hook points lie.
        d_vocab: rows of the unembedding; may be more than the tokenizer has tokens.
        n_ctx: the most tokens that it takes at once.
        bos_token_id: None where the model was trained without one.
        special_ids: ids that stand for no text.
    """

    def __init__(self, hf: Any, tokenizer: Any, *, name: str, folder: Path, precision: Precision = "fp32") -> None:
        """Wraps a model that is in memory already, such as a tiny random one; `load` reads one from a folder.

        Raises:
            Unsupported: its family is unknown, and its structure fits no family that is.
        """
        self.hf = hf.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.folder = folder
        self.precision: Precision = precision
        self.config = hf.config.get_text_config()
        self.layout: Layout = find_layout(self.hf)
        self.n_layers: int = len(self.layout.blocks)
        self.d_model: int = self.config.hidden_size
        self.d_vocab: int = self.hf.get_output_embeddings().weight.shape[0]
        self.n_ctx: int = _n_ctx(self.config, tokenizer)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.special_ids: frozenset[int] = vocabulary.special_ids(tokenizer)

    @classmethod
    def load(
        cls, folder: Path, *, name: str | None = None, precision: Precision = "fp32", device: str = "cpu"
    ) -> LanguageModel:
        """Loads a model from a folder in Hugging Face's layout.

        Args:
            folder: holds config.json, safetensors weights and a tokenizer.
            name: the folder's name unless given.
            precision: of the weights. int8 and nf4 (double quantisation, bf16 arithmetic) need CUDA.
            device: "cpu", "cuda", "cuda:1", "mps".

        Raises:
            NotFound: there is no such folder.
            CorruptFile: a file is missing or torn, or weights that the config asks for are in no file.
            Unsupported: the precision on this device; pickled weights; not a causal language model; a family that is
                unknown or needs code of its own.
        """
        folder = Path(folder)
        check_precision(precision, device)
        config = causal_config(read_config(folder), folder.name)
        check_weights(folder)
        tokenizer = load_tokenizer(folder)
        hf = load_weights(folder, config, precision, device)
        return cls(hf, tokenizer, name=name or folder.name, folder=folder, precision=precision)

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.n_layers} layers, d_model {self.d_model}, {self.precision})"

    @property
    def device(self) -> torch.device:
        """Where the input ids go."""
        return self.hf.get_input_embeddings().weight.device

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(batch, seq, d_vocab) for ids of shape (batch, seq), in the model's dtype, without gradient.

        Raises:
            WrongShape: ids or mask are not (batch, seq).
            BadInput: an id outside the vocabulary; more tokens than the context holds.
            EmptyData: no tokens.
        """
        input_ids, attention_mask = self.check_inputs(input_ids, attention_mask)
        return self.hf(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    def check_inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids and mask on the model's device, int64; raises as `logits` does.

        On a GPU an id outside the vocabulary would poison the CUDA context for the whole process.
        """
        if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            shapes = [tuple(t.shape) for t in (input_ids, attention_mask) if t is not None]
            raise WrongShape(f"Token ids and their mask must both be (batch, seq); got {', '.join(map(str, shapes))}.")
        if input_ids.numel() == 0:
            raise EmptyData("There are no tokens.", fix="Give at least one token.")
        if input_ids.shape[1] > self.n_ctx:
            raise BadInput(
                f"{input_ids.shape[1]} tokens do not fit into {self.name}'s context of {self.n_ctx}.",
                fix=f"Give at most {self.n_ctx} tokens at once.",
            )
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.d_vocab:
            raise BadInput(
                f"Token id {low if low < 0 else high} is outside {self.name}'s vocabulary of {self.d_vocab}.",
                fix="Use ids from this model's own tokenizer.",
            )
        mask = None if attention_mask is None else attention_mask.to(self.device, torch.int64)
        return input_ids.to(self.device, torch.int64), mask

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """The ids of a text, with BOS in front if asked and if the model has one, and nothing else added.

        The tokenizer's own habit (Llama's adds BOS, GPT-2's does not) plays no part: whoever asks says which.
        """
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return [self.bos_token_id, *ids] if bos and self.bos_token_id is not None else list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included, spaces untouched."""
        return self.tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Each id as a person reads it; see `vocabulary.token_strings`."""
        return vocabulary.token_strings(self.tokenizer, ids)


def n_params(config: dict[str, Any]) -> int:
    """Parameters of a model, tied ones once, from the content of its config.json alone.

    Raises:
        Unsupported: not a causal language model, or a family that transformers does not know.
        CorruptFile: the config contradicts itself.
    """
    return sum(p.numel() for p in _on_meta(config).parameters())


def weight_bytes(config: dict[str, Any], precision: Precision) -> int:
    """Bytes of a model's weights in memory, from the content of its config.json alone; raises as `n_params` does.

    bitsandbytes quantises the blocks' linear layers; embeddings, norms and the unembedding stay in 16 bits. nf4 with
    double quantisation costs 4.127 bits a weight: 8 bits more per 64 weights, 32 more per 256 of those (QLoRA, arXiv
    2305.14314, section 3). int8 keeps one fp32 scale for each output row.
    """
    model = _on_meta(config)
    if precision in DTYPES:
        return sum(p.numel() for p in model.parameters()) * DTYPES[precision].itemsize
    weights = [module.get_parameter("weight") for module in _quantised_linears(model)]
    n_quantised = sum(weight.numel() for weight in weights)
    n_plain = sum(p.numel() for p in model.parameters()) - n_quantised
    if precision == "int8":
        return 2 * n_plain + n_quantised + 4 * sum(weight.shape[0] for weight in weights)
    return 2 * n_plain + int(n_quantised * (4 + 8 / 64 + 32 / (64 * 256)) / 8)


def unembedding(lm: LanguageModel) -> tuple[Tensor, Tensor | None]:
    """W_U (d_vocab, d_model) and the final norm's gain (d_model,), or None where there is no such norm or gain.

    `direction * gain @ W_U.T` is a direction's effect on the logits up to the norm's scale. Left out, as a logit lens
    leaves them out: the norm's bias and LayerNorm's mean subtraction, an unembedding bias (Phi), soft-capping
    (Gemma 2). Gemma stores gain − 1 and OPT-350m projects before it unembeds: both are undone here.
    """
    W_U: Tensor = lm.hf.get_output_embeddings().weight
    family = lm.layout.family
    project_out = getattr(lm.hf.get_submodule(family.decoder), "project_out", None)
    if isinstance(project_out, nn.Linear):
        W_U = W_U @ project_out.weight
    weight = getattr(lm.layout.final_norm, "weight", None)
    return W_U, None if weight is None else weight + family.gain_offset


def architecture(lm: LanguageModel) -> dict[str, Any]:
    """What a person wants to see of a model: sizes, heads, parameters per module, hook points with their widths."""
    config = lm.config
    n_heads = getattr(config, "num_attention_heads", None)
    return {
        "name": lm.name,
        "model_type": lm.hf.config.model_type,
        "family": lm.layout.family.name,
        "family_found_by": "structure" if lm.layout.proved else "model_type",
        "precision": lm.precision,
        "device": str(lm.device),
        "n_layers": lm.n_layers,
        "d_model": lm.d_model,
        "d_vocab": lm.d_vocab,
        "n_ctx": lm.n_ctx,
        "n_heads": n_heads,
        "n_key_value_heads": getattr(config, "num_key_value_heads", None) or n_heads,
        "d_head": getattr(config, "head_dim", None) or (lm.d_model // n_heads if n_heads else None),
        "bos_token": lm.tokenizer.bos_token,
        "tied_embeddings": lm.hf.get_output_embeddings().weight is lm.hf.get_input_embeddings().weight,
        "n_params": sum(p.numel() for p in lm.hf.parameters()),
        "weight_bytes": sum(p.numel() * p.element_size() for p in lm.hf.parameters()),
        "modules": _modules(lm),
        "hook_points": [
            {"name": f"blocks.{layer}.{site}", "layer": layer, "site": site, "width": width}
            for site, width in ((site, hooks.hook_width(lm, f"blocks.0.{site}")) for site in lm.layout.taps)
            for layer in range(lm.n_layers)
        ],
        "missing_sites": dict(lm.layout.lacks),
    }


def _modules(lm: LanguageModel) -> list[dict[str, Any]]:
    """Parameters per module: what stands outside the blocks, then each block's parts; tied weights once."""
    block_of = {id(block): layer for layer, block in enumerate(lm.layout.blocks)}
    seen: set[int] = set()
    rows: list[dict[str, Any]] = []

    def add(path: str, module: nn.Module, layer: int | None) -> None:
        fresh = {id(p): p for p in module.parameters() if id(p) not in seen}
        seen.update(fresh)
        if fresh:
            n = sum(p.numel() for p in fresh.values())
            rows.append({"path": path, "layer": layer, "type": type(module).__name__, "n_params": n})

    def walk(path: str, module: nn.Module) -> None:
        inside_blocks = any(id(m) in block_of for m in module.modules())
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            layer = block_of.get(id(child))
            if layer is not None:
                for part_name, part in child.named_children():
                    add(f"{child_path}.{part_name}", part, layer)
            elif inside_blocks and any(id(m) in block_of for m in child.modules()):
                walk(child_path, child)
            else:
                add(child_path, child, None)

    walk("", lm.hf)
    return rows


def _n_ctx(config: Any, tokenizer: Any) -> int:
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    longest = getattr(tokenizer, "model_max_length", 0)
    return longest if 0 < longest < 1_000_000 else UNBOUNDED_CONTEXT


def _on_meta(config: dict[str, Any]) -> nn.Module:
    """The model without memory: shapes only."""
    hf_config = causal_config(config, str(config.get("_name_or_path") or config.get("model_type")))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=False)
    except CONFIG_FAULTS as error:
        raise CorruptFile(
            f"config.json makes no model: {error}.", fix="Bring the model in again, or correct its config.json."
        ) from error
    model.tie_weights()
    return model


def _quantised_linears(model: Any) -> list[nn.Module]:
    """What transformers hands to bitsandbytes: linear layers and GPT-2's Conv1D, all but the unembedding."""
    unembedding = model.get_output_embeddings()
    return [m for m in model.modules() if type(m) in (nn.Linear, Conv1D) and m is not unembedding]
