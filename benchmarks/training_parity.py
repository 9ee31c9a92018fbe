"""Whether our training steps are SAELens's: same weights, same batches, same dead features, on both of our paths.

    python benchmarks/training_parity.py make FOLDER        with miStudio: losses, gradients, weights after three steps
    PEER/bin/python benchmarks/training_parity.py check FOLDER   likewise with sae-lens 6.54, in its own environment

The two share files only. It prints the relative differences of a case (of tensors: of their norms, the worst one) and
exits with 1 when one is more than 1e-5. SAELens has no training of transcoders, so there is nothing to compare them to;
tests/training/plain_losses.py has their formulas. BatchTopK's threshold is not compared: theirs starts at zero, ours at
its first value. A JumpReLU threshold below zero is moved back after a step here and before the next one there.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOLERANCE = 1e-5
D_IN, D_SAE, BATCH, STEPS, N_DEAD = 64, 512, 256, 3, 40
LR, LONG_AGO = 1e-3, 1_000_000

JUMPRELU = {"jumprelu_bandwidth": 0.3, "jumprelu_init_threshold": 0.2, "l0_coefficient": 0.7}
CASES: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.8},
    "gated": {"l1_coefficient": 0.8},
    "topk": {"k": 8, "aux_loss_coefficient": 0.5},
    "batchtopk": {"k": 8, "aux_loss_coefficient": 0.5},
    "matryoshka_batchtopk": {"k": 8, "widths": [64, 200, 512]},
    "jumprelu": JUMPRELU,
    "jumprelu_tanh": JUMPRELU | {"l0_penalty": "tanh", "tanh_scale": 3.0},
    "jumprelu_quadratic": JUMPRELU | {"l0_penalty": "quadratic", "target_l0": 20.0},
    "jumprelu_pre_act": JUMPRELU | {"pre_act_loss_coefficient": 0.05},
    "jumprelu_quadratic_pre_act": JUMPRELU
    | {"l0_penalty": "quadratic", "target_l0": 20.0, "pre_act_loss_coefficient": 0.05},
}
THEIR_NAMES = {"l0_penalty": "jumprelu_sparsity_loss_mode", "tanh_scale": "jumprelu_tanh_scale"}
THEIR_NAMES["widths"] = "matryoshka_widths"


def architecture(case: str) -> str:
    """The case's name up to what is special about it."""
    return "jumprelu" if case.startswith("jumprelu") else case


def make(root: Path) -> None:
    """Train for three steps on both paths and write everything down."""
    from mistudio_engine.api.sae_config import parse_sae_config
    from mistudio_engine.api.training_config import Hyperparameters
    from mistudio_engine.training.objectives import OBJECTIVES, Moment
    from mistudio_engine.training.trainer import Trainer

    run: dict[str, Any] = {"n_tokens": 10 * BATCH, "batch_size": BATCH, "buffer_tokens": BATCH, "lr": LR}
    run |= {"lr_warm_up_fraction": 0, "lr_decay_fraction": 0, "scale_inputs": False, "precision": "fp32"}
    run |= {"dead_feature_window": LONG_AGO}
    for case, values in CASES.items():
        kind = architecture(case)
        cfg = parse_sae_config(
            {"architecture": kind, "d_in": D_IN, "d_sae": D_SAE}
            | {name: value for name, value in values.items() if name in ("k", "widths")}
        )
        own = {name: value for name, value in values.items() if name not in ("k", "widths")}
        if "coefficient" in " ".join(own) and kind in ("standard", "gated", "jumprelu"):
            own["sparsity_warm_up_fraction"] = 0
        generator = torch.Generator().manual_seed(0)
        init = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in cfg.tensor_shapes().items()}
        if kind == "jumprelu":
            init["threshold"].abs_()
        dead = torch.randperm(D_SAE, generator=generator) < N_DEAD
        init["b_gate" if kind == "gated" else "b_enc"][dead] -= 20  # so that they stay so
        x = torch.randn(STEPS, BATCH, D_IN, generator=generator)
        tensors = {"x": x, "dead": dead, **{f"init.{name}": tensor for name, tensor in init.items()}}
        losses = {}
        for path in ("dense", "sparse"):
            trainer = Trainer(cfg, Hyperparameters(**run, **own, path=path))
            with torch.no_grad():
                for name, parameter in trainer.sae.named_parameters():
                    parameter.copy_(init[name])
            trainer.tokens_since_fired[dead] = LONG_AGO
            code = trainer.paths.code(trainer.sae, trainer.sae.centre(x[0]).detach())
            outcome = OBJECTIVES[kind](code, x[0], Moment(trainer.hp, 1.0, trainer.dead))
            outcome.loss.backward()
            for name, parameter in trainer.sae.named_parameters():
                if parameter.grad is not None:
                    tensors[f"{path}.grad.{name}"] = parameter.grad.clone().contiguous()
            losses[path] = {name: float(part.detach()) for name, part in outcome.parts.items()}
            losses[path]["loss"] = float(outcome.loss.detach())
            for batch in x:
                trainer.step(batch)
            for name, parameter in trainer.sae.named_parameters():
                tensors[f"{path}.after.{name}"] = parameter.detach().clone().contiguous()
        folder = root / case
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "ours.safetensors")
        (folder / "ours.json").write_text(json.dumps(losses, indent=1), encoding="utf-8")
    print(f"{len(CASES)} cases in {root}")


def check(root: Path) -> bool:
    """Make the same steps with SAELens and compare; prints a line for each case and path."""
    warnings.simplefilter("ignore")
    print(f"{'':28}{'path':8}{'loss':>9}{'parts':>9}{'gradients':>11}{'after 3 steps':>15}")
    all_equal = True
    for case in CASES:
        ours = load_file(root / case / "ours.safetensors")
        losses = json.loads((root / case / "ours.json").read_text(encoding="utf-8"))
        theirs_losses, grads, after = _theirs(case, ours)
        for path in ("dense", "sparse"):
            parts = [_off(losses[path][name], theirs_losses[name]) for name in theirs_losses]
            assert losses[path].keys() == theirs_losses.keys(), (losses[path].keys(), theirs_losses.keys())
            of_grads = [_apart(ours[f"{path}.grad.{name}"], grad) for name, grad in grads.items()]
            of_after = [_apart(ours[f"{path}.after.{name}"], weight) for name, weight in after.items()]
            numbers = (_off(losses[path]["loss"], theirs_losses["loss"]), max(parts), max(of_grads), max(of_after))
            all_equal &= max(numbers) <= TOLERANCE
            print(
                f"{case:28}{path:8}{numbers[0]:9.1e}{numbers[1]:9.1e}{numbers[2]:11.1e}{numbers[3]:15.1e}"
                f"  {'equal' if max(numbers) <= TOLERANCE else 'DIFFERS'}"
            )
    return all_equal


def _theirs(case: str, ours: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """SAELens's losses and gradients of the first batch, and its weights after all of them."""
    from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.registry import get_sae_training_class  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]
    from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

    sae_class, config_class = get_sae_training_class(architecture(case))
    values = {THEIR_NAMES.get(name, name): value for name, value in CASES[case].items()}
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **values))
    init = {name.removeprefix("init."): tensor for name, tensor in ours.items() if name.startswith("init.")}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(init[name])
    settings = SAETrainerConfig(
        total_training_samples=10 * BATCH,
        train_batch_size_samples=BATCH,
        lr=LR,
        lr_end=LR,
        dead_feature_window=LONG_AGO // 2,
    )
    trainer = SAETrainer(settings, sae, iter(ours["x"]))
    trainer.n_forward_passes_since_fired[ours["dead"]] = LONG_AGO
    step = TrainStepInput(
        sae_in=ours["x"][0],
        coefficients=trainer.get_coefficients(),
        dead_neuron_mask=trainer.dead_neurons,
        n_training_steps=0,
        is_logging_step=False,
    )
    output = sae.training_forward_pass(step)
    output.loss.backward()
    losses = {name: float(part.detach()) for name, part in output.losses.items()}
    losses["loss"] = float(output.loss.detach())
    grads = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    for batch in ours["x"]:
        trainer.step(batch)
        trainer.n_training_steps += 1
    after = {name: p.detach().clone() for name, p in sae.named_parameters()}
    if "threshold" in after:
        after["threshold"].clamp_(min=0)
    return losses, grads, after


def _off(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-12)


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("make", "check"):
        sys.exit(__doc__)
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    elif not check(Path(sys.argv[2])):
        sys.exit(1)
