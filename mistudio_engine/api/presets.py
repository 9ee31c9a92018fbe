"""How sparse an SAE should be, in three words, and the settings that give that with each architecture.

Measured on stories260K (blocks.2.hook_resid_post, 64 → 512) and bitllama-3M (blocks.4.hook_resid_post, 256 → 2048)
over a quarter of a million to two million tokens; `docs/numbers.md` has the table. TopK, BatchTopK and JumpReLU reach
what they name within a tenth, standard within a quarter. Gated does on stories260K after 600,000 tokens (16, 34, 67);
after 250,000 on bitllama-3M twice as many are active, and longer runs make it sparser.
"""

from __future__ import annotations

from typing import Any, Literal

__all__ = ["L1_PER_ROOT_WIDTH", "PRESETS", "Preset", "default_l1_coefficient", "preset_settings"]

Preset = Literal["sparse", "balanced", "faithful"]
"""About 16, 32 and 64 active features a token."""

_JUMPRELU = {"l0_penalty": "quadratic", "lr": 3e-3, "jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.1}
"""Adam moves a threshold by lr a step at most: with 3e-4 a run of some thousand steps does not reach the target."""

_RELU, _GATED = {"lr": 3e-3}, {"lr": 1e-3}
"""Biases, too, move by lr a step at most: with 3e-4 a million tokens leave twice as many features active as two do."""

PRESETS: dict[str, dict[Preset, dict[str, Any]]] = {
    "relu": {"sparse": _RELU, "balanced": _RELU, "faithful": _RELU},
    "gated": {"sparse": _GATED, "balanced": _GATED, "faithful": _GATED},
    "jumprelu": {
        "sparse": {**_JUMPRELU, "target_l0": 16},
        "balanced": {**_JUMPRELU, "target_l0": 32},
        "faithful": {**_JUMPRELU, "target_l0": 64},
    },
    "topk": {"sparse": {"k": 16}, "balanced": {"k": 32}, "faithful": {"k": 64}},
    "batchtopk": {"sparse": {"k": 16}, "balanced": {"k": 32}, "faithful": {"k": 64}},
}
"""By activation, then by word; `k` is an argument of its own, all others are hyperparameters."""

L1_PER_ROOT_WIDTH: dict[str, dict[Preset, float]] = {
    "relu": {"sparse": 0.19, "balanced": 0.105, "faithful": 0.06},
    "gated": {"sparse": 0.45, "balanced": 0.225, "faithful": 0.1},
}
"""What l1_coefficient is, divided by the root of the input's width d: that is how it carries over from one model to
another. Inputs have norm √d, so the squared error grows with d and the activations with √d, and so must the weight
that balances the two."""


def preset_settings(activation: str, preset: Preset | None) -> dict[str, Any]:
    """The settings of a preset that do not depend on the input's width; none without one.

    Raises:
        KeyError: no such preset.
    """
    return dict(PRESETS[activation][preset]) if preset else {}


def default_l1_coefficient(activation: str, d_in: int, preset: Preset | None = None) -> float:
    """The weight of the L1 penalty for inputs of a width; without a preset the balanced one."""
    return round(L1_PER_ROOT_WIDTH[activation][preset or "balanced"] * d_in**0.5, 3)
