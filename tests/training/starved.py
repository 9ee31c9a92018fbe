"""Run by test_out_of_memory.py in a process of its own: training steps under a limit on what may be allocated."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from mistudio_engine.api.errors import OutOfMemory
from mistudio_engine.api.sae_config import parse_sae_config
from mistudio_engine.api.training_config import Hyperparameters
from mistudio_engine.training.trainer import Trainer

BATCH, D_IN, D_SAE = 1024, 32, 8192  # a dense matrix is 32 MiB, and a step has several

CONFIGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "jumprelu_transcoder": {"d_out": D_IN, "apply_b_dec_to_input": False},
    "batchtopk": {"k": 4},
}


def steps(architecture: str, spare: int | None) -> tuple[dict[str, Any], Trainer]:
    """What becomes of two steps of a process that may allocate `spare` bytes more; None for no limit."""
    hp = Hyperparameters(
        n_tokens=4 * BATCH,
        batch_size=BATCH,
        buffer_tokens=BATCH,
        lr=1e-3,
        path="dense",
        precision="fp32",
        micro_batch_size=BATCH,
    )
    named = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE}
    trainer = Trainer(parse_sae_config(named | CONFIGS[architecture]), hp)
    x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(99))
    y = x.flip(1) if trainer.cfg.is_transcoder else None
    trainer.prepare(x, y)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if spare is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, hard))
    error, measured = None, []
    try:
        measured = [trainer.step(x, y)._asdict() for _ in range(2)]
    except OutOfMemory as raised:
        error = str(raised)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    outcome = {
        "steps": measured,
        "warnings": trainer.warnings,
        "micro_batch_size": trainer.micro_batch_size,
        "n_steps_done": trainer.n_steps_done,
        "error": error,
    }
    return outcome, trainer


def compared(architecture: str, spare: int) -> list[dict[str, Any]]:
    """Such steps, those of a trainer that may have all, and how far apart their weights are."""
    (little, limited), (plenty, free) = steps(architecture, spare), steps(architecture, None)
    pairs = zip(limited.sae.named_parameters(), free.sae.parameters(), strict=True)
    apart = {name: float(((ours - theirs).norm() / theirs.norm()).detach()) for (name, ours), theirs in pairs}
    return [little, plenty, apart]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([compared(architecture, spare) for architecture, spare in json.loads(sys.argv[1])]))
