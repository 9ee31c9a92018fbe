"""An SAE that is brought in is kept in the format that fits its architecture, and its record says what it came as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mistudio_engine.api.operations import GetSAE
from mistudio_engine.api.records import SAERecord
from mistudio_engine.api.sae_config import parse_sae_config
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.saes import detect_format, load_sae, new_sae, save_sae

MLP: dict[str, Any] = {"hook_name": "blocks.2.ln2.hook_normalized", "hook_name_out": "blocks.2.hook_mlp_out"}
TRANSCODER: dict[str, Any] = {
    "architecture": "topk_transcoder",
    "k": 4,
    "d_out": 64,
    "apply_b_dec_to_input": False,
    **MLP,
}
STANDARD = {"architecture": "standard", "hook_name": "blocks.2.hook_resid_post"}


@pytest.mark.parametrize(
    ("config", "came_as", "kept_as"),
    [(TRANSCODER, "native", "native"), (STANDARD, "native", "saelens"), (STANDARD, "saelens", "saelens")],
)
def test_it_is_kept_in_the_format_of_its_architecture(
    engine: Engine, tmp_path: Path, config: dict[str, Any], came_as: str, kept_as: str
) -> None:
    cfg = parse_sae_config({"d_in": 64, "d_sae": 24, "model_name": "tiny", **config})
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in cfg.tensor_shapes().items()}
    sae = new_sae(cfg, weights)
    name = f"kept-{came_as}-{kept_as}"
    save_sae(sae, tmp_path / name, format=came_as)
    job = engine.jobs.wait(engine.call(GetSAE(source=str(tmp_path / name), name=name)).slug, 60)
    assert job.state == "completed", job.error
    record = engine.store.get(SAERecord, name)
    assert (record.source_format, record.format) == (came_as, kept_as)
    folder = engine.home / record.folder
    assert detect_format(folder) == kept_as
    x = torch.randn(8, 64, generator=generator)
    assert torch.equal(load_sae(folder)(x), load_sae(tmp_path / name)(x))


def test_what_was_trained_here_came_as_nothing_else(engine: Engine) -> None:
    record = engine.store.get(SAERecord, "first")
    assert (record.source_format, record.format) == (None, "saelens")
