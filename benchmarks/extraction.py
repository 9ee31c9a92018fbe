"""How long the feature data of all features takes, beside sae-dashboard 0.8.0 in an environment of its own.

    python benchmarks/extraction.py [--peer PEER/bin/python] [--only dashboard,curve] [--features 256]

`dashboard`: 131,072 random tokens through a GPT-2 of five layers and width 64, an SAE of 4096 features of which one in
a hundred fires. Both sides read the same weights, tokens and SAE; theirs does some features and is extrapolated, as it
passes over all tokens again for every 128 of them. Density, maxima, histograms, logits and top examples are compared
before any ratio is printed. `curve`: our time and memory with d_sae from 1k to 32k at the same number of active
features, beside that of the encoder's matrix product alone. Two threads; only ratios mean anything.

PEER needs torch 2.13.0, sae-dashboard 0.8.0 and pyarrow below 21, without torchvision and torchaudio.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

THREADS = 2
N_CONTEXTS, CONTEXT = 1024, 128
D_MODEL, D_VOCAB, D_SAE, BOS = 64, 512, 4096, 1
HOOK = "blocks.2.hook_resid_post"
N_TOP, N_LOGITS, N_BINS = 20, 10, 50

LIMITS = {"density": 1e-5, "max": 1e-4, "histogram": 0.05, "logits": 1e-3, "top examples": 1e-4}
"""Largest differences between the two sides. That of the top examples is between the values of the same contexts, or,
where a context stands in one list only, between its value and the last one's: so the lists are equal but for ties."""


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="python of an environment with sae-dashboard 0.8.0")
    parser.add_argument("--only", default="dashboard,curve")
    parser.add_argument("--features", type=int, default=256, help="features that sae-dashboard does")
    parser.add_argument("--one", help="internal: a measurement as JSON, run in this process")
    arguments = parser.parse_args()
    if arguments.one:
        request = json.loads(arguments.one)
        print("RESULT " + json.dumps(globals()[request.pop("what")](**request)))
        return
    wanted = arguments.only.split(",")
    with tempfile.TemporaryDirectory() as folder:
        if "dashboard" in wanted:
            beside_the_dashboard(Path(folder), arguments.peer, arguments.features)
        if "curve" in wanted:
            curve()


def measured(python: str, what: str, **request: Any) -> Any:
    """One measurement in a fresh process."""
    command = [python, __file__, "--one", json.dumps({"what": what, **request})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(f"{what} {request} failed:\n{done.stderr[-3000:]}")


def beside_the_dashboard(folder: Path, peer: str | None, n_features: int) -> None:
    """Both sides on the same case, taking turns."""
    measured(sys.executable, "make_case", folder=str(folder))
    seconds, theirs_seconds = [], []
    for _ in range(2):
        seconds.append(measured(sys.executable, "ours", folder=str(folder), n_features=n_features)["seconds"])
        if peer:
            theirs_seconds.append(measured(peer, "theirs", folder=str(folder), n_features=n_features)["seconds"])
    print(f"{N_CONTEXTS * CONTEXT:,} tokens, {D_SAE} features: {min(seconds):.1f} s for all of them")
    if theirs_seconds:
        compare(folder, n_features)
        theirs = min(theirs_seconds) * D_SAE / n_features
        print(f"    sae-dashboard: {theirs:.0f} s, from {n_features} features: {theirs / min(seconds):.0f} ×")


def make_case(folder: str) -> dict[str, Any]:
    """A random GPT-2, random tokens, and an SAE whose features fire on one token in a hundred."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    config = GPT2Config(n_layer=5, n_embd=D_MODEL, n_head=8, n_positions=CONTEXT, vocab_size=D_VOCAB)
    config.bos_token_id = config.eos_token_id = BOS
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # else all tokens are nearly alike
    model.save_pretrained(Path(folder) / "model")
    tokens = torch.randint(3, D_VOCAB, (N_CONTEXTS, CONTEXT))
    tokens[:, 0] = BOS
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL), dim=1)
    with torch.no_grad():
        x = model(tokens[:64], output_hidden_states=True).hidden_states[3].reshape(-1, D_MODEL)
        pre = x @ W_dec.T
        b_enc = -torch.cat([part.quantile(0.99, dim=0) for part in pre.split(512, dim=1)])
    torch.save({"tokens": tokens, "W_dec": W_dec, "b_enc": b_enc}, Path(folder) / "case.pt")
    return {}


def ours(folder: str, n_features: int) -> dict[str, Any]:
    """Statistics, histograms, top tokens, examples, partners and logits of all features, written to disk."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    from mistudio_engine.api.sae_config import StandardConfig
    from mistudio_engine.discovery.extraction import extract
    from mistudio_engine.discovery.logit_lens import logit_lens
    from mistudio_engine.models.language_model import LanguageModel, unembedding
    from mistudio_engine.saes.standard import StandardSAE

    torch.set_num_threads(THREADS)
    case = torch.load(Path(folder) / "case.pt", weights_only=True)
    vocabulary = {f"t{number}": number for number in range(D_VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="t1", eos_token="t1")
    lm = LanguageModel(GPT2LMHeadModel.from_pretrained(Path(folder) / "model"), tokenizer, name="case", folder=Path())
    W_dec = case["W_dec"]
    cfg = StandardConfig(
        d_in=D_MODEL,
        d_sae=D_SAE,
        hook_name=HOOK,
        model_name="case",
        apply_b_dec_to_input=False,
        normalize_activations="none",
    )
    tensors = {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec, "b_enc": case["b_enc"], "b_dec": torch.zeros(D_MODEL)}
    sae = StandardSAE(cfg, tensors)
    with tempfile.TemporaryDirectory() as target:
        began = time.perf_counter()
        store = finished(extract(lm, sae, packed(case["tokens"]), HOOK, Path(target) / "x", n_examples=N_TOP))
        W_U, _ = unembedding(lm)
        lens = finished(logit_lens(W_dec, W_U, k=N_LOGITS, n_bins=N_BINS))
        seconds = time.perf_counter() - began
        found = [
            {
                "n_active": store.feature(f).n_active,
                "max": store.feature(f).max,
                "log_counts": store.log_histogram(f).tolist(),
                "top": [[each.context, each.position, each.value] for each in store.examples(f, "top")],
                "promoted": [lens.promoted_ids[f].tolist(), lens.promoted_values[f].tolist()],
                "suppressed": [lens.suppressed_ids[f].tolist(), lens.suppressed_values[f].tolist()],
                "logit_counts": lens.histogram_counts[f].tolist(),
            }
            for f in range(n_features)
        ]
    (Path(folder) / "ours.json").write_text(json.dumps(found))
    return {"seconds": seconds}


def theirs(folder: str, n_features: int) -> dict[str, Any]:
    """sae-dashboard's feature data of some features, by its own runner."""
    import torch
    from sae_dashboard.components_config import (
        ActsHistogramConfig,
        Column,
        FeatureTablesConfig,
        LogitsHistogramConfig,
        LogitsTableConfig,
        SequencesConfig,
    )
    from sae_dashboard.layout import SaeVisLayoutConfig
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(THREADS)
    case = torch.load(Path(folder) / "case.pt", weights_only=True)
    config = HookedTransformerConfig(
        n_layers=5,
        d_model=D_MODEL,
        n_ctx=CONTEXT,
        d_head=8,
        n_heads=8,
        d_mlp=4 * D_MODEL,
        d_vocab=D_VOCAB,
        act_fn="gelu_new",
        normalization_type="LN",
        device="cpu",
    )
    model = HookedSAETransformer(config)
    state = convert_gpt2_weights(GPT2LMHeadModel.from_pretrained(Path(folder) / "model"), config)
    model.load_state_dict(state, strict=False)
    metadata = SAEMetadata(hook_name=HOOK, model_name="case", prepend_bos=False)
    sae = StandardSAE(
        StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, device="cpu", apply_b_dec_to_input=False, metadata=metadata)
    )
    with torch.no_grad():
        sae.W_dec.copy_(case["W_dec"])
        sae.W_enc.copy_(case["W_dec"].T)
        sae.b_enc.copy_(case["b_enc"])
    sequences = SequencesConfig(
        stack_mode="stack-all",
        buffer=None,
        compute_buffer=True,
        n_quantiles=5,
        top_acts_group_size=N_TOP,
        quantile_group_size=5,
    )
    columns = (
        sequences,
        ActsHistogramConfig(n_bins=N_BINS),
        LogitsHistogramConfig(n_bins=N_BINS),
        LogitsTableConfig(n_rows=N_LOGITS),
        FeatureTablesConfig(n_rows=3),
    )
    layout = SaeVisLayoutConfig(columns=[Column(*columns)])
    found, seconds = [], 0.0
    for start in range(0, n_features, 128):
        features = list(range(start, min(n_features, start + 128)))
        visual = SaeVisConfig(
            hook_point=HOOK,
            features=features,
            minibatch_size_features=128,
            minibatch_size_tokens=64,
            quantile_feature_batch_size=64,
            verbose=False,
            device="cpu",
            feature_centric_layout=layout,
            perform_ablation_experiments=False,
            dtype="float32",
            cache_dir=None,
            ignore_tokens={BOS},
            ignore_positions=[],
            use_dfa=False,
        )
        began = time.perf_counter()
        data = SaeVisRunner(visual).run(encoder=sae, model=model, tokens=case["tokens"])
        seconds += time.perf_counter() - began
        for place, f in enumerate(features):
            of = data.feature_data_dict[f]
            found.append(
                {
                    "density": float(of.acts_histogram_data.title.partition("DENSITY = ")[2].rstrip("%")) / 100,
                    "max": data.feature_stats.max[place],
                    "bar_values": of.acts_histogram_data.bar_values,
                    "bar_heights": of.acts_histogram_data.bar_heights,
                    "top": [
                        [each.original_index, each.qualifying_token_index, max(each.feat_acts), each.token_ids]
                        for each in of.sequence_data.seq_group_data[0].seq_data
                    ],
                    "promoted": [of.logits_table_data.top_token_ids, of.logits_table_data.top_logits],
                    "suppressed": [of.logits_table_data.bottom_token_ids, of.logits_table_data.bottom_logits],
                    "logit_heights": of.logits_histogram_data.bar_heights,
                }
            )
    (Path(folder) / "theirs.json").write_text(json.dumps(found))
    return {"seconds": seconds}


def compare(folder: Path, n_features: int) -> None:
    """Print how far the two sides are apart; stop if they are not of the same thing."""
    import numpy as np
    import torch

    from mistudio_engine.discovery.histogram import linear_histogram

    mine, other = (json.loads((folder / f"{side}.json").read_text()) for side in ("ours", "theirs"))
    tokens = torch.load(folder / "case.pt", weights_only=True)["tokens"].tolist()
    context_of = {tuple(row[1:]): number for number, row in enumerate(tokens)}  # theirs shows no first token
    n_all = N_CONTEXTS * CONTEXT
    worst = dict.fromkeys(LIMITS, 0.0)
    n_same_tokens = n_same_order = n_logit_bins = 0
    for a, b in zip(mine, other, strict=True):
        # Theirs is printed with three decimals of a percent.
        worst["density"] = max(worst["density"], abs(a["n_active"] / n_all - b["density"]))
        worst["max"] = max(worst["max"], abs(a["max"] - b["max"]) / b["max"])
        # Theirs reaches from the smallest activation to the largest: the same range is cut out of our log bins.
        step = b["bar_values"][1] - b["bar_values"][0]
        edges = np.array([b["bar_values"][0] - step / 2, *(value + step / 2 for value in b["bar_values"])])
        fine = linear_histogram(np.array(a["log_counts"]), a["max"], 20_000)
        below = np.interp(edges, fine.edges, np.append(0, np.cumsum(fine.counts)))
        gap = np.abs(below - np.append(0, np.cumsum(b["bar_heights"]))).max()
        worst["histogram"] = max(worst["histogram"], gap / a["n_active"])
        for end in ("promoted", "suppressed"):
            n_same_tokens += a[end][0] == b[end][0]
            gap = np.abs(np.array(a[end][1]) - np.array(b[end][1])).max()
            worst["logits"] = max(worst["logits"], float(gap))
        n_logit_bins += int(np.abs(np.array(a["logit_counts"]) - np.array(b["logit_heights"])).sum())
        best: dict[int, float] = {}
        for _, _, value, ids in b["top"]:
            best.setdefault(context_of[tuple(ids)], value)
        ranked = {context: value for context, _, value in a["top"][: len(best)]}
        n_same_order += list(ranked) == list(best)
        # Theirs is rounded to four decimals, and what is as strong as the last one may stand in either list.
        last = min(best.values())
        gaps = (abs(ranked.get(context, last) - best.get(context, last)) for context in ranked.keys() | best.keys())
        worst["top examples"] = max(worst["top examples"], *gaps)
    print(
        f"    largest differences over {n_features} features: "
        f"density {worst['density']:.1e} (theirs is rounded to 5e-6),"
    )
    print(
        f"    maximum {worst['max']:.1e} relative, histogram {worst['histogram']:.1%} of the activations at any edge,"
    )
    print(f"    logits {worst['logits']:.1e}, top examples {worst['top examples']:.1e}")
    print(f"    same top and bottom tokens: {n_same_tokens} of {2 * n_features} lists")
    print(f"    same order of top contexts, ties included: {n_same_order} of {n_features} lists")
    print(f"    logit histogram: {n_logit_bins} of {n_features * D_VOCAB} tokens in another bin")
    apart = [name for name, limit in LIMITS.items() if not worst[name] <= limit]
    if n_same_tokens < 2 * n_features:
        apart.append("top and bottom tokens")
    if apart:
        raise SystemExit(f"the two sides do not agree: {', '.join(apart)}")


def curve() -> None:
    """Time and memory with the width, at 32 active features a token."""
    print("d_sae  tokens/s  encoder product's tokens/s  share  memory over model and SAE")
    for d_sae in (1024, 2048, 4096, 8192, 16384, 32768):
        row = measured(sys.executable, "width", d_sae=d_sae)
        share = row["tokens_per_second"] / row["product"]
        print(
            f"{d_sae:>5} {row['tokens_per_second']:>9,.0f} {row['product']:>15,.0f} {share:>17.0%} "
            f"{row['n_bytes'] / 2**20:>12,.0f} MiB"
        )


def width(d_sae: int) -> dict[str, Any]:
    """One point of the curve: a TopK SAE on random activations of a model without layers worth mentioning."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from mistudio_engine.api.sae_config import TopKConfig
    from mistudio_engine.discovery.extraction import extract
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.saes.topk import TopKSAE

    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    d_in, n_contexts = 512, 256
    config = GPT2Config(n_layer=1, n_embd=d_in, n_head=8, n_positions=CONTEXT, vocab_size=D_VOCAB)
    config.bos_token_id = config.eos_token_id = BOS
    backend = Tokenizer(models.WordLevel({f"t{number}": number for number in range(D_VOCAB)}, unk_token="t2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="t1", eos_token="t1")
    lm = LanguageModel(GPT2LMHeadModel(config).eval(), tokenizer, name="case", folder=Path())
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
    hook = "blocks.0.hook_resid_post"
    cfg = TopKConfig(d_in=d_in, d_sae=d_sae, k=32, hook_name=hook, model_name="case")
    zeros = {"b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_in)}
    sae = TopKSAE(cfg, {"W_enc": W_dec.T.contiguous(), "W_dec": W_dec, **zeros})
    tokens = torch.randint(3, D_VOCAB, (n_contexts, CONTEXT))
    tokens[:, 0] = BOS
    x = torch.randn(2048, d_in)
    x @ sae.W_enc
    began = time.perf_counter()
    for _ in range(4):
        x @ sae.W_enc
    product = 4 * len(x) / (time.perf_counter() - began)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as target:
        began = time.perf_counter()
        store = finished(extract(lm, sae, packed(tokens), hook, Path(target) / "x"))
        seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens_per_second": store.info.n_tokens / seconds,
        "product": product,
        "n_bytes": 1024 * (after - before),
    }


def packed(ids: Any) -> Any:
    """Contexts as our packed tokens."""
    import torch

    from mistudio_engine.models.tokens import PackedTokens, TokensInfo

    info = TokensInfo(
        context_size=ids.shape[1],
        n_contexts=len(ids),
        n_tokens=ids.numel(),
        n_documents=1,
        bos_policy="context",
        bos_token_id=BOS,
        separator_token_id=BOS,
        pad_token_id=BOS,
        special_ids=(BOS,),
        d_vocab=D_VOCAB,
        tokenizer_hash="0" * 64,
    )
    n_real = torch.full((len(ids),), ids.shape[1], dtype=torch.int32)
    return PackedTokens(ids.to(torch.int32), n_real, torch.tensor([ids.numel()], dtype=torch.int32), info)


def finished(steps: Any) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


if __name__ == "__main__":
    main()
