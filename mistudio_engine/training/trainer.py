"""One SAE in training: its weights, its optimizer and its dead features; a step at a time.

It takes batches and does not know where they come from (activations.py), what an architecture minimises
(objectives.py), how its code is computed (paths.py) or who asks for checkpoints (loop.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mistudio_engine.api.errors import BadInput, JobFailed, OutOfMemory, WrongShape
from mistudio_engine.api.presets import L1_PER_ROOT_WIDTH, default_l1_coefficient
from mistudio_engine.api.sae_config import SAEConfig
from mistudio_engine.api.training_config import Hyperparameters, check_training, training_bytes
from mistudio_engine.saes import SAE
from mistudio_engine.training import metrics
from mistudio_engine.training.checkpoints import read_state, write_state
from mistudio_engine.training.divergence import Divergence
from mistudio_engine.training.finishing import finished, first_weights
from mistudio_engine.training.objectives import OBJECTIVES, Moment, Objective
from mistudio_engine.training.parts import detached, is_out_of_memory, merged
from mistudio_engine.training.paths import Paths, computes_in_bf16
from mistudio_engine.training.resampling import resample
from mistudio_engine.training.scaling import DeadForecast, Scaling, dead_forecast, mean_and_spread
from mistudio_engine.training.schedule import lr_factor, sparsity_factor

__all__ = ["StepMetrics", "Trainer"]

_EXTENDABLE = ("n_tokens", "checkpoint_interval", "keep_checkpoints", "log_interval", "eval_tokens")
"""Settings that a training may go on with another value of."""


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
    """Trains one SAE, with weights, gradients and optimizer in fp32.

    Args:
        cfg: what comes out; `cfg.dtype` is the finished SAE's type.
        hp: how.
        seed: of the first weights and of resampling.
        device: where.

    Raises:
        BadInput: as `check_training`.
    """

    def __init__(self, cfg: SAEConfig, hp: Hyperparameters, seed: int = 0, device: str | torch.device = "cpu") -> None:
        check_training(cfg, hp)
        if hp.l1_coefficient is None and cfg.activation in L1_PER_ROOT_WIDTH:
            hp = hp.model_copy(update={"l1_coefficient": default_l1_coefficient(cfg.activation, cfg.d_in)})
        self.cfg, self.hp, self.seed = cfg, hp, seed
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)
        self.sae = first_weights(cfg, hp.decoder_init_norm, hp.jumprelu_init_threshold, self.generator).to(self.device)
        self.sae.requires_grad_(True)
        if cfg.activation == "batchtopk":
            self.sae.get_parameter("threshold").requires_grad_(False)
        self._trained = {name: p for name, p in self.sae.named_parameters() if p.requires_grad}
        # The optimizer sees every tensor as it lies in memory, W_enc by feature: the fused step copies what is turned.
        self._leaves = {name: nn.Parameter(_as_it_lies(p.data)) for name, p in self._trained.items()}
        betas = (hp.adam_beta1, hp.adam_beta2)
        self.optimizer = torch.optim.Adam(list(self._leaves.values()), lr=hp.lr, betas=betas, fused=True)
        self.bf16 = computes_in_bf16(cfg, hp, self.device)
        self.paths = Paths(cfg, hp, self.bf16)
        self.micro_batch_size = hp.micro_batch_size
        self.n_steps_done = 0
        self.prepared = False
        self.scaling, self.target_scaling = Scaling(), Scaling()
        self.forecast: DeadForecast | None = None
        self.batch_threshold: float | None = None
        self.tokens_since_fired = torch.zeros(cfg.d_sae, dtype=torch.long, device=self.device)
        self.n_fired = torch.zeros(cfg.d_sae, dtype=torch.long, device=self.device)
        self.n_counted = 0
        self.divergence = Divergence(hp)
        self._judged: list[float] = []
        self.warnings: list[str] = []
        """What a person should know, one sentence each; whoever passes them on takes them out."""

    @property
    def n_tokens_done(self) -> int:
        """Tokens trained on so far."""
        return self.n_steps_done * self.hp.batch_size

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.n_steps_done >= self.hp.n_steps

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
    def prepare(self, x: Tensor, target: Tensor | None = None) -> None:
        """Estimate the scaling, and start b_dec at the mean. Once, on the first activations.

        Args:
            x: (n, d_in).
            target: what a transcoder predicts, (n, d_out).

        Raises:
            BadInput: they are not finite, or all zero.
        """
        cfg, hp = self.cfg, self.hp
        target = self._target(x, target)
        scale = hp.scale_inputs and cfg.normalize_activations == "none"
        centre = not cfg.apply_b_dec_to_input if hp.centre_inputs is None else hp.centre_inputs
        centre = centre and cfg.normalize_activations == "none"
        self.scaling = Scaling.estimate(x, scale=scale, centre=centre)
        self.target_scaling = (
            Scaling.estimate(target, scale=scale, centre=centre) if cfg.is_transcoder else self.scaling
        )
        self.sae.b_dec.copy_(self._mean_target(target))
        self.forecast = dead_forecast(x, centre or cfg.apply_b_dec_to_input, hp.dead_window)
        if self.forecast.dead_fraction > 0.05:
            self.warnings.append(
                f"About {self.forecast.dead_fraction:.0%} of the features will start dead: the activations' mean is "
                f"{self.forecast.outlier_ratio:.1f} times their spread. centre_inputs=True prevents it."
            )
        self.prepared = True

    def step(self, x: Tensor, target: Tensor | None = None) -> StepMetrics:
        """One optimizer step on a batch of raw activations.

        Args:
            x: (batch, d_in).
            target: what a transcoder predicts, (batch, d_out).

        Raises:
            WrongShape: a width is not the config's.
            JobFailed: the loss or its gradient is not finite, or the loss has exploded; the weights are finite.
            OutOfMemory: one token's work does not fit.
        """
        target = self._target(x, target)
        lr = self.hp.lr * lr_factor(self.n_steps_done, self.hp)
        dead = self.dead
        z = self._normalized(x, self.scaling)
        y = self._normalized(target, self.target_scaling) if self.cfg.is_transcoder else z
        outcome = self._gradients(z, y, dead)
        with torch.no_grad():
            grad_norm = nn.utils.get_total_norm([p.grad for p in self._trained.values() if p.grad is not None])
            mse = metrics.mse(y, outcome.sae_out)
            fvu = metrics.fvu(mse, y.pow(2).sum(dim=-1).mean(), y.mean(dim=0))
            n_active = outcome.n_fired.sum()
            numbers = torch.stack(
                [outcome.loss, mse, n_active / len(x), outcome.l1, fvu, dead.float().mean(), grad_norm, self._sum(z)]
            )
        *numbers, total = numbers.tolist()  # the only wait for the device in a step
        measured = StepMetrics(*numbers, lr=lr)
        watched = {"loss": measured.loss, "gradient": measured.grad_norm, "sum of the weights": measured.l1 + total}
        try:
            self.divergence.check(self.n_steps_done, watched, measured.fvu, z, y)
        except JobFailed:
            self.sae.zero_grad()
            raise
        self._optimize(lr, grad_norm)
        with torch.no_grad():
            if self.cfg.activation == "jumprelu":
                # Below zero a threshold would let negative pre-activations through. Moved back rather than clamped in
                # the graph, where the gradient would be cut off and the feature stuck there.
                self.sae.get_parameter("threshold").clamp_(min=0)
            if outcome.smallest is not None and math.isfinite(smallest := float(outcome.smallest)):
                before, rate = self.batch_threshold, self.hp.threshold_rate
                self.batch_threshold = smallest if before is None else (1 - rate) * before + rate * smallest
            self._judged.append(_judged(outcome, sparsity_factor(self.n_steps_done, self.hp)))
            self._count(outcome.n_fired, len(x))
            self.paths.learn(measured.l0)
            self.n_steps_done += 1
            if self._resampling_is_due():
                self._resample(z, y, outcome.sae_out)
        return measured

    def take_score(self) -> float | None:
        """The mean loss a dimension since this was last asked, by which checkpoints are compared; less is better.

        Only what the finished SAE is judged by: reconstruction and sparsity, not AuxK and the like. None where there
        was no step since, or the penalty had not its full weight.
        """
        judged, self._judged = self._judged, []
        if not judged or not all(math.isfinite(loss) for loss in judged):
            return None
        return sum(judged) / len(judged) / self.cfg.output_width

    def finished_sae(self, trained_on: dict[str, Any] | None = None) -> SAE:
        """A copy of the SAE as others can use it: scaling and decoder norms folded, decoder rows of norm 1.

        Args:
            trained_on: fields of its config that say what it was trained on (`ActivationStream.describe`); those that
                the config has already win.
        """
        fields = {name: value for name, value in (trained_on or {}).items() if getattr(self.cfg, name) is None}
        training = {
            "hyperparameters": self.hp.model_dump(mode="json"),
            "seed": self.seed,
            "n_tokens": self.n_tokens_done,
            "input_scale": self.scaling.scale,
            "centred": self.scaling.mean is not None,
            "bf16": self.bf16,
            "torch": torch.__version__,
        }
        if self.cfg.is_transcoder:
            training["output_scale"] = self.target_scaling.scale
        if self.forecast is not None:
            training["outlier_ratio"] = self.forecast.outlier_ratio
        cfg = self.cfg.model_copy(update=fields)
        return finished(self.sae, cfg, self.scaling, self.target_scaling, self.batch_threshold or 0.0, training)

    def save_state(self, folder: Path, stream_state: dict[str, Any] | None = None) -> None:
        """Write everything that a fresh Trainer needs to go on bit for bit (on the same CPU machine).

        Raises:
            DiskFull: there is no room.
            BadInput: a weight is not finite; such weights are never saved.
        """
        tensors = {"tokens_since_fired": self.tokens_since_fired, "n_fired": self.n_fired}
        tensors["generator"] = self.generator.get_state()
        if self.scaling.mean is not None:
            tensors["input_mean"] = self.scaling.mean
        if self.cfg.is_transcoder and self.target_scaling.mean is not None:
            tensors["target_mean"] = self.target_scaling.mean
        tensors |= {f"sae.{name}": _as_it_lies(p.detach()) for name, p in self.sae.named_parameters()}
        for name, leaf in self._leaves.items():
            tensors |= {f"adam.{name}.{moment}": value for moment, value in self.optimizer.state.get(leaf, {}).items()}
        write_state(
            folder,
            tensors,
            {
                "cfg": self.cfg.model_dump(mode="json"),
                "hyperparameters": self.hp.model_dump(mode="json"),
                "seed": self.seed,
                "n_steps_done": self.n_steps_done,
                "n_counted": self.n_counted,
                "n_exploded": self.divergence.n_exploded,
                "prepared": self.prepared,
                "scales": [self.scaling.scale, self.target_scaling.scale],
                "forecast": self.forecast,
                "batch_threshold": self.batch_threshold,
                "micro_batch_size": self.micro_batch_size,
                "bf16": self.bf16,
                "paths": self.paths.state(),
                "stream": stream_state,
                "torch": torch.__version__,
            },
        )

    @torch.no_grad()
    def restore(self, folder: Path) -> dict[str, Any] | None:
        """Take over a state that `save_state` wrote; with more tokens to do than then, the training is extended.

        Returns:
            The stream's state that was saved with it, for `ActivationStream.restore`.

        Raises:
            CorruptFile: it is torn or flipped.
            BadInput: it belongs to a training with other settings.
        """
        state = read_state(folder)
        values, tensors = state.values, state.tensors
        _check_same("SAE config", self.cfg.model_dump(mode="json"), values["cfg"])
        theirs = {k: v for k, v in values["hyperparameters"].items() if k not in _EXTENDABLE}
        _check_same("setting", self.hp.model_dump(mode="json", exclude=set(_EXTENDABLE)), theirs)
        for name, parameter in self.sae.named_parameters():
            _as_it_lies(parameter.data).copy_(tensors[f"sae.{name}"])
        for name, leaf in self._leaves.items():
            prefix = f"adam.{name}."
            moments = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            if moments:
                self.optimizer.state[leaf] = {key: t.to(self.device) for key, t in moments.items()}
        self.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        self.n_fired.copy_(tensors["n_fired"])
        self.generator.set_state(tensors["generator"])
        means = [tensors[name].to(self.device) if name in tensors else None for name in ("input_mean", "target_mean")]
        self.scaling, self.target_scaling = map(Scaling, values["scales"], means)
        if not self.cfg.is_transcoder:
            self.target_scaling = self.scaling
        self.forecast = None if values["forecast"] is None else DeadForecast(*values["forecast"])
        self.seed, self.n_steps_done, self.n_counted = values["seed"], values["n_steps_done"], values["n_counted"]
        self.prepared, self.divergence.n_exploded = values["prepared"], values["n_exploded"]
        self.batch_threshold, self.micro_batch_size = values["batch_threshold"], values["micro_batch_size"]
        self.bf16 = values["bf16"]
        self.paths = Paths(self.cfg, self.hp, self.bf16)
        self.paths.restore(values["paths"])
        return values["stream"]

    # A step's parts

    def _gradients(self, z: Tensor, y: Tensor, dead: Tensor) -> Objective:
        """The objective of a batch, its gradient left in the parameters; in parts where memory asks for it."""
        sparsity = sparsity_factor(self.n_steps_done, self.hp)
        while True:
            rows = min(self.micro_batch_size or self.paths.rows_at_once(len(z), self.device), len(z))
            self.sae.zero_grad()
            try:
                parts = []
                codes = self.paths.codes(self.sae, self.sae.centre(z).detach(), rows)
                for code, part_z, part_y in zip(codes, z.split(rows), y.split(rows), strict=True):
                    moment = Moment(self.hp, sparsity, dead, self.sae.skip(part_z))
                    outcome = OBJECTIVES[self.cfg.architecture](code, part_y, moment)
                    share = len(part_z) / len(z)
                    (outcome.loss * share).backward()
                    parts.append((share, detached(outcome)))
                return merged(parts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve(rows)

    def _halve(self, rows: int) -> None:
        """Go on with fewer tokens at a time; the batch that a step sees stays the same."""
        self.sae.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if rows <= 1:
            needed = training_bytes(self.cfg, self.hp.model_copy(update={"micro_batch_size": 1}))
            raise OutOfMemory.of("This training", needed, 0, "Lower d_sae, or unload a model.")
        self.micro_batch_size = (rows + 1) // 2
        self.warnings.append(
            f"Memory ran out with {rows} tokens at a time; going on with {self.micro_batch_size}, "
            "which gives the same steps, slower."
        )

    def _optimize(self, lr: float, grad_norm: Tensor) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        # The fused step divides gradients by this on its way, as it does for a GradScaler: clipping without a pass over
        # them. The small number is clip_grad_norm_'s.
        self.optimizer.grad_scale = ((grad_norm + 1e-6) / self.hp.clip_grad_norm).clamp_min(1.0)  # pyright: ignore
        self.optimizer.found_inf = torch.zeros((), device=self.device)  # pyright: ignore
        for name, leaf in self._leaves.items():
            grad = self._trained[name].grad
            leaf.grad = None if grad is None else _as_it_lies(grad)
        self.optimizer.step()
        self.optimizer.zero_grad()  # both hold the same memory, and the next backward pass wants it
        self.sae.zero_grad()

    def _sum(self, z: Tensor) -> Tensor:
        """The sum of inputs and weights, NaN where one of them is: a comparison with NaN is false, so a feature that
        has one may just never be chosen, and the loss not know of it. W_dec is left out, since its norms are in l1."""
        weights = [p.sum() for name, p in self._trained.items() if name != "W_dec"]
        return torch.stack([z.sum(), *weights]).sum()

    def _normalized(self, x: Tensor, scaling: Scaling) -> Tensor:
        return self.sae.normalize(scaling(x.to(self.device, torch.float32)))[0]

    def _mean_target(self, target: Tensor) -> Tensor:
        """The mean of normalised targets: zero where they are centred."""
        if self.cfg.normalize_activations == "none":
            mean, _ = mean_and_spread(target)
            return self.target_scaling(mean.to(self.device))
        total = torch.zeros(target.shape[-1], dtype=torch.float64, device=self.device)
        for rows in target.split(8192):
            total += self._normalized(rows, self.target_scaling).sum(dim=0)
        return (total / len(target)).float()

    def _target(self, x: Tensor, target: Tensor | None) -> Tensor:
        if (target is None) == self.cfg.is_transcoder:
            raise BadInput(
                f"A {self.cfg.architecture} is trained on {'two hooks' if self.cfg.is_transcoder else 'one hook'}.",
                fix="Give the activations at hook_name_out as target, for transcoders only.",
            )
        target = x if target is None else target
        for what, tensor, width in (("batch", x, self.cfg.d_in), ("target", target, self.cfg.output_width)):
            if tensor.dim() != 2 or tensor.shape[1] != width:
                raise WrongShape(f"A {what} of shape {tuple(tensor.shape)} does not fit, expected (batch, {width}).")
        return target

    def _count(self, n_fired: Tensor, batch: int) -> None:
        self.tokens_since_fired += batch
        self.tokens_since_fired[n_fired > 0] = 0
        if self.n_steps_done == self.hp.n_steps - self.hp.lr_decay_steps:
            self.n_fired.zero_()
            self.n_counted = 0
        self.n_fired += n_fired
        self.n_counted += batch

    def _resample(self, z: Tensor, y: Tensor, sae_out: Tensor) -> None:
        revived = resample(self.sae, z, y, sae_out, self.dead, self.hp.jumprelu_init_threshold, self.generator)
        self.tokens_since_fired[revived] = 0
        for name, leaf in self._leaves.items():
            for moment in self.optimizer.state.get(leaf, {}).values():
                if moment.dim() and len(moment) == self.cfg.d_sae and name not in ("b_dec", "W_skip"):  # by feature
                    moment[revived] = 0

    def _resampling_is_due(self) -> bool:
        interval = self.hp.resample_interval
        if interval is None or self.n_steps_done > self.hp.n_steps - self.hp.lr_decay_steps:
            return False
        before = (self.n_steps_done - 1) * self.hp.batch_size
        return before // interval < self.n_tokens_done // interval


def _as_it_lies(tensor: Tensor) -> Tensor:
    """The tensor, or its transpose where that is contiguous."""
    return tensor if tensor.is_contiguous() else tensor.T


def _judged(outcome: Objective, sparsity: float) -> float:
    """Reconstruction and sparsity, infinite while the penalty is not at its full weight."""
    penalised = outcome.parts.keys() & {"l1_loss", "l0_loss"}
    if penalised and sparsity < 1:
        return math.inf
    return sum(float(outcome.parts[name]) for name in ("mse_loss", *penalised))


def _check_same(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    other = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if other:
        name = other[0]
        raise BadInput(
            f"The checkpoint belongs to a training with another {what}.",
            why=f"{name} was {theirs.get(name)!r} there and is {ours.get(name)!r} here.",
            fix="Resume with the settings of the training, or start a new one.",
        )
