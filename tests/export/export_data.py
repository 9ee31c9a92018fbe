"""A small export of our own invention: three features of an SAE that sorts the weather."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from mistudio_engine.api.sae_config import TopKConfig
from mistudio_engine.export.feature_json import Activation, FeatureExport, Histogram, TokenValue, TopToken
from mistudio_engine.export.studio_zip import SAEFacts
from mistudio_engine.saes import new_sae, save_sae

ABOUT = SAEFacts(
    sae_id="sae/weather-L1",
    sae_name="weather L1\n# not a heading",
    model_name="tiny-forecaster",
    layer=1,
    d_in=4,
    d_sae=8,
    architecture="topk",
    export_date=datetime(2025, 12, 5, 10, 30, 7, tzinfo=UTC),
    provenance={"seed": 16, "bos_policy": "context", "n_tokens": 1000},
)

RAIN = FeatureExport(
    index=0,
    label="words of rain — 雨, дождь",
    category="Weather > Water > Rain",
    activation_frequency=0.023,
    max_activation=8.5,
    mean_activation=2.25,
    top_positive=[TokenValue(" rain", 7, 0.875), TokenValue("雨", 9, 0.5), TokenValue(" wet", 8, 0.25)],
    top_negative=[TokenValue(" dry", 3, -0.75), TokenValue(" sun", 4, -0.5)],
    histogram=Histogram([0.0, 4.0, 8.5], [20, 3], 1000, min=0.125, max=8.5, mean=2.25, std=1.5),
    top_tokens=[TopToken(" rain", 7, 15, 3.25, 8.5), TopToken("雨", 9, 8, 1.5, 4.0)],
    activations=[
        Activation(["The", " rain", " fell"], [0.0, 8.5, 0.25], 1),
        Activation(["<0xE9>", "<0x9B>", "<0xA8>"], [0.0, 0.0, 4.0], 2, context_before="", context_after=" 雨"),
    ],
)
DEAD = FeatureExport(
    index=2,
    activation_frequency=0.0,
    max_activation=0.0,
    mean_activation=0.0,
    top_positive=[],
    top_negative=[],
    histogram=Histogram([0.0, 0.0, 0.0], [0, 0], 1000),
    top_tokens=[],
)
UNKNOWN = FeatureExport(index=7, label='"quoted" \\ and </script>')
FEATURES = [RAIN, DEAD, UNKNOWN]


def saelens_folder(folder: Path) -> Path:
    """A TopK SAE of 4 → 8, saved as SAELens saves them; the same bytes each time."""
    grid = torch.arange(32, dtype=torch.float32)
    tensors = {
        "W_enc": (grid / 32 - 0.5).reshape(4, 8),
        "W_dec": (grid / 16 - 1).reshape(8, 4),
        "b_enc": torch.zeros(8),
        "b_dec": torch.arange(4, dtype=torch.float32),
    }
    cfg = TopKConfig(d_in=4, d_sae=8, k=2, hook_name="blocks.1.hook_resid_post", model_name="tiny-forecaster")
    return Path(save_sae(new_sae(cfg, tensors), folder))


def many(n: int) -> Iterator[FeatureExport]:
    """n features, each of ten kilobytes or so, active on a tenth of the tokens."""
    for index in range(n):
        generator = random.Random(index)
        windows = []
        for _ in range(10):
            values = [generator.random() * (generator.random() < 0.1) for _ in range(64)]
            tokens = [f" w{int(1000 * generator.random() ** 3)}" for _ in range(64)]
            windows.append(Activation(tokens, values, values.index(max(values))))
        yield FeatureExport(index, label=f"feature {index}", activations=windows)
