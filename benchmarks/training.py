"""How fast SAEs train, beside SAELens's own trainer in an environment of its own, on the same activations.

    python benchmarks/training.py --peer PEER/bin/python [--model FOLDER --text FILE] [--only topk,loss,...]

Each measurement is a process of its own; ours and theirs take turns, and medians over the rounds are compared. Only the
ratios mean anything. Without --peer our side alone is printed; without --model no rows on real activations.

The activations are synthetic and sparse: of 2·d directions about one in fifteen is on. Two threads on a CPU; on a GPU
(--device cuda) the sizes of Gemma-2-2B, batch 8192.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

THREADS = 2
ROUNDS = 3
K = 32
L0_COEFFICIENTS = {"standard": {"l1_coefficient": 1.0}, "jumprelu": {"l0_coefficient": 1.0}}


def main() -> None:
    """Run what was asked for and print a table a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="python of an environment with sae-lens 6.54")
    parser.add_argument("--model", help="folder of a language model, for the rows on real activations")
    parser.add_argument("--text", help="text file for them")
    parser.add_argument("--only", default="topk,standard,jumprelu,sparse,loss,several,memory,curve")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", help="internal: a measurement as JSON, run in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT " + json.dumps(measure(json.loads(arguments.one))))
        return
    wanted = arguments.only.split(",")
    bench = Bench(arguments.peer, arguments.device)
    if "topk" in wanted:
        bench.topk()
    for architecture in ("standard", "jumprelu"):
        if architecture in wanted:
            bench.dense(architecture)
    if "sparse" in wanted:
        bench.sparse("standard")
        bench.sparse("jumprelu")
    if arguments.model and arguments.text:
        if "loss" in wanted:
            bench.loss(arguments.model, arguments.text)
        if "several" in wanted:
            bench.several(arguments.model, arguments.text)
    if "memory" in wanted:
        bench.memory()
    if "curve" in wanted:
        bench.curve()


class Bench:
    """Runs measurements in processes of their own and prints what they say."""

    def __init__(self, peer: str | None, device: str) -> None:
        self.peer, self.device = peer, device
        self.shape = (
            {"batch": 8192, "d_in": 2304, "d_sae": 16384}
            if device == "cuda"
            else {"batch": 2048, "d_in": 512, "d_sae": 8192}
        )

    def run(self, side: str, what: str, **more: Any) -> dict[str, Any]:
        """One measurement in a fresh process."""
        python = sys.executable if side == "ours" else self.peer
        assert python is not None
        request = {"side": side, "what": what, "device": self.device, **self.shape, **more}
        done = subprocess.run(
            [python, __file__, "--one", json.dumps(request)], capture_output=True, text=True, check=False
        )
        for line in done.stdout.splitlines():
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise SystemExit(f"{request} failed:\n{done.stderr[-3000:]}")

    def rates(self, ours: dict[str, Any], theirs: dict[str, dict[str, Any]]) -> tuple[float, dict[str, float]]:
        """Median tokens/s of both sides, taking turns."""
        found: dict[str, list[float]] = {"ours": [], **{name: [] for name in theirs}}
        for _ in range(ROUNDS):
            found["ours"].append(self.run("ours", "speed", **ours)["tokens_per_second"])
            if self.peer:
                for name, more in theirs.items():
                    found[name].append(self.run("theirs", "speed", **more)["tokens_per_second"])
        medians = {name: statistics.median(values) for name, values in found.items() if values}
        return medians.pop("ours"), medians

    def topk(self) -> None:
        """TopK against SAELens's settings; its sparse activations raise an error on a CPU with torch 2.13."""
        theirs = {
            f"{'sparse' if sparse else 'dense'}{', autocast' if autocast else ''}": {
                "architecture": "topk",
                "sparse": sparse,
                "autocast": autocast,
            }
            for sparse in ((False, True) if self.device == "cuda" else (False,))
            for autocast in (False, True)
        }
        ours, others = self.rates({"architecture": "topk"}, theirs)
        best, default = max(others.values(), default=0), others.get("dense", 0)
        print(f"topk k={K} {self.size()}: {ours:,.0f} tokens/s" + self.beside(ours, best, "best"), end="")
        print(f", {ours / default:.1f} × its default" if default else "")
        for name, rate in others.items():
            print(f"    SAELens {name}: {rate:,.0f}")

    def dense(self, architecture: str) -> None:
        """An L1 or L0 SAE at the start, when most features are active."""
        theirs = {name: {"architecture": architecture, "autocast": name == "autocast"} for name in ("fp32", "autocast")}
        ours, others = self.rates({"architecture": architecture}, theirs)
        best = max(others.values(), default=0)
        print(f"{architecture} dense {self.size()}: {ours:,.0f} tokens/s" + self.beside(ours, best, "best"))

    def sparse(self, architecture: str) -> None:
        """The same weights on both sides, biased so that fewer than 32 features are active."""
        more = {"architecture": architecture, "active": 24}
        ours, others = self.rates(more, {"autocast": {**more, "autocast": True}, "fp32": {**more, "autocast": False}})
        best = max(others.values(), default=0)
        l0 = self.run("ours", "speed", **more)["l0"]
        print(f"{architecture} at L0 {l0:.0f} {self.size()}: {ours:,.0f} tokens/s" + self.beside(ours, best, "best"))

    def loss(self, model: str, text: str) -> None:
        """Loss after 500 steps on real activations, same start and same batches."""
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "activations.safetensors")
            width = self.run("ours", "activations", model=model, text=text, file=file, batch=2048)["d_in"]
            more = {"file": file, "batch": 1024, "d_in": width, "d_sae": 16 * width, "steps": 500}
            ours = self.run("ours", "loss", **more)
            print(f"topk {width} → {16 * width} on real activations, 500 steps: mse {ours['mse']:.4f}", end="")
            if self.peer:
                theirs = self.run("theirs", "loss", **more)["mse"]
                print(f", SAELens fp32 {theirs:.4f}: {ours['mse'] / theirs - 1:+.2%}", end="")
            print()

    def several(self, model: str, text: str) -> None:
        """Four SAEs on one hook beside one."""
        times = {n: [] for n in (0, 1, 4)}
        for _ in range(ROUNDS):
            for n, found in times.items():
                found.append(self.run("ours", "several", model=model, text=text, n=n)["seconds"])
        model_alone, one, four = (statistics.median(found) for found in times.values())
        print(
            f"four SAEs on one hook: {four / one:.2f} × the time of one, of which the model is {model_alone / one:.0%}"
        )

    def memory(self) -> None:
        """Peak bytes beyond what has to be there."""
        found = self.run("ours", "memory", architecture="topk")
        print(
            f"topk {self.size()}: {found['extra'] / 2**20:.0f} MiB over weights, copies, gradients, optimizer and "
            f"buffer; 2 × batch × d_sae × 2 bytes is {found['limit'] / 2**20:.0f} MiB"
        )

    def curve(self) -> None:
        """Cost with d_sae."""
        sizes = (16384, 65536) if self.device == "cuda" else (2048, 4096, 8192, 16384, 32768)
        for d_sae in sizes:
            found = self.run("ours", "speed", architecture="topk", d_sae=d_sae)
            print(
                f"topk {self.shape['d_in']} → {d_sae}: {found['tokens_per_second']:,.0f} tokens/s, "
                f"{found['share_of_product']:.0%} of the time of the encoder's product alone"
            )

    def size(self) -> str:
        """The shape in words."""
        return f"{self.shape['d_in']} → {self.shape['d_sae']}, batch {self.shape['batch']}"

    def beside(self, ours: float, theirs: float, which: str) -> str:
        """The ratio."""
        return f", SAELens's {which} {theirs:,.0f}: {ours / theirs:.1f} ×" if theirs else ""


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    torch.set_num_threads(THREADS)
    if request["what"] == "activations":
        return write_activations(request)
    if request["what"] == "several":
        return train_several(request)
    if request["what"] == "memory":
        return peak_memory(request)
    if request["what"] == "loss":
        return loss_after(request)
    data = synthetic(request)
    step = (our_step if request["side"] == "ours" else their_step)(request, data)
    batches = endless(data, request["batch"])
    for _ in range(3):
        l0 = step(next(batches))
    times = []
    for _ in range(10 if request["side"] == "ours" else 4):
        batch = next(batches)
        synchronize(request)
        started = time.perf_counter()
        l0 = step(batch)
        synchronize(request)
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    return {
        "tokens_per_second": request["batch"] / seconds,
        "l0": l0,
        "share_of_product": product_seconds(request) / seconds,
    }


def synchronize(request: dict[str, Any]) -> None:
    """Wait for the device."""
    import torch

    if request["device"] == "cuda":
        torch.cuda.synchronize()


def synthetic(request: dict[str, Any]) -> Any:
    """(8 · batch, d_in)"""
    import torch

    torch.manual_seed(0)
    d_in, n = request["d_in"], 8 * request["batch"]
    directions = torch.randn(2 * d_in, d_in, device=request["device"])
    directions /= directions.norm(dim=1, keepdim=True)
    return torch.relu(torch.randn(n, 2 * d_in, device=request["device"]) - 1.5) @ directions


def endless(data: Any, batch: int) -> Iterator[Any]:
    """Batches, round and round."""
    at = 0
    while True:
        yield data[at : at + batch]
        at = (at + batch) % (len(data) - batch + 1)


def product_seconds(request: dict[str, Any]) -> float:
    """The product of a batch with W_enc in bfloat16: the floor of 2·d·F operations a token."""
    import torch

    x = torch.randn(request["batch"], request["d_in"], device=request["device"]).bfloat16()
    W = torch.randn(request["d_sae"], request["d_in"], device=request["device"]).bfloat16()
    out = torch.empty(request["batch"], request["d_sae"], dtype=torch.bfloat16, device=request["device"])
    best = 1e9
    for _ in range(5):
        synchronize(request)
        started = time.perf_counter()
        torch.mm(x, W.T, out=out)
        synchronize(request)
        best = min(best, time.perf_counter() - started)
    return best


def start_bias(request: dict[str, Any], W_dec: Any, data: Any) -> float:
    """The bias with which about `active` features a token are on."""
    x = data[:256] - data.mean(0)
    scores = x @ W_dec.T
    return -float(
        scores.flatten().float().kthvalue(int(scores.numel() * (1 - request["active"] / W_dec.shape[0]))).values
    )


def our_step(request: dict[str, Any], data: Any) -> Any:
    """Our trainer's step, answering L0."""
    import torch

    from mistudio_engine.training import Trainer

    architecture = request["architecture"]
    trainer = Trainer(*our_settings(request, architecture), device=request["device"])
    trainer.prepare(data)
    if "active" in request:
        with torch.no_grad():
            bias = start_bias(request, trainer.sae.W_dec.detach(), trainer.scaling(data))
            if architecture == "jumprelu":
                trainer.sae.get_parameter("threshold").fill_(-bias)
            else:
                trainer.sae.get_parameter("b_enc").fill_(bias)
        trainer.paths.learn(request["active"])
    return lambda batch: trainer.step(batch).l0


def our_settings(request: dict[str, Any], architecture: str, **more: Any) -> tuple[Any, Any]:
    """Config and hyperparameters like SAELens's defaults."""
    from mistudio_engine.api.sae_config import parse_sae_config
    from mistudio_engine.api.training_config import Hyperparameters

    cfg: dict[str, Any] = {"architecture": architecture, "d_in": request["d_in"], "d_sae": request["d_sae"]}
    if architecture == "topk":
        cfg["k"] = K
    batch = request["batch"]
    values = {
        "n_tokens": batch * 10_000,
        "batch_size": batch,
        "buffer_tokens": batch,
        "sparsity_warm_up_fraction": 0.05,
    }
    if architecture == "topk":
        del values["sparsity_warm_up_fraction"]
    return parse_sae_config(cfg), Hyperparameters(**{**values, **L0_COEFFICIENTS.get(architecture, {}), **more})


def their_trainer(request: dict[str, Any], data: Any, **more: Any) -> Any:
    """SAELens's trainer."""
    from sae_lens import (  # pyright: ignore
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig  # pyright: ignore
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore

    common = {"d_in": request["d_in"], "d_sae": request["d_sae"], "device": request["device"], "dtype": "float32"}
    sae = {
        "topk": lambda: TopKTrainingSAE(
            TopKTrainingSAEConfig(k=K, use_sparse_activations=request.get("sparse", False), **common)
        ),
        "standard": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=1.0, **common)),
        "jumprelu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(l0_coefficient=1.0, **common)),
    }[request["architecture"]]()
    batch = request["batch"]
    settings = {"total_training_samples": batch * 10_000, "lr_end": 3e-4, "autocast": request.get("autocast", False)}
    config = SAETrainerConfig(train_batch_size_samples=batch, device=request["device"], **{**settings, **more})
    return SAETrainer(config, sae, endless(data, batch))


def their_step(request: dict[str, Any], data: Any) -> Any:
    """SAELens's step, answering L0."""
    import torch

    trainer = their_trainer(request, data)
    if "active" in request:
        with torch.no_grad():
            bias = start_bias(request, trainer.sae.W_dec.detach(), data)
            if request["architecture"] == "jumprelu":
                trainer.sae.threshold.fill_(-bias)
            else:
                trainer.sae.b_enc.fill_(bias)

    def step(batch: Any) -> float:
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        return float((output.feature_acts.to_dense() > 0).sum(-1).float().mean()) if "active" in request else 0.0

    return step


def write_activations(request: dict[str, Any]) -> dict[str, Any]:
    """Activations of a model's middle, as a file for both sides."""
    import torch
    from safetensors.torch import save_file

    lm, stream, hook = stream_of(request)
    rows, n = [], 0
    for batch in stream.batches():
        if batch is not None:
            rows.append(batch[hook].clone())
            n += len(rows[-1])
            if n >= 131_072:
                break
    data = torch.cat(rows)
    data *= data.shape[1] ** 0.5 / data.norm(dim=-1).mean()
    save_file({"data": data}, request["file"])
    return {"d_in": data.shape[1], "n": n, "model": lm.name}


def stream_of(request: dict[str, Any]) -> tuple[Any, Any, str]:
    """A stream over a text file at the middle layer."""
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.models.tokens import load_tokens, pack
    from mistudio_engine.training import ActivationStream, LiveActivations

    lm = LanguageModel.load(Path(request["model"]))
    folder = Path(tempfile.mkdtemp()) / "tokens"
    text = Path(request["text"]).read_text(encoding="utf-8", errors="ignore")
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    for _ in pack(paragraphs, lm.tokenizer, folder, context_size=128):
        pass
    tokens = load_tokens(folder)
    hook = f"blocks.{lm.n_layers - 2}.hook_resid_post"
    source = LiveActivations(lm, tokens, [hook])
    stream = ActivationStream(source, [hook], batch_size=request["batch"], buffer_tokens=16 * request["batch"], seed=0)
    return lm, stream, hook


def loss_after(request: dict[str, Any]) -> dict[str, Any]:
    """Mean MSE of the last 50 of some steps from a common start."""
    import torch
    from safetensors.torch import load_file

    data = load_file(request["file"])["data"]
    batches = endless(data, request["batch"])
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randn(request["d_sae"], request["d_in"], generator=generator)
    W_dec *= 0.1 / W_dec.norm(dim=-1, keepdim=True)
    steps, losses = request["steps"], []
    if request["side"] == "ours":
        from mistudio_engine.training import Trainer

        trainer = Trainer(
            *our_settings(
                request,
                "topk",
                n_tokens=steps * request["batch"],
                scale_inputs=False,
                lr_warm_up_fraction=0.1,
                lr_decay_fraction=0.2,
                precision="bf16",
                dead_feature_window=steps * request["batch"],  # SAELens's is 1000 steps: no AuxK on either side
            )
        )
        with torch.no_grad():
            trainer.sae.W_dec.copy_(W_dec)
            trainer.sae.W_enc.copy_(W_dec.T)
        for _ in range(steps):
            losses.append(trainer.step(next(batches)).mse)
    else:
        request = {**request, "architecture": "topk", "sparse": False}
        schedule = {"lr_warm_up_steps": steps // 10, "lr_decay_steps": steps // 5, "lr_end": 0.0}
        trainer = their_trainer(request, data, total_training_samples=steps * request["batch"], **schedule)
        with torch.no_grad():
            trainer.sae.W_dec.copy_(W_dec)
            trainer.sae.W_enc.copy_(W_dec.T)
        for _ in range(steps):
            output = trainer.step(next(batches))
            trainer.n_training_steps += 1
            losses.append(float(output.losses["mse_loss"]))
    return {"mse": statistics.mean(losses[-50:])}


def train_several(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds for so many SAEs on one hook to see the same tokens."""
    from mistudio_engine.training import Member, Trainer, train

    n_tokens = 65_536
    request = {**request, "batch": 2048}
    lm, stream, hook = stream_of(request)
    shape = {**request, "d_in": stream.widths[hook], "d_sae": 4 * stream.widths[hook]}
    next(iter(stream.batches()))  # the first pass allocates
    started = time.perf_counter()
    if not request["n"]:
        batches, seen = stream.batches(), 0
        while seen < n_tokens:
            batch = next(batches)
            seen += 0 if batch is None else len(batch[hook])
    else:
        settings = our_settings(shape, "topk", n_tokens=n_tokens, buffer_tokens=16 * 2048)
        members = [Member(str(i), Trainer(*settings, seed=i), hook) for i in range(request["n"])]
        for _ in train(members, stream):
            pass
    return {"seconds": time.perf_counter() - started, "model": lm.name}


def peak_memory(request: dict[str, Any]) -> dict[str, Any]:
    """Peak of this process over steps, less what has to be there."""
    from mistudio_engine.training import Trainer

    data = synthetic(request)
    warm = Trainer(*our_settings({**request, "d_in": 64, "d_sae": 4096, "batch": 64}, "topk", precision="bf16"))
    for _ in range(2):
        warm.step(data[:64, :64].contiguous())  # the libraries' own code, threads and tables
    before = status("VmRSS")
    trainer = Trainer(*our_settings(request, "topk"))
    trainer.prepare(data)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    for batch, _ in zip(endless(data, request["batch"]), range(4), strict=False):
        trainer.step(batch)
    n = sum(parameter.numel() for parameter in trainer.sae.parameters())
    copies = request["d_in"] * request["d_sae"] * 2
    needed = 4 * n * 4 + copies  # weights, gradients, two moments; W_enc in bfloat16
    return {
        "extra": status("VmHWM") - before - needed,
        "limit": 2 * request["batch"] * request["d_sae"] * 2,
    }


def status(name: str) -> int:
    """A number of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


if __name__ == "__main__":
    main()
