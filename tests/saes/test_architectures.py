"""Each architecture has a class, a config and the behaviour that they share."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_data import ALL, activations, config_values, random_sae

from mistudio_engine.api.errors import BadInput, WrongShape
from mistudio_engine.api.sae_config import (
    DTYPE_BYTES,
    SAEConfig,
    SAEConfigBase,
    SkipTranscoderConfig,
    TopKConfig,
    parse_sae_config,
    sae_bytes,
)
from mistudio_engine.saes import ARCHITECTURES, new_sae


def test_the_union_the_classes_and_the_names_agree() -> None:
    configs = get_args(get_args(SAEConfig)[0])
    assert {cfg.model_fields["architecture"].default for cfg in configs} == set(ARCHITECTURES)
    assert len({*ARCHITECTURES.values()}) == len(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ALL)
def test_every_field_of_a_config_says_what_it_is(architecture: str) -> None:
    cfg = parse_sae_config(config_values(architecture))
    fields = type(cfg).model_fields
    assert [name for name, field in fields.items() if not field.description and name != "architecture"] == []


@given(
    architecture=st.sampled_from(ALL),
    d_in=st.integers(1, 9),
    d_sae=st.integers(1, 17),
    batch=st.lists(st.integers(0, 3), max_size=2),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    norm=st.sampled_from(["none", "layer_norm", "constant_norm_rescale"]),
)
@settings(max_examples=150, deadline=None)
def test_shapes_and_types_hold_for_any_batch(
    architecture: str, d_in: int, d_sae: int, batch: list[int], dtype: str, norm: str
) -> None:
    sae = random_sae(architecture, d_in=d_in, d_sae=d_sae, dtype=dtype, normalize_activations=norm)
    x = torch.randn(*batch, d_in)
    feature_acts = sae.encode(x)
    assert feature_acts.shape == (*batch, d_sae)
    assert feature_acts.dtype == getattr(torch, dtype)
    assert bool((feature_acts >= 0).all())
    assert sae(x).shape == (*batch, sae.cfg.output_width)
    assert sum(p.numel() * p.element_size() for p in sae.parameters()) == sae_bytes(sae.cfg)


@pytest.mark.parametrize("architecture", ALL)
def test_some_features_are_the_same_as_all_of_them(architecture: str) -> None:
    sae = random_sae(architecture)
    x, features = activations(sae), torch.tensor([3, 0, 39, 3])
    torch.testing.assert_close(sae.feature_acts(x, features), sae.encode(x)[:, features])


@pytest.mark.parametrize("architecture", ALL)
def test_sparse_activations_leave_nothing_out(architecture: str) -> None:
    sae = random_sae(architecture)
    x = activations(sae)
    values, indices = sae.encode_sparse(x)
    torch.testing.assert_close(torch.zeros(len(x), 40).scatter_add(1, indices, values), sae.encode(x))


@pytest.mark.parametrize("architecture", ALL)
def test_a_token_of_zeros_stays_finite_under_every_norm(architecture: str) -> None:
    for norm in ("none", "layer_norm", "constant_norm_rescale"):
        sae = random_sae(architecture, normalize_activations=norm)
        assert bool(sae(torch.zeros(2, 12)).isfinite().all())


def test_decoding_under_a_norm_asks_for_the_input() -> None:
    sae = random_sae("standard", normalize_activations="layer_norm")
    x = activations(sae)
    with pytest.raises(BadInput, match="needs the input"):
        sae.decode(sae.encode(x))
    torch.testing.assert_close(sae.decode(sae.encode(x), like=x), sae(x))


def test_an_sae_can_be_used_twice_in_any_order() -> None:
    sae = random_sae("standard", normalize_activations="constant_norm_rescale")
    a, b = activations(sae, seed=1), activations(sae, seed=2)
    acts_a, acts_b = sae.encode(a), sae.encode(b)
    torch.testing.assert_close(sae.decode(acts_a, like=a), sae(a))
    torch.testing.assert_close(sae.decode(acts_b, like=b), sae(b))


@pytest.mark.parametrize("architecture", [name for name in ALL if "transcoder" not in name])
def test_heads_go_in_and_come_out_as_heads(architecture: str) -> None:
    sae = random_sae(architecture, reshape_activations="hook_z")
    x = activations(sae)
    split = x.view(8, 8, 3, 4)
    assert sae.encode(split).shape == (8, 8, 40)
    assert torch.equal(sae(split).flatten(-2), sae(x.view(8, 8, 12)))


def test_the_skip_is_in_the_forward_pass_and_not_in_decode() -> None:
    sae = random_sae("skip_transcoder")
    x = activations(sae)
    skip = sae(x) - sae.decode(sae.encode(x))
    torch.testing.assert_close(skip, x @ sae.get_parameter("W_skip").T)


def test_topk_never_has_more_than_k_active_and_drops_the_negative() -> None:
    sae = random_sae("topk", k=7)
    sae.get_parameter("b_enc").sub_(3)
    l0 = (sae.encode(activations(sae)) > 0).sum(-1)
    assert int(l0.max()) <= 7
    assert int(l0.min()) < 7


def test_a_decoder_row_of_zeros_makes_no_nan() -> None:
    sae = random_sae("topk", rescale_acts_by_decoder_norm=True)
    sae.W_dec[3] = 0
    assert bool(sae(activations(sae)).isfinite().all())


def test_the_wrong_width_is_named() -> None:
    sae = random_sae("standard", hook_name="blocks.1.hook_resid_post")
    with pytest.raises(WrongShape, match=r"width 13 do not fit.*d_in = 12.*blocks\.1\.hook_resid_post"):
        sae(torch.zeros(2, 13))


def test_tensors_other_than_the_configs_are_refused() -> None:
    cfg = random_sae("jumprelu").cfg
    tensors = {name: torch.zeros(shape) for name, shape in cfg.tensor_shapes().items()}
    with pytest.raises(WrongShape, match="looks transposed"):
        new_sae(cfg, tensors | {"W_enc": torch.zeros(40, 12)})
    with pytest.raises(WrongShape, match="also has b_mag"):
        new_sae(cfg, tensors | {"b_mag": torch.zeros(40)})
    del tensors["threshold"]
    with pytest.raises(WrongShape, match="lacks threshold"):
        new_sae(cfg, tensors)


def test_the_documents_names_are_understood() -> None:
    cfg = parse_sae_config({"architecture": "topk", "hidden_dim": 8, "latent_dim": 32, "top_k_sparsity": 4})
    assert cfg == TopKConfig(d_in=8, d_sae=32, k=4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"architecture": "topk", "d_in": 8, "d_sae": 4, "k": 5}, "k is 5 and there are only d_sae = 4"),
        ({"architecture": "topk", "d_in": 8, "d_sae": 4}, "k: Field required"),
        ({"architecture": "standard", "d_in": 0, "d_sae": 4}, "d_in: .*greater than 0.*got 0"),
        ({"architecture": "standard", "d_in": 1, "d_sae": 4, "dsae": 4}, "dsae: Extra inputs are not permitted"),
        (
            {"architecture": "transcoder", "d_in": 1, "d_sae": 4, "d_out": 2, "apply_b_dec_to_input": True},
            "apply_b_dec",
        ),
        ({"architecture": "sparse", "d_in": 1, "d_sae": 4}, "'sparse'"),
        ({}, "discriminator"),
    ],
)
def test_an_impossible_config_says_what_is_wrong(values: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        parse_sae_config(values)


def test_a_skip_transcoder_onto_its_own_hook_is_refused_with_the_reason() -> None:
    same: dict[str, Any] = {"hook_name": "blocks.1.hook_resid_post", "hook_name_out": "blocks.1.hook_resid_post"}
    with pytest.raises(ValueError, match="perfect solution without any feature"):
        SkipTranscoderConfig(d_in=4, d_sae=8, d_out=4, **same)


def test_a_config_cannot_be_changed() -> None:
    cfg: SAEConfigBase = random_sae("standard").cfg
    with pytest.raises(ValueError, match="frozen"):
        cfg.d_in = 3  # pyright: ignore[reportAttributeAccessIssue]
