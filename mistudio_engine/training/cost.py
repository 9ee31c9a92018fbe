"""What a training step costs: operations and bytes from the configuration, and how fast this machine does them.

Enough for an estimate before anything is loaded; it is right within a factor of two or three, and the estimate of a
training that was run before is its measured rate instead. It knows no language model but its number of parameters.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from mistudio_engine.api.sae_config import SAEConfig
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.training.paths import computes_in_bf16

__all__ = ["Speed", "measure_speed", "step_seconds", "tokens_per_second"]

_ADAM_BYTES = 4 * 8
"""Moved for each parameter in a step: the gradient made and read, weight and two moments read and written."""


class Speed(NamedTuple):
    """How fast a machine is."""

    fp32: float
    """Operations per second in a matrix product of fp32."""

    bf16: float
    """Likewise of bfloat16."""

    bytes: float
    """Bytes per second through memory."""


_STEP_OVERHEAD = {"cpu": 4e-3, "cuda": 1.5e-3}
"""Seconds that a step takes however little it computes."""

_NARROW = 512
"""A language model this wide runs at about half of what a large product reaches; narrower ones are worse off."""

_PASSES_TO_EVALUATE = 4


def measure_speed(device: torch.device) -> Speed:
    """Measure it: about a tenth of a second of products and copies."""

    def rate(work: float, run: object) -> float:
        assert callable(run)
        run()
        best = math.inf
        for _ in range(3):
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
        return work / max(best, 1e-9)

    n = 4096 if device.type == "cuda" else 512
    left, right = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    left16, right16 = left.bfloat16(), right.bfloat16()
    out, out16 = torch.empty_like(left), torch.empty_like(left16)
    block = torch.empty(1 << 24, dtype=torch.uint8, device=device)
    return Speed(
        rate(2 * n**3, lambda: torch.mm(left, right, out=out)),
        rate(2 * n**3, lambda: torch.mm(left16, right16, out=out16)),
        rate(2 * block.numel(), block.clone),
    )


def step_seconds(cfg: SAEConfig, hp: Hyperparameters, speed: Speed, device: torch.device) -> float:
    """Seconds of one optimizer step of an SAE: products over all features, pairs, and the optimizer."""
    n_parameters = sum(math.prod(shape) for shape in cfg.tensor_shapes().values())
    product = 2 * hp.batch_size * cfg.d_in * cfg.d_sae
    rate = speed.bf16 if computes_in_bf16(cfg, hp, device) else speed.fp32
    k = getattr(cfg, "k", None)
    if k is not None and hp.path != "dense":
        n_products, n_pairs = 1.0, hp.batch_size * k
    else:
        n_products, n_pairs = 5.0, 0
    # A pair moves about six rows of d numbers: two dot products, a decoded row, two gradients.
    moved = n_parameters * _ADAM_BYTES + n_pairs * 6 * 4 * cfg.d_in + hp.batch_size * cfg.d_sae * 2 * 6
    return n_products * product / rate + moved / speed.bytes


def tokens_per_second(
    members: list[tuple[SAEConfig, Hyperparameters]],
    n_model_parameters: int,
    d_model: int,
    speed: Speed,
    device: torch.device,
) -> float:
    """Of a training of these SAEs on one pass of a model.

    Args:
        members: what is trained.
        n_model_parameters: of the model up to the hook.
        d_model: its width.
        speed: of the machine.
        device: where.
    """
    hp = members[0][1]
    model = 2 * n_model_parameters * (1 + _NARROW / d_model) / speed.fp32
    overhead = _STEP_OVERHEAD.get(device.type, 0.0)
    steps = sum(step_seconds(cfg, each, speed, device) + overhead for cfg, each in members)
    seconds = model + steps / hp.batch_size
    if hp.evaluated_tokens and hp.checkpoint_interval:
        passes = _PASSES_TO_EVALUATE * len(members) * hp.evaluated_tokens / hp.checkpoint_interval
        seconds += model * passes
    return 1 / seconds
