"""How an SAE is trained: the settings, which of them belong to which architecture, and the memory it will take.

All lengths are in tokens and all coefficients belong to inputs of mean norm √d, so that settings carry over between
models. It knows nothing of torch, and nothing of what the SAE is (sae_config.py).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from mistudio_engine.api.errors import BadInput, Unsupported
from mistudio_engine.api.sae_config import SAEConfigBase

__all__ = ["STEP_NAMES", "TRAINABLE", "Hyperparameters", "check_training", "training_bytes"]

TRAINABLE = ("standard", "gated", "jumprelu", "topk")
"""Architectures that training.objectives has an objective for."""

_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "l1_coefficient": ("standard", "gated"),
    "l0_coefficient": ("jumprelu",),
    "l0_penalty": ("jumprelu",),
    "target_l0": ("jumprelu",),
    "tanh_scale": ("jumprelu",),
    "jumprelu_bandwidth": ("jumprelu",),
    "jumprelu_init_threshold": ("jumprelu",),
    "pre_act_loss_coefficient": ("jumprelu",),
    "sparsity_warm_up_fraction": ("standard", "gated", "jumprelu"),
    "aux_loss_coefficient": ("topk",),
    "topk_path": ("topk",),
    "resample_interval": ("standard", "gated", "jumprelu"),
}
"""Settings that do something for some architectures only: elsewhere a value of one's own is refused, not ignored."""

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

    clip_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients longer than this are shortened to it."""

    decoder_init_norm: Annotated[float, Field(gt=0)] = 0.1
    """Norm of the decoder's rows at the start; the encoder starts as its transpose."""

    scale_inputs: bool = True
    """Bring the activations to mean norm √d, by one factor estimated at the start and folded into the finished SAE."""

    l1_coefficient: Annotated[float, Field(ge=0, validation_alias=AliasChoices("l1_coefficient", "l1_alpha"))] = 2.0
    """Weight of the L1 penalty (standard, gated). On 64-wide activations of stories260K with 512 features, 1 gave L0 38
    and FVU 0.11, 5 gave L0 11 and FVU 0.47; wider layers want more."""

    sparsity_warm_up_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps over which the L1 or L0 penalty rises from nothing."""

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

    dead_feature_window: Annotated[int, Field(gt=0)] | None = None
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
    """Write a checkpoint every so many tokens; None for only when told to."""

    topk_path: Literal["auto", "dense", "sparse"] = "auto"
    """How the TopK step is computed; the results agree within rounding. `auto` takes whichever is faster."""

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
    def dead_window(self) -> int:
        """Tokens without firing after which a feature counts as dead."""
        return self.dead_feature_window or max(1, min(10_000_000, self.n_tokens // 10))


def check_training(cfg: SAEConfigBase, hp: Hyperparameters) -> None:
    """Refuse what cannot be trained, before anything is loaded.

    Raises:
        Unsupported: an architecture without an objective.
        BadInput: settings that contradict each other or would be ignored.
    """
    if cfg.architecture not in TRAINABLE:
        raise Unsupported(
            f"A {cfg.architecture} cannot be trained here, only loaded and run.",
            fix=f"Train one of: {', '.join(TRAINABLE)}.",
        )
    if cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise BadInput(
            f"normalize_activations={cfg.normalize_activations!r} cannot be asked of an SAE that is to be trained.",
            why="It names a scale that is folded into finished weights, not something that is done when an SAE runs.",
            fix="Leave it 'none' and set scale_inputs=True, which estimates the scale and folds it.",
        )
    for name, architectures in _ONLY_FOR.items():
        value = getattr(hp, name)
        if cfg.architecture not in architectures and value != Hyperparameters.model_fields[name].default:
            raise BadInput(
                f"{name}={value!r} has no meaning for a {cfg.architecture} SAE.",
                why=f"It belongs to: {', '.join(architectures)}.",
                fix=f"Leave {name} out, or choose another architecture.",
            )
    if hp.target_l0 is not None and hp.target_l0 > cfg.d_sae:
        raise BadInput(
            f"target_l0={hp.target_l0:g} is more than the d_sae = {cfg.d_sae} features there are.",
            fix="Lower target_l0; 20 to 100 is usual.",
        )


def training_bytes(cfg: SAEConfigBase, hp: Hyperparameters) -> int:
    """Peak bytes that training takes beside the language model: an upper estimate from the numbers alone.

    Weights, gradients and Adam's two moments in fp32, the buffer, and the batch: dense (batch, d_sae) matrices kept for
    the backward pass, four of them, or two on TopK's sparse path; and eight of (batch, d_in).
    """
    n_parameters = sum(math.prod(shape) for shape in cfg.tensor_shapes().values())
    n_wide = 2 if cfg.architecture == "topk" and hp.topk_path != "dense" else 4
    batch = hp.batch_size * (n_wide * cfg.d_sae + 4 * cfg.d_in + 4 * cfg.output_width)
    return 4 * (4 * n_parameters + hp.buffer_tokens * cfg.d_in + batch)
