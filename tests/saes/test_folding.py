"""Folding moves numbers between weights and leaves what the SAE computes."""

from __future__ import annotations

import pytest
import torch
from sae_data import activations, random_sae

from mistudio_engine.api.errors import Unsupported
from mistudio_engine.saes import fold_decoder_norms, fold_input_scale

FOLDABLE = ["standard", "gated", "jumprelu"]


@pytest.mark.parametrize("architecture", [*FOLDABLE, "topk"])
@pytest.mark.parametrize("subtracts", [True, False])
def test_a_folded_input_scale_makes_raw_inputs_do_what_scaled_ones_did(architecture: str, subtracts: bool) -> None:
    sae = random_sae(architecture, apply_b_dec_to_input=subtracts)
    x, scale = activations(sae), 3.5
    feature_acts, sae_out = sae.encode(x * scale), sae(x * scale) / scale
    fold_input_scale(sae, scale)
    torch.testing.assert_close(sae.encode(x), feature_acts)
    torch.testing.assert_close(sae(x), sae_out)


@pytest.mark.parametrize("architecture", FOLDABLE)
def test_folded_decoder_norms_change_units_and_nothing_else(architecture: str) -> None:
    sae = random_sae(architecture)
    x, norms = activations(sae), sae.W_dec.norm(dim=-1)
    feature_acts, sae_out = sae.encode(x), sae(x)
    fold_decoder_norms(sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(40))
    torch.testing.assert_close(sae.encode(x), feature_acts * norms, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), sae_out, rtol=1e-4, atol=1e-5)


def test_a_topk_that_rescales_keeps_its_activations_when_norms_are_folded() -> None:
    sae = random_sae("topk", rescale_acts_by_decoder_norm=True)
    x = activations(sae)
    feature_acts, sae_out = sae.encode(x), sae(x)
    fold_decoder_norms(sae)
    torch.testing.assert_close(sae.encode(x), feature_acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x), sae_out, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(Unsupported, match="change which features it chooses"):
        fold_decoder_norms(random_sae("topk"))
    with pytest.raises(Unsupported, match="no input scale"):
        fold_input_scale(random_sae("transcoder"), 2.0)
    with pytest.raises(Unsupported, match="no input scale"):
        fold_input_scale(random_sae("standard", normalize_activations="layer_norm"), 2.0)
