"""Whether an evaluation gives SAELens's numbers: ours and its `run_evals` on one model, one SAE and the same token ids.

    python benchmarks/eval_parity.py --model FOLDER --peer PEER/bin/python [--text FILE] [--sae FOLDER] [--hook NAME]

PEER is an environment of its own with sae-lens 6.54; the two share files only, and neither goes to the network. Without
--sae a TopK SAE is made whose decoder rows are activations of the model. It prints a line a metric and exits with 1
when one differs by more than 1e-4 of itself.

SAELens runs with a single batch: its explained_variance_legacy and relative_reconstruction_bias depend on the batch,
and so does our legacy one; our bias does not. Both leave BOS and EOS out of every average, keep them when the SAE is
spliced in, zero them with all others, and count the loss of predicting an EOS. Nothing here is padding. What SAELens
cannot measure is not compared: a transcoder (it takes the input for the target) and a skip path (it leaves it out).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4
METRICS = {
    "l0": "l0",
    "l1": "l1",
    "mse": "mse",
    "explained_variance": "explained_variance",
    "explained_variance_legacy": "explained_variance_legacy",
    "cosine": "cossim",
    "l2_norm_in": "l2_norm_in",
    "l2_norm_out": "l2_norm_out",
    "l2_ratio": "l2_ratio",
    "relative_reconstruction_bias": "relative_reconstruction_bias",
    "ce_loss_clean": "ce_loss_without_sae",
    "ce_loss_sae": "ce_loss_with_sae",
    "ce_loss_zero": "ce_loss_with_ablation",
    "ce_loss_score": "ce_loss_score",
    "kl_div_with_sae": "kl_div_with_sae",
    "kl_div_with_ablation": "kl_div_with_ablation",
    "kl_div_score": "kl_div_score",
}
"""Our names, and SAELens's."""

FEATURES = {
    "density": "feature_density",
    "consistent_activation": "consistent_activation_heuristic",
    "encoder_norm": "encoder_norm",
    "encoder_bias": "encoder_bias",
    "encoder_decoder_cosine": "encoder_decoder_cosine_sim",
}
"""The same for the numbers of each feature; the largest difference counts, against the largest value."""


def ours(work: Path, arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Our numbers; leaves the SAE and the token ids in `work` for the other side."""
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.models.tokens import load_tokens, pack
    from mistudio_engine.saes import load_sae, save_sae
    from mistudio_engine.training.evaluation import measure

    lm = LanguageModel.load(arguments.model)
    documents = [part for part in arguments.text.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    n = arguments.n_contexts
    list(
        pack(
            documents,
            lm.tokenizer,
            work / "tokens",
            context_size=arguments.context_size,
            n_tokens=n * arguments.context_size,
        )
    )
    tokens = load_tokens(work / "tokens")
    if len(tokens) < n or int(tokens.n_real[n - 1]) < arguments.context_size:
        sys.exit(f"The text fills {len(tokens) - 1} contexts, fewer than {n}. Give a longer --text.")
    sae = load_sae(arguments.sae) if arguments.sae else made_of_activations(lm, tokens, arguments.hook)
    save_sae(sae, work / "sae")
    save_file({"ids": tokens.ids.long().contiguous()}, work / "ids.safetensors")
    (work / "what.json").write_text(
        json.dumps({"model": str(arguments.model.resolve()), "module": module_name(lm, arguments.hook)})
    )
    job = measure(lm, sae, tokens, hook_name=arguments.hook, n_tokens=n * arguments.context_size, batch=n)
    while True:
        try:
            next(job)
        except StopIteration as end:
            found = end.value
            break
    special = int((~tokens.mask(slice(None), special=False)).sum())
    print(
        f"{found.evaluation.n_tokens} tokens of text and {special} special ones in {n} contexts; {sae.cfg.architecture}"
    )
    features = {name: getattr(found.features, name) for name in FEATURES}
    return (
        {name: getattr(found.evaluation, name) for name in METRICS},
        {name: values for name, values in features.items() if values is not None},
    )


def made_of_activations(lm: Any, tokens: Any, hook: str) -> Any:
    """A TopK SAE without training: its rows are activations of random tokens, off their mean."""
    from mistudio_engine.api.sae_config import parse_sae_config
    from mistudio_engine.models.hooks import activations
    from mistudio_engine.saes import new_sae

    x = activations(lm, tokens.ids.long(), [hook])[hook][tokens.mask(slice(None), special=False)].float()
    d_in = x.shape[1]
    d_sae = min(8 * d_in, len(x))
    rows = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:d_sae]] - x.mean(dim=0)
    W_dec = rows / rows.norm(dim=1, keepdim=True)
    cfg = parse_sae_config({"architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": 16, "hook_name": hook})
    noise = torch.randn(d_in, d_sae, generator=torch.Generator().manual_seed(1)) * 0.02
    return new_sae(
        cfg,
        {"W_enc": W_dec.T * 0.15 + noise, "W_dec": W_dec, "b_dec": x.mean(dim=0), "b_enc": torch.full((d_sae,), -0.05)},
    )


def module_name(lm: Any, hook: str) -> str:
    """The module whose output is this hook, by the name that transformers gives it."""
    from mistudio_engine.models.hooks import check_hook

    point = check_hook(lm, hook)
    tap = lm.layout.taps[point.site]
    if tap.side != "output":
        sys.exit(
            f"SAELens hooks the outputs of a transformers model's modules, and {hook} is none. Use hook_resid_post."
        )
    module = lm.layout.blocks[point.layer].get_submodule(tap.path)
    return next(name for name, each in lm.hf.named_modules() if each is module)


class TokenStore:
    """As much of SAELens's ActivationsStore as its evaluation asks for: the same ids each time."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids
        self.store_batch_size_prompts, self.context_size = ids.shape

    def get_batch_tokens(self, _n: int) -> torch.Tensor:
        return self.ids

    def reset_input_dataset(self) -> None:
        """There is nothing to rewind."""


def theirs(work: Path) -> None:
    """SAELens's numbers, into theirs.json; runs in the other environment."""
    warnings.simplefilter("ignore")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.evals import get_eval_everything_config, run_evals  # pyright: ignore[reportMissingImports]
    from sae_lens.load_model import load_model  # pyright: ignore[reportMissingImports]
    from sae_lens.training.activation_scaler import ActivationScaler  # pyright: ignore[reportMissingImports]

    what = json.loads((work / "what.json").read_text())
    ids = load_file(work / "ids.safetensors")["ids"]
    sae = SAE.load_from_disk(work / "sae")
    sae.cfg.metadata.hook_name = what["module"]
    model = load_model("AutoModelForCausalLM", what["model"], device="cpu", hook_names=[what["module"]])
    scalars, features = run_evals(
        sae=sae,
        activation_store=TokenStore(ids),
        model=model,
        activation_scaler=ActivationScaler(),
        eval_config=get_eval_everything_config(
            batch_size_prompts=len(ids), n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1
        ),
    )
    flat = {name: value for group in scalars.values() for name, value in group.items()}
    (work / "theirs.json").write_text(json.dumps({"scalars": flat, "features": features}))


def compare(work: Path, arguments: argparse.Namespace) -> bool:
    """Both sides and a table; whether they agree."""
    our_scalars, our_features = ours(work, arguments)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ended = subprocess.run(
        [arguments.peer, __file__, "--theirs", work], env=environment, timeout=600, capture_output=True, text=True
    )
    if ended.returncode:
        sys.exit(f"SAELens's side failed:\n{ended.stderr}")
    found = json.loads((work / "theirs.json").read_text())
    agree = True
    print(f"{'metric':<30} {'ours':>14} {'SAELens':>14} {'difference':>12}")
    for name, theirs_name in METRICS.items():
        a, b = our_scalars[name], found["scalars"][theirs_name]
        difference = abs(a - b) / max(abs(b), 1e-12)
        agree &= difference <= TOLERANCE
        print(f"{name:<30} {a:>14.7g} {b:>14.7g} {difference:>12.1e}")
    for name, values in our_features.items():
        other = torch.tensor([0.0 if math.isnan(v) else v for v in found["features"][FEATURES[name]]])
        scale = float(other.abs().max().clamp_min(1e-12))
        difference = float((values.float() - other).abs().max()) / scale
        agree &= difference <= TOLERANCE
        shown = f"{name} ({len(values)})"
        print(f"{shown:<30} {float(values.float().mean()):>14.7g} {float(other.mean()):>14.7g} {difference:>12.1e}")
    print("All agree." if agree else f"Some differ by more than {TOLERANCE:g}.")
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a language model's folder in Hugging Face's layout")
    parser.add_argument("--peer", help="a Python that has sae-lens")
    parser.add_argument("--text", type=Path, default=ROOT / "README.md", help="UTF-8; documents end at empty lines")
    parser.add_argument("--sae", type=Path, help="an SAE's folder; without it one is made")
    parser.add_argument("--hook", default="blocks.2.hook_resid_post")
    parser.add_argument("--n-contexts", type=int, default=16)
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.theirs:
        theirs(arguments.theirs)
        return
    if not arguments.model or not arguments.peer:
        parser.error("--model and --peer are needed")
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as work:
        if not compare(Path(work), arguments):
            sys.exit(1)


if __name__ == "__main__":
    main()
