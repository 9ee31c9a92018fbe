"""Where each hook site lies inside each family of language models: a table with a row per family.

A row names modules. It holds no behaviour and knows no model: layout.py applies it to one, and hooks.py uses what comes
of that. A new family is a new row, and a tiny configuration in tests/models/conftest.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["FAMILIES", "SITES", "Family"]

SITES = (
    "hook_resid_pre",
    "ln2.hook_normalized",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
)
"""The sites of a block under TransformerLens's names."""

PARALLEL = "attention and MLP read the same residual stream in this family (a parallel block): there is no middle"
POST_NORM = "this model normalises after each addition, so its blocks do not have the site that TransformerLens names"


@dataclass(frozen=True)
class Family:
    """A row of the table: the names of the modules that matter, relative to the model or to a block."""

    name: str

    model_types: tuple[str, ...]
    """`model_type` of config.json."""

    attn_out: str
    """Module whose output is added to the residual stream as the attention's contribution."""

    z: str
    """The attention's output projection: its input is all heads' z, side by side."""

    ln2: str | None
    """Norm before the MLP; None where the MLP has no norm of its own before it."""

    mlp: str
    """Module whose input is the MLP's input."""

    mlp_out: str
    """Module whose output is added to the residual stream as the MLP's contribution."""

    decoder: str = "model"
    """Module that owns the blocks and the final norm."""

    blocks: str = "layers"
    """The list of blocks in `decoder`."""

    final_norm: str = "norm"
    """The norm before the unembedding, in `decoder`."""

    gain_offset: float = 0.0
    """What is added to a norm's weight to make its gain: 1 for Gemma, which stores the gain's distance from one."""

    when: tuple[str, Any] | None = None
    """The row is for configs with this field at this value only."""

    lacks: Mapping[str, str] = field(default_factory=dict)
    """Sites that the family does not have, and why."""


_GPT2 = Family(
    "gpt2",
    ("gpt2",),
    decoder="transformer",
    blocks="h",
    final_norm="ln_f",
    attn_out="attn",
    z="attn.c_proj",
    ln2="ln_2",
    mlp="mlp",
    mlp_out="mlp",
)
_NEOX = Family(
    "gpt_neox",
    ("gpt_neox",),
    decoder="gpt_neox",
    final_norm="final_layer_norm",
    attn_out="attention",
    z="attention.dense",
    ln2="post_attention_layernorm",
    mlp="mlp",
    mlp_out="mlp",
    when=("use_parallel_residual", True),
    lacks={"hook_resid_mid": PARALLEL},
)
_LLAMA = Family(
    "llama",
    ("llama", "mistral", "qwen2", "qwen3", "phi3", "bitnet"),
    attn_out="self_attn",
    z="self_attn.o_proj",
    ln2="post_attention_layernorm",
    mlp="mlp",
    mlp_out="mlp",
)
_GEMMA2 = Family(
    "gemma2",
    ("gemma2", "gemma3_text"),
    attn_out="post_attention_layernorm",
    z="self_attn.o_proj",
    ln2="pre_feedforward_layernorm",
    mlp="mlp",
    mlp_out="post_feedforward_layernorm",
    gain_offset=1.0,
)
_OPT = Family(
    "opt",
    ("opt",),
    decoder="model.decoder",
    final_norm="final_layer_norm",
    attn_out="self_attn",
    z="self_attn.out_proj",
    ln2="final_layer_norm",
    mlp="fc1",
    mlp_out="fc2",
    when=("do_layer_norm_before", True),
)
_PHI = Family(
    "phi",
    ("phi",),
    final_norm="final_layernorm",
    attn_out="self_attn",
    z="self_attn.dense",
    ln2="input_layernorm",
    mlp="mlp",
    mlp_out="mlp",
    lacks={"hook_resid_mid": PARALLEL},
)

FAMILIES: tuple[Family, ...] = (
    _GPT2,
    replace(_GPT2, name="gpt_neo", model_types=("gpt_neo",), z="attn.attention.out_proj"),
    _NEOX,
    replace(_NEOX, name="gpt_neox_sequential", when=("use_parallel_residual", False), lacks={}),
    _LLAMA,
    replace(_LLAMA, name="gemma", model_types=("gemma",), gain_offset=1.0),
    _GEMMA2,
    replace(_GEMMA2, name="gemma3_multimodal", model_types=("gemma3",), decoder="model.language_model"),
    _PHI,
    _OPT,
    replace(
        _OPT,
        name="opt_post_norm",
        ln2=None,
        when=("do_layer_norm_before", False),
        lacks={"hook_resid_mid": POST_NORM, "ln2.hook_normalized": POST_NORM},
    ),
)
"""The first row that fits wins."""
