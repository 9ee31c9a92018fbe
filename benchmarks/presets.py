"""What the presets give: one training of all architectures and presets on one pass of a model.

    python benchmarks/presets.py --model FOLDER --text FILE [FILE ...] [--d-sae N] [--n-tokens N] [--l1 0.1,0.2]

Prints L0, FVU and the share of dead features on held-out text for each; with --l1, for these coefficients, as a share
of the root of the input's width, instead: that is how the presets' own were found. The middle layer's residual stream
is read.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from mistudio_engine.api.presets import L1_PER_ROOT_WIDTH, PRESETS
from mistudio_engine.api.sae_config import activation_of, parse_sae_config
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens, load_tokens, pack
from mistudio_engine.training import ActivationStream, LiveActivations, Member, Trainer, evaluate, train

ARCHITECTURES = ("topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "standard", "gated")
HELD_OUT = 128
BATCH = 1024


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, nargs="+")
    parser.add_argument("--d-sae", type=int)
    parser.add_argument("--n-tokens", type=int, default=1_000_000)
    parser.add_argument("--only", default=",".join(ARCHITECTURES))
    parser.add_argument("--l1", help="coefficients for standard and gated, instead of the presets")
    arguments = parser.parse_args()
    lm = LanguageModel.load(Path(arguments.model))
    tokens = tokenised(lm, arguments.text)
    hook = f"blocks.{lm.n_layers // 2}.hook_resid_post"
    n_train = len(tokens) - HELD_OUT
    stream = ActivationStream(
        LiveActivations(lm, tokens, [hook], n_train), [hook], batch_size=BATCH, buffer_tokens=65_536, seed=0
    )
    d_in = stream.widths[hook]
    d_sae = arguments.d_sae or 8 * d_in
    members = [
        Member(name, Trainer(*settings(architecture, words, d_in, d_sae, arguments.n_tokens)), hook)
        for name, architecture, words in wanted(arguments.l1)
        if architecture in arguments.only.split(",")
    ]
    started = time.monotonic()
    saes = finished(train(members, stream))
    print(f"{lm.name} {hook}, {d_in} → {d_sae}, {arguments.n_tokens:,} tokens, {time.monotonic() - started:.0f} s")
    for name, sae in saes.items():
        found = finished(evaluate(lm, sae, tokens, hook_name=hook, contexts=slice(n_train, len(tokens))))
        quality = f"FVU {found.fvu:.3f}  CE {found.ce_loss_score:.3f}  dead {found.dead_fraction:.1%}"
        print(f"{name:34} L0 {found.l0:6.1f}  {quality}")


def wanted(l1: str | None) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, architecture and settings of each."""
    if l1:
        return [
            (f"{architecture} l1 {each} √d", architecture, {**settings_of(architecture), "per_root_width": float(each)})
            for architecture in ("standard", "gated")
            for each in l1.split(",")
        ]
    return [
        (f"{architecture} {preset}", architecture, {**words, **per_root_width(architecture, preset)})
        for architecture in ARCHITECTURES
        for preset, words in PRESETS[activation_of(architecture)].items()
    ]


def settings_of(architecture: str) -> dict[str, Any]:
    """What the presets of an architecture with an L1 penalty have in common."""
    return PRESETS[activation_of(architecture)]["balanced"]


def per_root_width(architecture: str, preset: Any) -> dict[str, float]:
    """The L1 penalty's weight as a share of the root of the width, where there is one."""
    found = L1_PER_ROOT_WIDTH.get(activation_of(architecture))
    return {"per_root_width": found[preset]} if found else {}


def settings(architecture: str, words: dict[str, Any], d_in: int, d_sae: int, n_tokens: int) -> tuple[Any, Any]:
    """Config and hyperparameters."""
    cfg: dict[str, Any] = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae}
    if "k" in words:
        cfg["k"] = words.pop("k")
    if "per_root_width" in words:
        words["l1_coefficient"] = words.pop("per_root_width") * d_in**0.5
    if architecture == "matryoshka_batchtopk":
        cfg["widths"] = [d_sae // 16, d_sae // 4, d_sae]
    return parse_sae_config(cfg), Hyperparameters(n_tokens=n_tokens, batch_size=BATCH, log_interval=1000, **words)


def tokenised(lm: LanguageModel, files: list[str]) -> PackedTokens:
    """The texts, in paragraphs."""
    paragraphs = [
        part
        for file in files
        for part in Path(file).read_text(encoding="utf-8", errors="ignore").split("\n\n")
        if part.strip()
    ]
    folder = Path(tempfile.mkdtemp()) / "tokens"
    for _ in pack(paragraphs, lm.tokenizer, folder, context_size=128):
        pass
    return load_tokens(folder)


def finished(work: Any) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


if __name__ == "__main__":
    main()
