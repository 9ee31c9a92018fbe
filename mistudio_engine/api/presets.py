"""How sparse an SAE should be, in three words, and the settings that give that with each architecture.

Measured on stories260K (blocks.2.hook_resid_post, 64 → 512) and bitllama-3M (256 → 2048); `docs/numbers.md` has the
table. Coefficients belong to inputs of mean norm √d, so they carry over between models better than raw ones, and only
roughly.
"""

from __future__ import annotations

from typing import Any, Literal

__all__ = ["PRESETS", "Preset", "preset_settings"]

Preset = Literal["sparse", "balanced", "faithful"]
"""About 16, 32 and 64 active features a token."""

PRESETS: dict[str, dict[Preset, dict[str, Any]]] = {
    "relu": {
        "sparse": {"l1_coefficient": 8.0},
        "balanced": {"l1_coefficient": 4.0},
        "faithful": {"l1_coefficient": 2.0},
    },
    "gated": {
        "sparse": {"l1_coefficient": 8.0},
        "balanced": {"l1_coefficient": 4.0},
        "faithful": {"l1_coefficient": 2.0},
    },
    "jumprelu": {
        "sparse": {"l0_penalty": "quadratic", "target_l0": 16},
        "balanced": {"l0_penalty": "quadratic", "target_l0": 32},
        "faithful": {"l0_penalty": "quadratic", "target_l0": 64},
    },
    "topk": {"sparse": {"k": 16}, "balanced": {"k": 32}, "faithful": {"k": 64}},
    "batchtopk": {"sparse": {"k": 16}, "balanced": {"k": 32}, "faithful": {"k": 64}},
}
"""By activation, then by word; `k` is an argument of its own, all others are hyperparameters."""


def preset_settings(activation: str, preset: Preset | None) -> dict[str, Any]:
    """The settings of a preset; none without one."""
    return dict(PRESETS[activation][preset]) if preset else {}
