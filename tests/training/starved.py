"""Run by test_out_of_memory.py in a process of its own: training steps under a limit on what may be allocated."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from training_data import config, settings

from mistudio_engine.api.errors import OutOfMemory
from mistudio_engine.training.trainer import Trainer

BATCH, D_IN, D_SAE = 2048, 64, 8192  # a dense matrix is 64 MiB, and a step has several


def steps(architecture: str, spare: int | None) -> tuple[dict[str, Any], Trainer]:
    """What becomes of two steps of a process that may allocate `spare` bytes more; None for no limit."""
    hp = settings(
        n_tokens=4 * BATCH,
        batch_size=BATCH,
        buffer_tokens=BATCH,
        path="dense",
        precision="fp32",
        micro_batch_size=BATCH,
    )
    trainer = Trainer(config(architecture, d_in=D_IN, d_sae=D_SAE), hp)
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    (little, limited), (plenty, free) = steps(sys.argv[1], int(sys.argv[2])), steps(sys.argv[1], None)
    pairs = zip(limited.sae.named_parameters(), free.sae.parameters(), strict=True)
    apart = {name: float(((ours - theirs).norm() / theirs.norm()).detach()) for (name, ours), theirs in pairs}
    print(json.dumps([little, plenty, apart]))
