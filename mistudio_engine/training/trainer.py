"""One SAE in training: its weights, its optimizer, its schedules and its dead features; a step at a time.

It takes batches and does not know where they come from (activations.py), what an architecture minimises (objectives.py)
or who asks for checkpoints (loop.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput, JobFailed, WrongShape
from mistudio_engine.api.sae_config import SAEConfig
from mistudio_engine.api.training_config import Hyperparameters, check_training
from mistudio_engine.saes import SAE, fold_decoder_norms, fold_input_scale, new_sae
from mistudio_engine.training import metrics
from mistudio_engine.training.checkpoints import read_state, write_state
from mistudio_engine.training.objectives import OBJECTIVES
from mistudio_engine.training.resampling import resample

__all__ = ["StepMetrics", "Trainer"]

_RUN_TIME_NORMS = ("layer_norm", "constant_norm_rescale")
_PREPARED_ROWS = 8192


class StepMetrics(NamedTuple):
    """What one step measured, on its own batch and in normalised space."""

    loss: float
    mse: float
    l0: float
    l1: float
    fvu: float
    dead_fraction: float
    grad_norm: float
    lr: float


class Trainer:
    """Trains one SAE in fp32.

    Args:
        cfg: what comes out; `cfg.dtype` is the finished SAE's type.
        hp: how.
        seed: of the first weights and of resampling.
        device: where.

    Raises:
        BadInput, Unsupported: as `check_training`.

    A TopK SAE is trained with its decoder rows taken as of norm 1 in the choice, whatever their length, or drifting
    norms would decide what is chosen; finished, they have norm 1 and the choice is by pre-activation alone.
    """

    def __init__(self, cfg: SAEConfig, hp: Hyperparameters, seed: int = 0, device: str = "cpu") -> None:
        check_training(cfg, hp)
        self.cfg, self.hp, self.seed = cfg, hp, seed
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.sae = _initial(cfg, hp, self.generator).to(self.device).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=hp.lr, betas=(0.9, 0.999), fused=True)
        self.n_steps_done = 0
        self.prepared = False
        self.input_scale = 1.0
        self.tokens_since_fired = torch.zeros(cfg.d_sae, dtype=torch.long, device=self.device)
        self.n_fired = torch.zeros(cfg.d_sae, dtype=torch.long, device=self.device)
        self.n_counted = 0

    @property
    def n_tokens_done(self) -> int:
        """Tokens trained on so far."""
        return self.n_steps_done * self.hp.batch_size

    @property
    def dead(self) -> Tensor:
        """Features that have not fired for the whole window, bool (d_sae,)."""
        return self.tokens_since_fired >= self.hp.dead_window

    @property
    def density(self) -> Tensor | None:
        """How often each feature fired, (d_sae,), over the steps in which the learning rate falls, or up to now before
        those; None before the first step."""
        return (self.n_fired / self.n_counted).cpu() if self.n_counted else None

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        """Estimate the input scale, and start b_dec at the mean. Once, on the first activations (n, d_in).

        Raises:
            BadInput: they are not finite, or all zero.
        """
        mean_norm = float(x.norm(dim=-1, dtype=torch.float32).mean())
        if not math.isfinite(mean_norm) or mean_norm == 0:
            raise BadInput(
                f"The activations cannot be trained on: their mean norm is {mean_norm}.",
                why="The language model overflows in this precision, or the hook carries nothing.",
                fix="Load the model in fp32 or bf16, or choose another hook.",
            )
        if self.hp.scale_inputs and self.cfg.normalize_activations not in _RUN_TIME_NORMS:
            self.input_scale = math.sqrt(self.cfg.d_in) / mean_norm
        total = torch.zeros(self.cfg.d_in, dtype=torch.float64, device=self.device)
        for rows in x.split(_PREPARED_ROWS):  # x may be the whole buffer: it is not copied
            total += self._normalized(rows).sum(dim=0)
        self.sae.b_dec.copy_(total / len(x))
        self.prepared = True

    def step(self, x: Tensor) -> StepMetrics:
        """One optimizer step on a batch (batch, d_in) of raw activations.

        Raises:
            WrongShape: the width is not d_in.
            JobFailed: the loss or its gradient is not finite; the weights are still those from before the step.
        """
        if x.dim() != 2 or x.shape[1] != self.cfg.d_in:
            raise WrongShape(f"A batch of shape {tuple(x.shape)} does not fit, expected (batch, {self.cfg.d_in}).")
        z = self._normalized(x)
        lr = self.hp.lr * self._lr_factor()
        self.optimizer.param_groups[0]["lr"] = lr
        warm_up = self.hp.sparsity_warm_up_steps
        sparsity = min(1.0, self.n_steps_done / warm_up) if warm_up else 1.0
        dead = self.dead
        outcome = OBJECTIVES[self.cfg.architecture](self.sae, z, dead, sparsity, self.hp)
        loss = float(outcome.loss.detach())
        if not math.isfinite(loss):
            raise self._diverged("loss", loss, z)
        self.optimizer.zero_grad()
        outcome.loss.backward()
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.hp.clip_grad_norm))
        if not math.isfinite(grad_norm):
            self.optimizer.zero_grad()
            raise self._diverged("gradient", grad_norm, z)
        self.optimizer.step()
        with torch.no_grad():
            if self.cfg.architecture == "jumprelu":
                # Below zero a threshold would let negative pre-activations through. Moved back rather than clamped in
                # the graph, where the gradient would be cut off and the feature stuck there.
                self.sae.get_parameter("threshold").clamp_(min=0)
            sae_out = outcome.sae_out.detach()
            mse = metrics.mse(z, sae_out)
            self._count(outcome.n_fired, len(x))
            measured = StepMetrics(
                loss=loss,
                mse=float(mse),
                l0=float(outcome.n_fired.sum()) / len(x),
                l1=float(outcome.l1.detach()),
                fvu=float(metrics.fvu(mse, z.pow(2).sum(dim=-1).mean(), z.mean(dim=0))),
                dead_fraction=float(dead.float().mean()),
                grad_norm=grad_norm,
                lr=lr,
            )
            self.n_steps_done += 1
            if self._resampling_is_due():
                revived = resample(self.sae, self.optimizer, z, sae_out, self.dead, self.hp, self.generator)
                self.tokens_since_fired[revived] = 0
        return measured

    @torch.no_grad()
    def finished_sae(self, trained_on: dict[str, Any] | None = None) -> SAE:
        """A copy of the SAE as others can use it: input scale and decoder norms folded, decoder rows of norm 1.

        Args:
            trained_on: fields of its config that say what it was trained on (`ActivationStream.describe`); those that
                the config has already win.
        """
        sae = new_sae(self.sae.cfg, {name: p.detach().clone() for name, p in self.sae.named_parameters()})
        if self.cfg.normalize_activations not in _RUN_TIME_NORMS:
            fold_input_scale(sae, self.input_scale)
        fold_decoder_norms(sae)
        fields = {name: value for name, value in (trained_on or {}).items() if getattr(self.cfg, name) is None}
        if self.cfg.architecture == "topk":
            fields["rescale_acts_by_decoder_norm"] = False
        training = {
            "hyperparameters": self.hp.model_dump(mode="json"),
            "seed": self.seed,
            "n_tokens": self.n_tokens_done,
            "input_scale": self.input_scale,
            "torch": torch.__version__,
        }
        ours = {**self.cfg.metadata.get("mistudio", {}), "training": training}
        fields["metadata"] = {
            **self.cfg.metadata,
            "training_architecture": self.cfg.architecture,
            "mistudio": ours,
        }
        tensors = {name: p.detach().cpu().contiguous() for name, p in sae.named_parameters()}
        return new_sae(self.cfg.model_copy(update=fields), tensors).to(self.device)

    def save_state(self, folder: Path, stream_state: dict[str, Any] | None = None) -> None:
        """Write everything that a fresh Trainer needs to go on bit for bit (on the same CPU machine).

        Raises:
            DiskFull: there is no room.
        """
        tensors = {"tokens_since_fired": self.tokens_since_fired, "n_fired": self.n_fired}
        tensors["generator"] = self.generator.get_state()
        for name, parameter in self.sae.named_parameters():
            tensors[f"sae.{name}"] = parameter
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{moment}"] = value
        write_state(
            folder,
            tensors,
            {
                "cfg": self.cfg.model_dump(mode="json"),
                "hyperparameters": self.hp.model_dump(mode="json"),
                "seed": self.seed,
                "n_steps_done": self.n_steps_done,
                "n_counted": self.n_counted,
                "prepared": self.prepared,
                "input_scale": self.input_scale,
                "stream": stream_state,
                "torch": torch.__version__,
            },
        )

    @torch.no_grad()
    def restore(self, folder: Path) -> dict[str, Any] | None:
        """Take over a state that `save_state` wrote.

        Returns:
            The stream's state that was saved with it, for `ActivationStream.restore`.

        Raises:
            CorruptFile: it is torn or flipped.
            BadInput: it belongs to a training with other settings.
        """
        state = read_state(folder)
        values = state.values
        self._check_same("SAE config", self.cfg.model_dump(mode="json"), values["cfg"])
        self._check_same("hyperparameters", self.hp.model_dump(mode="json"), values["hyperparameters"])
        for name, parameter in self.sae.named_parameters():
            parameter.copy_(state.tensors[f"sae.{name}"])
            prefix = f"adam.{name}."
            moments = {key.removeprefix(prefix): t for key, t in state.tensors.items() if key.startswith(prefix)}
            # zeros_like keeps the memory layout of the weights, which the fused optimizer takes for granted.
            self.optimizer.state[parameter] = {
                key: torch.zeros_like(parameter).copy_(t) if t.shape == parameter.shape else t.to(self.device)
                for key, t in moments.items()
            }
        self.tokens_since_fired.copy_(state.tensors["tokens_since_fired"])
        self.n_fired.copy_(state.tensors["n_fired"])
        self.generator.set_state(state.tensors["generator"])
        self.seed, self.n_steps_done, self.n_counted = values["seed"], values["n_steps_done"], values["n_counted"]
        self.prepared, self.input_scale = values["prepared"], values["input_scale"]
        return values["stream"]

    def _normalized(self, x: Tensor) -> Tensor:
        x = x.to(self.device, torch.float32)
        return self.sae.normalize(x)[0] if self.input_scale == 1.0 else x * self.input_scale

    def _lr_factor(self) -> float:
        """Linear warm-up, constant, linear decay to nothing at the end."""
        done, warm_up, decay = self.n_steps_done, self.hp.lr_warm_up_steps, self.hp.lr_decay_steps
        rising = (done + 1) / warm_up if done < warm_up else 1.0
        falling = max(0, self.hp.n_steps - done) / decay if done > self.hp.n_steps - decay else 1.0
        return min(rising, falling)

    def _count(self, n_fired: Tensor, batch: int) -> None:
        self.tokens_since_fired += batch
        self.tokens_since_fired[n_fired > 0] = 0
        if self.n_steps_done == self.hp.n_steps - self.hp.lr_decay_steps:
            self.n_fired.zero_()
            self.n_counted = 0
        self.n_fired += n_fired
        self.n_counted += batch

    def _resampling_is_due(self) -> bool:
        interval = self.hp.resample_interval
        if interval is None or self.n_steps_done > self.hp.n_steps - self.hp.lr_decay_steps:
            return False
        before = (self.n_steps_done - 1) * self.hp.batch_size
        return before // interval < self.n_tokens_done // interval

    def _diverged(self, what: str, value: float, z: Tensor) -> JobFailed:
        if not bool(z.isfinite().all()):
            return JobFailed(
                f"The activations at step {self.n_steps_done} have NaN or infinite values.",
                why="The language model overflows in this precision.",
                fix="Load the model in fp32 or bf16, then resume from the last checkpoint.",
            )
        return JobFailed(
            f"The {what} is {value} at step {self.n_steps_done}: training has diverged.",
            why=f"lr is {self.hp.lr:g}, the gradient is clipped at {self.hp.clip_grad_norm:g}.",
            fix="Start again with a lower lr (a third) or a longer lr_warm_up_fraction; the last checkpoint is finite.",
        )

    @staticmethod
    def _check_same(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        other = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if other:
            name = other[0]
            raise BadInput(
                f"The checkpoint belongs to a training with another {what}.",
                why=f"{name} was {theirs.get(name)!r} there and is {ours.get(name)!r} here.",
                fix="Resume with the settings of the training, or start a new one.",
            )


def _initial(cfg: SAEConfig, hp: Hyperparameters, generator: torch.Generator) -> SAE:
    """Random decoder rows of one norm, the encoder their transpose, biases zero (Anthropic, April 2024)."""
    fields: dict[str, Any] = {"dtype": "float32"}
    if cfg.architecture == "topk":
        fields["rescale_acts_by_decoder_norm"] = True
    sae = new_sae(cfg.model_copy(update=fields))
    with torch.no_grad():
        W_dec = torch.randn(sae.W_dec.shape, generator=generator)
        sae.W_dec.copy_(W_dec * (hp.decoder_init_norm / W_dec.norm(dim=-1, keepdim=True)))
        sae.W_enc.copy_(sae.W_dec.T)
        if cfg.architecture == "jumprelu":
            sae.get_parameter("threshold").fill_(hp.jumprelu_init_threshold)
    return sae
