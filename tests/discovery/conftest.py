"""Small real models for the tests of discovery.

The trick of `planted`: blocks.0.hook_resid_pre of a Llama is the embedding row, untouched, and an SAE with an identity
encoder passes it on. So any table of activations can be driven through a real model and a real SAE, without rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from discovery_data import HOOK, TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mistudio_engine.api.sae_config import StandardConfig
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.saes.base import SAE
from mistudio_engine.saes.standard import StandardSAE


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with words whole, <s> = 0 for BOS and </s> = 1 for EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


class Planted(NamedTuple):
    lm: LanguageModel
    sae: SAE


@pytest.fixture
def planted(tokenizer) -> Callable[[Tensor], Planted]:
    """`planted(table)`: a model and an SAE whose feature activations on token id i are table[i], (d_vocab, d_sae)."""

    def make(table: Tensor) -> Planted:
        d_vocab, d_sae = table.shape
        width = d_sae + d_sae % 2
        torch.manual_seed(0)
        hf = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=d_vocab,
                hidden_size=width,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=256,
                tie_word_embeddings=False,
            )
        )
        hf.model.embed_tokens.weight.data.zero_()[:, :d_sae] = table
        lm = LanguageModel(hf, tokenizer, name="planted", folder=Path("planted"))
        eye = torch.eye(width, d_sae)
        cfg = StandardConfig(d_in=width, d_sae=d_sae, hook_name=HOOK, model_name="planted")
        tensors = {"W_enc": eye, "W_dec": eye.T, "b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(width)}
        return Planted(lm, StandardSAE(cfg, tensors))

    return make
