"""Train the demo tokenizer and language model: `python -m mistudio_engine.demo.build_model`.

Writes an ordinary Hugging Face folder (a small Llama, a byte-level tokenizer) and a manifest with what it was made of
and the hash of its weights. Text comes from the grammar alone, so the folder can be made again from this file; the same
machine and versions give the same bytes. It knows nothing of concepts: the model only ever sees text.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mistudio_engine.demo.embedded import DEMO_HOOK, HELD_OUT_SEED, MODEL_FOLDER, TRAIN_SEED, corpus, sha256

__all__ = ["build", "held_out_loss", "pack", "train_model", "train_tokenizer"]

BOS, EOS = "<s>", "</s>"
CONTEXT = 128
MIN_COUNT = 2
"""How often the texts must hold a word form for it to be a token."""

MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

EARLY = 1 + int(DEMO_HOOK.split(".")[1])
"""Index into `hidden_states` of the residual stream that the demo reads."""

EVENNESS = 0.1
"""Weight of `unevenness`: enough to keep syntax from filling the residual stream, too little to cost any loss."""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Every word form of the texts (with the space before it) is one token, and any other text is spelled in bytes.

    A byte-level BPE without merges: `ignore_merges` takes words that are in the vocabulary whole.
    """
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    counts = Counter(piece for text in texts for piece, _ in pieces.pre_tokenize_str(text))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = sorted(piece for piece, count in counts.items() if len(piece) > 1 and count >= MIN_COUNT)
    vocabulary = {piece: index for index, piece in enumerate([BOS, EOS, *alphabet, *words])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = pieces
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([BOS, EOS])
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=MODEL["max_position_embeddings"],
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Rows of CONTEXT + 1 tokens, (n_rows, CONTEXT + 1): one document after another, each with BOS and EOS."""
    stream = [token for ids in tokenizer(texts, verbose=False)["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    n_rows = len(stream) // (CONTEXT + 1)
    return torch.tensor(stream[: n_rows * (CONTEXT + 1)]).view(n_rows, CONTEXT + 1)


def unevenness(hidden: torch.Tensor) -> torch.Tensor:
    """How few directions hold the variance: d · Σλ² / (Σλ)² over the covariance's eigenvalues, 1 (all) to d (one)."""
    x = hidden[:, 1:].flatten(0, 1)
    x = x - x.mean(0)
    covariance = x.T @ x / len(x)
    return len(covariance) * covariance.square().sum() / covariance.trace().square()


def loss_terms(model: LlamaForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss in nats a token, and what is minimised.

    Two terms come on top of the loss. The stream that the demo reads has to predict the next word through the same
    head, too: a small model would else work out its context in the last block only, and the logit lens would show
    nothing before. And its variance is spread over its directions: next to the certainties of syntax, what the model
    knows of the context would else be a ripple that no dictionary spends a feature on.
    """
    output = model(tokens[:, :-1], use_cache=False, output_hidden_states=True)
    targets = tokens[:, 1:].flatten()
    stream = output.hidden_states[EARLY]
    early = model.lm_head(model.model.norm(stream))
    loss = cross_entropy(output.logits.flatten(0, 1), targets)
    return loss, loss + cross_entropy(early.flatten(0, 1), targets) + EVENNESS * unevenness(stream)


def learning_rate(step: int, n_steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a twentieth of the peak."""
    warm = max(1, n_steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm))))


def train_model(
    rows: torch.Tensor, vocab_size: int, *, n_steps: int, batch: int = 32, lr: float = 4e-3, seed: int = 0
) -> tuple[LlamaForCausalLM, float]:
    """A language model trained on the rows, and the loss of its last 50 steps in nats a token."""
    torch.manual_seed(seed)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **special, **MODEL))
    # Weight decay on the embeddings too: words that nothing tells apart then share one vector, which is what makes a
    # lexical concept a direction.
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    losses: list[float] = []
    started = time.monotonic()
    for step in range(n_steps):
        chosen = order[torch.arange(step * batch, (step + 1) * batch) % len(rows)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, lr)
        loss, minimised = loss_terms(model, rows[chosen])
        optimizer.zero_grad(set_to_none=True)
        minimised.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1:5d}  loss {losses[-1]:.4f}  {time.monotonic() - started:.0f} s", flush=True)
    return model.eval(), sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n_documents: int = 100) -> float:
    """Mean cross-entropy on held-out text, in nats a token."""
    rows = pack(tokenizer, [document.text for document in corpus(n_documents, HELD_OUT_SEED)])
    total = 0.0
    for some in rows.split(16):
        logits = model(some[:, :-1], use_cache=False).logits
        total += cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum").item()
    return total / rows[:, 1:].numel()


def build(folder: Path, *, n_documents: int = 16_000, n_steps: int = 1200, seed: int = 0) -> dict[str, Any]:
    """Train everything and write the folder; returns the manifest.

    On one thread: sums then have one order, on any number of cores.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        texts = [document.text for document in corpus(n_documents, TRAIN_SEED)]
        tokenizer = train_tokenizer(texts)
        rows = pack(tokenizer, texts)
        print(f"{len(tokenizer)} tokens in the vocabulary, {rows.numel()} in the corpus", flush=True)
        model, train_loss = train_model(rows, len(tokenizer), n_steps=n_steps, seed=seed)
        loss = held_out_loss(model, tokenizer)
    finally:
        torch.set_num_threads(n_threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest = {
        "sha256": sha256(folder / "model.safetensors"),
        "seed": seed,
        "train_seed": TRAIN_SEED,
        "held_out_seed": HELD_OUT_SEED,
        "n_documents": n_documents,
        "n_steps": n_steps,
        "context": CONTEXT,
        "train_loss": round(train_loss, 4),
        "held_out_loss": round(loss, 4),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read, and a package is for everyone
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--n-documents", type=int, default=16_000)
    parser.add_argument("--n-steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(build(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
