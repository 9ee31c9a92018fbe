"""What our SAEs compute equals what SAELens 6.54.12 computed with the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mistudio_engine.saes import load_sae, save_sae

NAMES = [
    "batchtopk_inference",
    "gated",
    "jumprelu",
    "jumprelu_no_bdec",
    "legacy_v5_topk",
    "skip_transcoder",
    "standard",
    "standard_layer_norm",
    "topk",
    "topk_rescale",
]


@pytest.mark.parametrize("name", NAMES)
def test_activations_and_reconstructions_equal_saelens(shared: Path, name: str) -> None:
    folder = shared / "fixtures/native" / name
    sae, io = load_sae(folder), load_file(folder / "io.safetensors")
    x = io["x"]
    feature_acts = sae.encode(x)
    assert torch.equal(feature_acts > 0, io["feature_acts"] > 0)
    torch.testing.assert_close(feature_acts, io["feature_acts"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(feature_acts, like=x), io["recon"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), io.get("forward", io["recon"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_activations_are_the_dense_ones(shared: Path, name: str) -> None:
    folder = shared / "fixtures/native" / name
    sae, io = load_sae(folder), load_file(folder / "io.safetensors")
    values, indices = sae.encode_sparse(io["x"].flatten(0, 1))
    dense = torch.zeros(len(values), sae.cfg.d_sae).scatter(1, indices, values)
    torch.testing.assert_close(dense, io["feature_acts"].flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["saelens", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_sae_loads_with_the_same_bits_and_the_same_config(
    shared: Path, tmp_path: Path, name: str, format: str
) -> None:
    sae = load_sae(shared / "fixtures/native" / name)
    again = load_sae(save_sae(sae, tmp_path / name, format=format))
    assert again.cfg == sae.cfg
    for (key, ours), (other, theirs) in zip(sae.named_parameters(), again.named_parameters(), strict=True):
        assert key == other
        assert torch.equal(ours, theirs)


def test_every_native_fixture_is_tested(shared: Path) -> None:
    assert sorted(folder.name for folder in (shared / "fixtures/native").iterdir()) == NAMES
