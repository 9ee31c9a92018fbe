"""Small real models to steer: random ones of several families, and the trained one beside the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mistudio_engine.api.sae_config import StandardConfig
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.saes.standard import StandardSAE

N_CTX = 64
EOS = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens of one byte each and an end of text that is also its beginning, as GPT-2 has it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def _random(config_class: type, model_class: type, **sizes: int) -> LanguageModel:
    torch.manual_seed(7)
    config = config_class(vocab_size=257, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS, **sizes)
    hf = model_class(config)
    for parameter in hf.parameters():  # far from the flat logits of an initialisation
        parameter.data.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return LanguageModel(hf, byte_tokenizer(), name=config_class.__name__, folder=Path("nowhere"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gpt2() -> LanguageModel:
    """Learned positions."""
    return _random(GPT2Config, GPT2LMHeadModel, n_embd=32, n_layer=3, n_head=4, n_positions=N_CTX)


@pytest.fixture(scope="session")
def llama() -> LanguageModel:
    """Rotary positions, grouped queries."""
    return _random(
        LlamaConfig,
        LlamaForCausalLM,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=N_CTX,
    )


@pytest.fixture(scope="session")
def neox() -> LanguageModel:
    """Attention and MLP in parallel."""
    return _random(
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=N_CTX,
    )


@pytest.fixture(scope="session")
def gemma2() -> LanguageModel:
    """Every other layer sees the last four tokens only, so the cache forgets."""
    return _random(
        Gemma2Config,
        Gemma2ForCausalLM,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        max_position_embeddings=N_CTX,
    )


@pytest.fixture(scope="session")
def stories(shared: Path) -> LanguageModel:
    """A trained Llama of 260 thousand parameters that tells stories."""
    return LanguageModel.load(shared / "data" / "stories260K-hf")


@pytest.fixture(params=["gpt2", "llama", "neox", "gemma2", "stories"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """Each of them in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def sae() -> StandardSAE:
    """A random SAE for a width of 32, its decoder rows of various lengths."""
    torch.manual_seed(3)
    cfg = StandardConfig(d_in=32, d_sae=48, hook_name="blocks.1.hook_resid_post")
    W_dec = torch.randn(48, 32) * torch.linspace(0.2, 2.0, 48)[:, None]
    tensors = {"W_enc": torch.randn(32, 48), "W_dec": W_dec, "b_dec": torch.randn(32), "b_enc": torch.randn(48)}
    return StandardSAE(cfg, tensors)
