"""Each architecture has a class, a config and the behaviour that they share."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_data import ALL, SKIPS, TRANSCODERS, activations, config_values, random_sae

from mistudio_engine.api.errors import BadInput, WrongShape
from mistudio_engine.api.sae_config import (
    DTYPE_BYTES,
    SAEConfig,
    SAEConfigBase,
    TopKConfig,
    activation_of,
    parse_sae_config,
    sae_bytes,
)
from mistudio_engine.saes import ARCHITECTURES, new_sae


def test_the_union_the_classes_and_the_names_agree() -> None:
    configs = get_args(get_args(SAEConfig)[0])
    assert {cfg.model_fields["architecture"].default for cfg in configs} == set(ARCHITECTURES)


def test_a_class_is_an_activation_and_wiring_adds_none() -> None:
    classes: dict[str, set[type]] = {activation_of(name): set() for name in ALL}
    for name in ALL:
        classes[activation_of(name)].add(ARCHITECTURES[name])
    assert {activation: len(each) for activation, each in classes.items()} == dict.fromkeys(classes, 1)
    assert sorted(classes) == ["batchtopk", "gated", "jumprelu", "relu", "topk"]
    assert classes["batchtopk"] == classes["jumprelu"]  # finished, one threshold


@pytest.mark.parametrize("architecture", ALL)
def test_the_tensors_are_those_of_the_activation_and_of_the_wiring(architecture: str) -> None:
    cfg = parse_sae_config(config_values(architecture))
    of_activation = {"gated": {"b_gate", "b_mag", "r_mag"}, "jumprelu": {"b_enc", "threshold"}}
    of_activation["batchtopk"] = of_activation["jumprelu"]
    shapes = cfg.tensor_shapes()
    assert cfg.is_transcoder == (architecture in TRANSCODERS)
    assert cfg.has_skip == (architecture in SKIPS)
    d_out = 15 if architecture in TRANSCODERS else 12
    expected: dict[str, tuple[int, ...]] = {"W_enc": (12, 40), "W_dec": (40, d_out), "b_dec": (d_out,)}
    expected |= dict.fromkeys(of_activation.get(cfg.activation, {"b_enc"}), (40,))
    assert shapes == expected | ({"W_skip": (d_out, 12)} if architecture in SKIPS else {})


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


@pytest.mark.parametrize("architecture", [name for name in ALL if name not in TRANSCODERS])
def test_heads_go_in_and_come_out_as_heads(architecture: str) -> None:
    sae = random_sae(architecture, reshape_activations="hook_z")
    x = activations(sae)
    split = x.view(8, 8, 3, 4)
    assert sae.encode(split).shape == (8, 8, 40)
    assert torch.equal(sae(split).flatten(-2), sae(x.view(8, 8, 12)))


@pytest.mark.parametrize("architecture", SKIPS)
def test_the_skip_is_in_the_forward_pass_and_not_in_decode(architecture: str) -> None:
    sae = random_sae(architecture)
    x = activations(sae)
    skip = sae(x) - sae.decode(sae.encode(x))
    torch.testing.assert_close(skip, x @ sae.get_parameter("W_skip").T)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_a_transcoder_leaves_b_dec_at_its_output_and_undoes_no_norm(architecture: str) -> None:
    sae = random_sae(architecture, normalize_activations="layer_norm")
    x = activations(sae)
    feature_acts = sae.encode(x)
    skip = x @ sae.get_parameter("W_skip").T if architecture in SKIPS else 0
    sae.b_dec.add_(1)
    assert torch.equal(sae.encode(x), feature_acts)
    torch.testing.assert_close(sae(x), sae.decode(feature_acts) + skip)
    torch.testing.assert_close(sae.encode(x * 3), feature_acts, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_batchtopk_runs_as_a_jumprelu(architecture: str) -> None:
    sae = random_sae(architecture)
    tensors = {name: p.detach() for name, p in sae.named_parameters()}
    plain = new_sae(parse_sae_config(config_values("jumprelu")), tensors)
    x = activations(sae)
    assert torch.equal(sae.encode(x), plain.encode(x))
    assert torch.equal(sae(x), plain(x))


@pytest.mark.parametrize("architecture", ["topk", "topk_transcoder", "topk_skip_transcoder"])
def test_topk_never_has_more_than_k_active_and_drops_the_negative(architecture: str) -> None:
    sae = random_sae(architecture, k=7)
    sae.get_parameter("b_enc").sub_(3)
    l0 = (sae.encode(activations(sae)) > 0).sum(-1)
    assert int(l0.max()) <= 7
    assert int(l0.min()) < 7


@pytest.mark.parametrize("architecture", ["topk", "topk_transcoder", "topk_skip_transcoder"])
def test_a_decoder_row_of_zeros_makes_no_nan(architecture: str) -> None:
    sae = random_sae(architecture, rescale_acts_by_decoder_norm=True)
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
        ({"architecture": "topk_transcoder", "d_in": 8, "d_sae": 4, "d_out": 2, "k": 5}, "k is 5"),
        ({"architecture": "batchtopk", "d_in": 8, "d_sae": 4, "k": 2.5}, "k: "),
        ({"architecture": "jumprelu_transcoder", "d_in": 8, "d_sae": 4}, "d_out: Field required"),
        ({"architecture": "matryoshka_batchtopk", "d_in": 8, "d_sae": 4, "k": 1}, "widths: Field required"),
        ({"architecture": "sparse", "d_in": 1, "d_sae": 4}, "'sparse'"),
        ({}, "discriminator"),
    ],
)
def test_an_impossible_config_says_what_is_wrong(values: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        parse_sae_config(values)


@pytest.mark.parametrize("widths", [[20, 10, 40], [10, 10, 40], [10, 20], [], [0, 40], [10, 50]])
def test_nested_dictionaries_have_to_grow_and_end_with_all_features(widths: list[int]) -> None:
    with pytest.raises(BadInput, match=r"widths"):
        parse_sae_config(config_values("matryoshka_batchtopk", widths=widths))
    assert parse_sae_config(config_values("matryoshka_batchtopk", widths=[40])).d_sae == 40


@pytest.mark.parametrize("architecture", SKIPS)
def test_a_skip_transcoder_onto_its_own_hook_is_refused_with_the_reason(architecture: str) -> None:
    same: dict[str, Any] = {"hook_name": "blocks.1.hook_resid_post", "hook_name_out": "blocks.1.hook_resid_post"}
    with pytest.raises(BadInput, match="perfect solution without any feature"):
        parse_sae_config(config_values(architecture, **same))


def test_a_config_cannot_be_changed() -> None:
    cfg: SAEConfigBase = random_sae("standard").cfg
    with pytest.raises(ValueError, match="frozen"):
        cfg.d_in = 3  # pyright: ignore[reportAttributeAccessIssue]
