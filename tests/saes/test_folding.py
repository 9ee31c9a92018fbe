"""Folding moves numbers between weights and leaves what the SAE computes."""

from __future__ import annotations

import pytest
import torch
from sae_data import ALL, TRANSCODERS, activations, random_sae
from torch import Tensor

from mistudio_engine.api.errors import Unsupported
from mistudio_engine.saes import SAE, fold_decoder_norms, fold_normalization

ON_ONE_HOOK = [name for name in ALL if name not in TRANSCODERS]
TOPK = ["topk", "topk_transcoder", "topk_skip_transcoder"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def means(sae: SAE) -> tuple[Tensor, Tensor]:
    """Of the input and of the output, far from zero and from each other."""
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(n, generator=generator) * 3 + 2 for n in (sae.cfg.d_in, sae.cfg.output_width))  # type: ignore


@pytest.mark.parametrize("architecture", ON_ONE_HOOK)
@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_raw_inputs_do_what_normalised_ones_did(architecture: str, subtracts: bool, centred: bool) -> None:
    sae = random_sae(architecture, apply_b_dec_to_input=subtracts)
    scale, mean = 3.5, means(sae)[0] if centred else torch.zeros(12)
    x = activations(sae) + mean
    z = (x - mean) * scale
    feature_acts, sae_out = sae.encode(z), sae(z) / scale + mean
    assert 0 < float((feature_acts > 0).float().mean()) < 1
    fold_normalization(sae, scale, mean if centred else None)
    torch.testing.assert_close(sae.encode(x), feature_acts, **CLOSE)
    torch.testing.assert_close(sae(x), sae_out, **CLOSE)


@pytest.mark.parametrize("architecture", TRANSCODERS)
@pytest.mark.parametrize("centred", [True, False])
def test_a_transcoder_folds_another_scale_and_mean_at_its_output(architecture: str, centred: bool) -> None:
    sae = random_sae(architecture)
    scale, out_scale = 3.5, 0.2
    mean, out_mean = means(sae) if centred else (torch.zeros(12), torch.zeros(15))
    x = activations(sae) + mean
    z = (x - mean) * scale
    feature_acts, sae_out = sae.encode(z), sae(z) / out_scale + out_mean
    assert 0 < float((feature_acts > 0).float().mean()) < 1
    if centred:
        fold_normalization(sae, scale, mean, out_scale=out_scale, out_mean=out_mean)
    else:
        fold_normalization(sae, scale, out_scale=out_scale)
    torch.testing.assert_close(sae.encode(x), feature_acts, **CLOSE)
    torch.testing.assert_close(sae(x), sae_out, **CLOSE)


def test_means_fold_at_one_end_of_a_transcoder_alone() -> None:
    sae = random_sae("skip_transcoder")
    mean, out_mean = means(sae)
    x = activations(sae) + mean
    inward, outward = random_sae("skip_transcoder"), random_sae("skip_transcoder")
    fold_normalization(inward, 2.0, mean, out_scale=0.5)
    torch.testing.assert_close(inward(x), sae((x - mean) * 2) / 0.5, **CLOSE)
    fold_normalization(outward, 2.0, out_scale=0.5, out_mean=out_mean)
    torch.testing.assert_close(outward(x), sae(x * 2) / 0.5 + out_mean, **CLOSE)


@pytest.mark.parametrize("architecture", [name for name in ALL if name not in TOPK])
def test_folded_decoder_norms_change_units_and_nothing_else(architecture: str) -> None:
    sae = random_sae(architecture)
    x, norms = activations(sae), sae.W_dec.norm(dim=-1)
    feature_acts, sae_out = sae.encode(x), sae(x)
    fold_decoder_norms(sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(40))
    torch.testing.assert_close(sae.encode(x), feature_acts * norms, **CLOSE)
    torch.testing.assert_close(sae(x), sae_out, **CLOSE)


@pytest.mark.parametrize("architecture", TOPK)
def test_a_topk_that_rescales_keeps_its_activations_when_norms_are_folded(architecture: str) -> None:
    sae = random_sae(architecture, rescale_acts_by_decoder_norm=True)
    x = activations(sae)
    feature_acts, sae_out = sae.encode(x), sae(x)
    fold_decoder_norms(sae)
    torch.testing.assert_close(sae.encode(x), feature_acts, **CLOSE)
    torch.testing.assert_close(sae(x), sae_out, **CLOSE)


@pytest.mark.parametrize("architecture", TOPK)
def test_norms_that_would_change_the_choice_are_not_folded(architecture: str) -> None:
    with pytest.raises(Unsupported, match="change which features it chooses"):
        fold_decoder_norms(random_sae(architecture))


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(Unsupported, match="A transcoder has two scales"):
        fold_normalization(random_sae("transcoder"), 2.0)
    with pytest.raises(Unsupported, match="A standard has one scale"):
        fold_normalization(random_sae("standard"), 2.0, out_scale=3.0)
    with pytest.raises(Unsupported, match="no input scale"):
        fold_normalization(random_sae("standard", normalize_activations="layer_norm"), 2.0)
