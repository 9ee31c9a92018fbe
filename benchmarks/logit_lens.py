"""The logit lens against the bare matrix product that it cannot do without.

    python benchmarks/logit_lens.py [--features 4096] [--d-model 768] [--vocabulary 50257] [--k 20] [--rounds 5]

All in one process and in turns, two threads, medians: the float32 product of the same blocks, and of larger ones, which
is the machine's best; then the lens with the top tokens alone, then with histogram and moments.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from mistudio_engine.discovery import logit_lens as module
from mistudio_engine.discovery.logit_lens import logit_lens


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(arguments.features, arguments.d_model))
    W_U, gain = torch.randn(arguments.vocabulary, arguments.d_model), torch.rand(arguments.d_model) + 0.5

    n_rows = module._rows_at_once(arguments.d_model, arguments.vocabulary, on_cpu=True)
    sides: dict[str, Callable[[], object]] = {
        "bare product": lambda: product(W_dec, W_U, n_rows),
        "bare product of 1024 columns": lambda: product(W_dec, W_U, 1024),
        f"top {arguments.k}": lambda: list(logit_lens(W_dec, W_U, gain, k=arguments.k, n_bins=0)),
        f"top {arguments.k}, histogram, moments": lambda: list(logit_lens(W_dec, W_U, gain, k=arguments.k)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    n_flops = 2 * arguments.features * arguments.d_model * arguments.vocabulary
    bare = statistics.median(seconds["bare product"])
    print(f"{arguments.features} features, d_model {arguments.d_model}, vocabulary {arguments.vocabulary}, two threads")
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"{name:32s} {median:6.2f} s {n_flops / median / 1e9:7.0f} GFLOP/s {bare / median:6.0%} of the product")


def product(W_dec: Tensor, W_U: Tensor, n_rows: int) -> None:
    """Blocks of n_rows directions multiplied and thrown away; the lens's own, or larger ones."""
    buffer = W_U.new_empty(len(W_U) * min(n_rows, len(W_dec)))
    for at in range(0, len(W_dec), n_rows):
        block = W_dec[at : at + n_rows]
        torch.mm(W_U, block.T, out=buffer[: len(W_U) * len(block)].view(len(W_U), -1))


if __name__ == "__main__":
    main()
