"""A tiny random language model with its tokens, and synthetic activations that are sparse in known directions."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.sae_config import SAEConfig, activation_of, parse_sae_config
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens, TokensInfo
from mistudio_engine.saes import SAE
from mistudio_engine.training import Member, Trainer, train
from mistudio_engine.training.loop import Stream

D_IN, D_SAE, D_VOCAB = 16, 48, 40
BOS, EOS, PAD = 0, 1, 2
HOOK = "blocks.1.hook_resid_post"
HOOK_OUT = "blocks.1.hook_mlp_out"


def tiny_lm(seed: int = 0) -> LanguageModel:
    """Two GPT-2 layers of width 16, random."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=D_IN, n_layer=2, n_head=2, n_positions=32, vocab_size=D_VOCAB, bos_token_id=BOS, eos_token_id=EOS,
        initializer_range=0.2,
    )  # fmt: skip
    words = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, **{f"w{i}": i for i in range(3, D_VOCAB)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    return LanguageModel(GPT2LMHeadModel(config), tokenizer, name="tiny", folder=Path("tiny"))


def packed(n_contexts: int = 24, context_size: int = 10, *, n_last: int | None = None, seed: int = 0) -> PackedTokens:
    """Random contexts that begin with BOS; the last one has `n_last` real tokens, an EOS stands here and there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, D_VOCAB, (n_contexts, context_size), generator=generator, dtype=torch.int32)
    ids[:, 0] = BOS
    ids[::3, context_size // 2] = EOS
    n_real = torch.full((n_contexts,), context_size, dtype=torch.int32)
    if n_last is not None:
        n_real[-1] = n_last
        ids[-1, n_last:] = PAD
    info = TokensInfo(
        context_size=context_size, n_contexts=n_contexts, n_tokens=int(n_real.sum()), n_documents=n_contexts,
        bos_policy="context", bos_token_id=BOS, separator_token_id=EOS, pad_token_id=PAD, special_ids=(BOS, EOS, PAD),
        d_vocab=D_VOCAB, tokenizer_hash="0",
    )  # fmt: skip
    return PackedTokens(ids, n_real, torch.full((n_contexts,), context_size, dtype=torch.int32), info)


def sparse_activations(n: int, d_in: int = D_IN, seed: int = 0) -> Tensor:
    """(n, d_in): a few of 2·d_in directions each, off centre."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2 * d_in, d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    return (torch.randn(n, 2 * d_in, generator=generator) - 1).relu() @ directions + 0.3


def transcoded(n: int, d_in: int = D_IN, d_out: int = D_IN, seed: int = 0) -> Tensor:
    """(n, d_out): what a transcoder can predict from `sparse_activations` of the same seed: the same few, along
    others."""
    codes = torch.Generator().manual_seed(seed)
    torch.randn(2 * d_in, d_in, generator=codes)
    directions = torch.randn(2 * d_in, d_out, generator=torch.Generator().manual_seed(seed + 1))
    directions /= directions.norm(dim=1, keepdim=True)
    return (torch.randn(n, 2 * d_in, generator=codes) - 1).relu() @ directions - 0.2


def both(cfg: SAEConfig, n: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """What an SAE of this config is trained on: activations, and for a transcoder its targets."""
    x = sparse_activations(n, cfg.d_in, seed)
    return x, transcoded(n, cfg.d_in, cfg.output_width, seed) if cfg.is_transcoder else None


class Synthetic:
    """A stream over fixed activations, in order, again and again; of one hook, or of several by name."""

    def __init__(self, buffer: Tensor | dict[str, Tensor], batch_size: int) -> None:
        self.buffer = buffer if isinstance(buffer, dict) else {HOOK: buffer}
        self.batch_size, self.at = batch_size, 0

    def batches(self) -> Iterator[dict[str, Tensor] | None]:
        yield None
        while True:
            n = len(next(iter(self.buffer.values())))
            start = self.at * self.batch_size % (n - self.batch_size + 1)
            self.at += 1
            yield {name: rows[start : start + self.batch_size] for name, rows in self.buffer.items()}

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def restore(self, state: dict[str, Any]) -> None:
        self.at = state["at"]

    def describe(self, hook_name: str) -> dict[str, Any]:
        return {"model_name": "synthetic", "hook_name": hook_name}


def config(architecture: str, d_in: int = D_IN, d_sae: int = D_SAE, **more: Any) -> SAEConfig:
    """A config of this architecture."""
    values: dict[str, Any] = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae}
    if activation_of(architecture) in ("topk", "batchtopk"):
        values["k"] = 4
    if architecture == "matryoshka_batchtopk":
        values["widths"] = [d_sae // 4, d_sae // 2, d_sae]
    if "transcoder" in architecture:
        values |= {"d_out": d_in, "apply_b_dec_to_input": False}
    return parse_sae_config(values | more)


def settings(**more: Any) -> Hyperparameters:
    """A short run of small batches."""
    return Hyperparameters(**({"n_tokens": 640, "batch_size": 32, "lr": 1e-3, "buffer_tokens": 160} | more))


def run(job: Generator[Progress, Signal | None, dict[str, SAE]]) -> tuple[list[Progress], SAE]:
    """All that a job yields, and the only SAE that it returns."""
    seen = []
    while True:
        try:
            seen.append(next(job))
        except StopIteration as end:
            (sae,) = end.value.values()
            return seen, sae


def stream_for(trainer: Trainer, n: int = 256, factor: float = 1.0) -> Synthetic:
    """Activations for a trainer's config, and targets where it wants some."""
    x, y = both(trainer.cfg, n)
    buffer = {HOOK: x * factor} if y is None else {HOOK: x * factor, HOOK_OUT: y * factor * 3}
    return Synthetic(buffer, trainer.hp.batch_size)


def member(trainer: Trainer, name: str = "sae", hook_name: str = HOOK) -> Member:
    """A trainer as one SAE of a training."""
    return Member(name, trainer, hook_name, HOOK_OUT if trainer.cfg.is_transcoder else None)


def alone(trainer: Trainer, stream: Stream, **more: Any) -> Generator[Progress, Signal | None, dict[str, SAE]]:
    """A training of one SAE."""
    return train([member(trainer)], stream, **more)
