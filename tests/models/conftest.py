"""A tiny, randomly initialised model of every family, with a tokenizer of 256 bytes and four special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.vocabulary import byte_alphabet

D_VOCAB = 260
MARKS = {"bos_token_id": 256, "eos_token_id": 257}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": D_VOCAB,
    **MARKS,
    "pad_token_id": 258,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 12}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}

# Family name in the table, or a family that has no row → model_type, configuration.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "gpt2",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": D_VOCAB, **MARKS},
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "vocab_size": D_VOCAB,
            **MARKS,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
        },
    ),
    "gpt_neox": ("gpt_neox", {**SIZES, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", {**SIZES, "use_parallel_residual": False}),
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 12}),
    "phi3": ("phi3", GROUPED),
    "bitnet": ("bitnet", GROUPED),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", {**GEMMA, "sliding_window": 4}),
    "gemma3_text": (
        "gemma3_text",
        {**GEMMA, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "gemma3_multimodal": (
        "gemma3",
        {
            "text_config": {"model_type": "gemma3_text", **GEMMA},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "phi": ("phi", SIZES),
    "opt": ("opt", {**OPT, "do_layer_norm_before": True}),
    "opt_post_norm": ("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def byte_tokenizer(**marks: str) -> PreTrainedTokenizerFast:
    """Every byte is a token, its id its value; then <s>, </s>, <pad>, <mark>."""
    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<mark>"])
    marks = marks or {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<mark>"], **marks)


def tiny(model_type: str, config: dict[str, Any], *, name: str = "tiny") -> LanguageModel:
    """A model with random weights, its gains and biases away from one and zero."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return LanguageModel(hf, byte_tokenizer(), name=name, folder=Path(name))


_made: dict[str, LanguageModel] = {}


@pytest.fixture(params=list(CONFIGS))
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """One model of every family in turn."""
    if request.param not in _made:
        _made[request.param] = tiny(*CONFIGS[request.param], name=request.param)
    return _made[request.param]


@pytest.fixture
def llama() -> LanguageModel:
    return _made.setdefault("llama", tiny(*CONFIGS["llama"], name="llama"))


@pytest.fixture
def make_tiny() -> Any:
    return tiny


@pytest.fixture
def make_tokenizer() -> Any:
    return byte_tokenizer


@pytest.fixture
def tiny_configs() -> dict[str, tuple[str, dict[str, Any]]]:
    return CONFIGS


@pytest.fixture
def ids() -> torch.Tensor:
    """(2, 12) ids, BOS first."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 256, (2, 11), generator=generator)
    return torch.cat([torch.full((2, 1), 256), text], dim=1)


@pytest.fixture(params=["stories260K-hf", "bitllama-3M-hf"])
def real_lm(request: pytest.FixtureRequest, shared: Path) -> LanguageModel:
    """The two trained models beside the project."""
    if request.param not in _made:
        _made[request.param] = LanguageModel.load(shared / "data" / request.param)
    return _made[request.param]
