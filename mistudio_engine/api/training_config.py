"""How an SAE is trained: the settings, which of them belong to which architecture, and the memory it will take.

All lengths are in tokens and all coefficients belong to inputs of mean norm √d, so that settings carry over between
models. It knows nothing of torch, and nothing of what the SAE is (sae_config.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from mistudio_engine.api.errors import BadInput
from mistudio_engine.api.sae_config import SAEConfigBase

__all__ = ["STEP_NAMES", "Hyperparameters", "belongs_to", "buffer_bytes", "check_training", "training_bytes"]

_L1, _JUMPRELU, _K = ("relu", "gated"), ("jumprelu",), ("topk", "batchtopk")

_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "l1_coefficient": _L1,
    "l0_coefficient": _JUMPRELU,
    "l0_penalty": _JUMPRELU,
    "target_l0": _JUMPRELU,
    "tanh_scale": _JUMPRELU,
    "jumprelu_bandwidth": _JUMPRELU,
    "jumprelu_init_threshold": _JUMPRELU,
    "pre_act_loss_coefficient": _JUMPRELU,
    "sparsity_warm_up_fraction": (*_L1, *_JUMPRELU),
    "sparsity_decay_fraction": (*_L1, *_JUMPRELU),
    "aux_loss_coefficient": _K,
    "threshold_lr": ("batchtopk",),
    "resample_interval": (*_L1, *_JUMPRELU),
}
"""Settings that do something for some activations only: elsewhere a value of one's own is refused, not ignored."""

STEP_NAMES = {"n_steps": "n_tokens", "num_steps": "n_tokens", "resample_steps": "resample_interval"}
"""Names that count steps, and the setting in tokens that they stand for."""


class Hyperparameters(BaseModel):
    """Settings of a training run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    n_tokens: Annotated[int, Field(gt=0)] = 4_000_000
    """Tokens to train on; more than the dataset has means several epochs."""

    batch_size: Annotated[int, Field(gt=0)] = 2048
    """Tokens in one optimizer step."""

    lr: Annotated[float, Field(gt=0, lt=1, validation_alias=AliasChoices("lr", "learning_rate"))] = 3e-4
    """Learning rate of Adam."""

    lr_warm_up_fraction: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of the steps over which the learning rate rises from nothing."""

    lr_decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the steps, the last ones, over which the learning rate falls to nothing."""

    lr_end_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the learning rate that is left at the end."""

    lr_decay: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls."""

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's memory of the gradient."""

    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's memory of the gradient's square."""

    clip_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients longer than this are shortened to it."""

    decoder_init_norm: Annotated[float, Field(gt=0)] = 0.1
    """Norm of the decoder's rows at the start; the encoder starts as its transpose."""

    scale_inputs: bool = True
    """Bring the activations to mean norm √d, by one factor estimated at the start and folded into the finished SAE."""

    centre_inputs: bool | None = None
    """Subtract the activations' mean, estimated at the start and folded into the finished SAE. None: where b_dec, which
    starts at the mean, is not subtracted from the input (transcoders)."""

    l1_coefficient: Annotated[
        float | None, Field(ge=0, validation_alias=AliasChoices("l1_coefficient", "l1_alpha"))
    ] = None
    """Weight of the L1 penalty (standard, gated and their transcoders). None for the balanced preset's, which grows
    with the root of the input's width: 0.105 times it, or 0.225 for gated ones."""

    sparsity_warm_up_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps over which the L1 or L0 penalty rises from nothing."""

    sparsity_decay_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the steps, the last ones, over which the L1 or L0 penalty falls to nothing."""

    l0_coefficient: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the L0 penalty (jumprelu)."""

    l0_penalty: Literal["step", "tanh", "quadratic"] = "step"
    """`step` counts active features (arXiv 2407.14435), `tanh` is Anthropic's smooth count (January 2025), `quadratic`
    aims at target_l0 (Gemma Scope 2)."""

    target_l0: Annotated[float, Field(gt=0)] | None = None
    """Active features per token that the quadratic penalty aims at."""

    tanh_scale: Annotated[float, Field(gt=0)] = 4.0
    """Steepness of the tanh penalty."""

    jumprelu_bandwidth: Annotated[float, Field(gt=0)] = 0.05
    """Width of the window around a threshold in which its gradient is estimated."""

    jumprelu_init_threshold: Annotated[float, Field(gt=0)] = 0.01
    """Every threshold at the start."""

    pre_act_loss_coefficient: Annotated[float, Field(gt=0)] | None = None
    """Weight of a pull on dead features' pre-activations towards their thresholds; None for none."""

    aux_loss_coefficient: Annotated[float, Field(ge=0)] = 1.0
    """Weight of AuxK: dead features learn to reconstruct what the living ones leave over (topk)."""

    threshold_lr: Annotated[float, Field(gt=0, le=1)] | None = None
    """How fast BatchTopK's threshold, which replaces the choice over a batch when the SAE runs, follows its batches;
    None for 0.01, or more in runs of less than 1000 steps."""

    dead_feature_window: Annotated[
        int | None, Field(gt=0, validation_alias=AliasChoices("dead_feature_window", "dead_neuron_threshold"))
    ] = None
    """Tokens without firing after which a feature counts as dead; None for a tenth of the run, at most ten million."""

    resample_interval: Annotated[int, Field(gt=0)] | None = None
    """Give dead features a new start every so many tokens, until the learning rate falls; None for never."""

    buffer_tokens: Annotated[int, Field(gt=0)] = 65_536
    """Activations held in memory and shuffled together."""

    exclude_special: bool = True
    """Leave BOS, EOS and other special tokens out; padding always is."""

    log_interval: Annotated[int, Field(gt=0)] = 10
    """Record metrics every so many steps."""

    checkpoint_interval: Annotated[int, Field(gt=0)] | None = None
    """Write a checkpoint every so many tokens; None for a tenth of the run."""

    keep_checkpoints: Annotated[int, Field(gt=0, le=1000)] = 2
    """How many of the newest checkpoints to keep; the best one stays beside them."""

    eval_tokens: Annotated[int, Field(ge=0)] | None = None
    """Held-out tokens to evaluate on at each checkpoint, never trained on where there are enough; 0 for none. By
    default 4096, or fewer where that would take a good part of the time."""

    activations: Literal["live", "cached"] = "live"
    """`live` runs the model as training goes on; `cached` runs it once and keeps the activations on disk."""

    cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of cached activations."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the large products. Weights, gradients and sums are fp32 in any case; `auto` is bf16 where the machine is
    fast at it and the SAE large. On the sparse path bf16 only finds the active features, their values are computed in
    fp32."""

    path: Literal["auto", "dense", "sparse"] = "auto"
    """How a step is computed; the results agree within rounding. `auto` takes whichever is faster."""

    micro_batch_size: Annotated[int, Field(gt=0)] | None = None
    """Tokens to work on at a time, their gradients added up; None for as many as is fast. Halved when memory runs
    out."""

    @model_validator(mode="before")
    @classmethod
    def _steps_to_tokens(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not STEP_NAMES.keys() & data.keys():
            return data
        data = dict(data)
        for name, in_tokens in STEP_NAMES.items():
            if name in data:
                if in_tokens in data:
                    raise ValueError(f"{name} and {in_tokens} say the same thing; give one of them")
                steps = data.pop(name)
                if not isinstance(steps, int) or isinstance(steps, bool):
                    raise ValueError(f"{name} should be a whole number (got {steps!r})")
                data[in_tokens] = steps * data.get("batch_size", cls.model_fields["batch_size"].default)
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Hyperparameters:
        if self.n_tokens < self.batch_size:
            raise ValueError(f"n_tokens ({self.n_tokens}) is less than one batch_size ({self.batch_size})")
        if self.buffer_tokens < self.batch_size:
            raise ValueError(f"buffer_tokens ({self.buffer_tokens}) does not hold one batch_size ({self.batch_size})")
        if self.lr_warm_up_fraction + self.lr_decay_fraction > 1:
            raise ValueError("lr_warm_up_fraction and lr_decay_fraction together are more than the whole run")
        if self.sparsity_warm_up_fraction + self.sparsity_decay_fraction > 1:
            raise ValueError(
                "sparsity_warm_up_fraction and sparsity_decay_fraction together are more than the whole run"
            )
        if self.cache_dtype != "float32" and self.activations != "cached":
            raise ValueError('cache_dtype belongs to activations="cached"')
        if (self.l0_penalty == "quadratic") != (self.target_l0 is not None):
            raise ValueError('l0_penalty="quadratic" and target_l0 go together: give both or neither')
        return self

    @property
    def n_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.n_tokens // self.batch_size

    @property
    def lr_warm_up_steps(self) -> int:
        """Steps until the learning rate is reached."""
        return round(self.lr_warm_up_fraction * self.n_steps)

    @property
    def lr_decay_steps(self) -> int:
        """Steps over which the learning rate falls."""
        return round(self.lr_decay_fraction * self.n_steps)

    @property
    def sparsity_warm_up_steps(self) -> int:
        """Steps until the sparsity penalty has its full weight."""
        return round(self.sparsity_warm_up_fraction * self.n_steps)

    @property
    def evaluated_tokens(self) -> int:
        """Tokens to evaluate on at each checkpoint: the model runs three times over them."""
        if self.eval_tokens is not None:
            return self.eval_tokens
        return min(4096, (self.checkpoint_interval or self.n_tokens) // 20)

    @property
    def threshold_rate(self) -> float:
        """Share of each step in BatchTopK's threshold."""
        return self.threshold_lr or max(0.01, min(1.0, 10 / self.n_steps))

    @property
    def sparsity_decay_steps(self) -> int:
        """Steps over which the sparsity penalty falls."""
        return round(self.sparsity_decay_fraction * self.n_steps)

    @property
    def dead_window(self) -> int:
        """Tokens without firing after which a feature counts as dead."""
        return self.dead_feature_window or max(1, min(10_000_000, self.n_tokens // 10))


def belongs_to(name: str, activation: str) -> bool:
    """Whether a setting does something for SAEs of an activation."""
    return name not in _ONLY_FOR or activation in _ONLY_FOR[name]


def check_training(cfg: SAEConfigBase, hp: Hyperparameters) -> None:
    """Refuse what cannot be trained, before anything is loaded.

    Raises:
        BadInput: settings that contradict each other or would be ignored.
    """
    if cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise BadInput(
            f"normalize_activations={cfg.normalize_activations!r} cannot be asked of an SAE that is to be trained.",
            why="It names a scale that is folded into finished weights, not something that is done when an SAE runs.",
            fix="Leave it 'none' and set scale_inputs=True, which estimates the scale and folds it.",
        )
    if cfg.normalize_activations != "none" and (cfg.is_transcoder or hp.centre_inputs):
        raise BadInput(
            f"normalize_activations={cfg.normalize_activations!r} does not go together with "
            + ("a transcoder, whose output has another norm." if cfg.is_transcoder else "centre_inputs."),
            fix="Leave it 'none'; inputs are scaled to mean norm √d in any case.",
        )
    for name, activations in _ONLY_FOR.items():
        value = getattr(hp, name)
        if cfg.activation not in activations and value != Hyperparameters.model_fields[name].default:
            raise BadInput(
                f"{name}={value!r} has no meaning for a {cfg.architecture} SAE.",
                why=f"It belongs to SAEs of the kinds: {', '.join(activations)}.",
                fix=f"Leave {name} out, or choose another architecture.",
            )
    if hp.target_l0 is not None and hp.target_l0 > cfg.d_sae:
        raise BadInput(
            f"target_l0={hp.target_l0:g} is more than the d_sae = {cfg.d_sae} features there are.",
            fix="Lower target_l0; 20 to 100 is usual.",
        )


def training_bytes(cfg: SAEConfigBase, hp: Hyperparameters) -> int:
    """Peak bytes that training takes beside the language model and the buffer: an upper estimate from numbers alone.

    Weights, gradients and Adam's two moments in fp32; a copy of both weight matrices for the finished SAE; the batch:
    dense (tokens, d_sae) matrices kept for the backward pass, at most six of them, for the tokens that are worked on
    at a time (one where k is fixed), and twelve of (batch, d).
    """
    n_parameters = sum(math.prod(shape) for shape in cfg.tensor_shapes().values())
    rows = min(hp.micro_batch_size or hp.batch_size, hp.batch_size)
    sparse = cfg.activation in ("topk", "batchtopk") and hp.path != "dense"
    wide = rows * cfg.d_sae * (1 if sparse else 6)
    return 4 * (5 * n_parameters + wide + 6 * hp.batch_size * (cfg.d_in + cfg.output_width))


def buffer_bytes(hp: Hyperparameters, widths: Iterable[int]) -> int:
    """Bytes of the shuffle buffer for hooks of these widths."""
    return 4 * hp.buffer_tokens * sum(widths)
