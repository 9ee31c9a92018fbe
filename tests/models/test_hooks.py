"""Activations are read and replaced where TransformerLens has them, in every family; no hook outlives its `with`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mistudio_engine.api.errors import BadInput, Internal, UnknownHook, Unsupported, WrongShape
from mistudio_engine.models.families import FAMILIES, SITES
from mistudio_engine.models.hooks import (
    HookPoint,
    activations,
    check_hook,
    check_width,
    edit,
    hook_names,
    hook_width,
    parse_hook,
)
from mistudio_engine.models.layout import find_layout


def n_hooks(hf: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


def hidden_states(lm, ids):
    with torch.no_grad():
        return lm.hf(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states


def has(lm, site):
    return site in lm.layout.taps


def test_every_family_of_the_table_has_a_tiny_model_that_takes_its_row(tiny_configs, make_tiny):
    rows = {make_tiny(*config).layout.family.name for config in tiny_configs.values()}
    assert rows == {family.name for family in FAMILIES}
    types = {model_type for model_type, _ in tiny_configs.values()}
    assert types == {model_type for family in FAMILIES for model_type in family.model_types}


def test_a_captured_residual_equals_hidden_states_bit_for_bit(lm, ids):
    hidden = hidden_states(lm, ids)
    captured = activations(lm, ids, hook_names(lm))
    for layer in range(lm.n_layers):
        assert torch.equal(captured[f"blocks.{layer}.hook_resid_pre"], hidden[layer])
        if layer + 1 < lm.n_layers:
            assert torch.equal(captured[f"blocks.{layer}.hook_resid_post"], hidden[layer + 1])


def test_the_last_residual_gives_the_logits_through_final_norm_and_unembedding(lm, ids):
    last = activations(lm, ids, [f"blocks.{lm.n_layers - 1}.hook_resid_post"]).popitem()[1]
    decoder = lm.hf.get_submodule(lm.layout.family.decoder)
    normed = last if lm.layout.final_norm is None else lm.layout.final_norm(last)
    if getattr(decoder, "project_out", None) is not None:
        normed = decoder.project_out(normed)
    logits = lm.hf.get_output_embeddings()(normed)
    cap = getattr(lm.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, lm.logits(ids))


def test_the_parts_of_a_block_add_up_to_its_output(lm, ids):
    at = activations(lm, ids, hook_names(lm))
    if lm.layout.family.name == "opt_post_norm":
        pytest.skip("this family normalises after adding: nothing adds up to the block's output")
    for layer in range(lm.n_layers):
        pre, post, attn, mlp = (
            at[f"blocks.{layer}.{site}"]
            for site in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
        )
        torch.testing.assert_close(pre + attn + mlp, post)
        if has(lm, "hook_resid_mid"):
            assert torch.equal(at[f"blocks.{layer}.hook_resid_mid"] + mlp, post)
            torch.testing.assert_close(at[f"blocks.{layer}.hook_resid_mid"], pre + attn)


def test_z_projects_to_the_attention_output(lm, ids):
    at = activations(lm, ids, hook_names(lm))
    for layer, block in enumerate(lm.layout.blocks):
        z = at[f"blocks.{layer}.attn.hook_z"]
        assert z.shape[-1] == hook_width(lm, f"blocks.{layer}.attn.hook_z")
        out = block.get_submodule(lm.layout.family.z)(z)
        if lm.layout.family.attn_out == "post_attention_layernorm":
            out = block.post_attention_layernorm(out)  # TransformerLens's attn_out is after Gemma's second norm
        torch.testing.assert_close(out, at[f"blocks.{layer}.hook_attn_out"])


def test_the_normalized_site_is_before_the_gain_of_an_rmsnorm_and_after_that_of_a_layernorm(lm, ids):
    if not has(lm, "ln2.hook_normalized"):
        pytest.skip("this family has no norm before its MLP")
    at = activations(lm, ids, hook_names(lm))
    for layer, block in enumerate(lm.layout.blocks):
        norm = block.get_submodule(lm.layout.family.ln2)
        source = "hook_resid_mid" if has(lm, "hook_resid_mid") else "hook_resid_pre"
        x, normalized = at[f"blocks.{layer}.{source}"], at[f"blocks.{layer}.ln2.hook_normalized"]
        if isinstance(norm, nn.LayerNorm):
            torch.testing.assert_close(normalized, norm(x))
        else:
            torch.testing.assert_close(normalized.pow(2).mean(-1), torch.ones(ids.shape), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(normalized * (norm.weight + lm.layout.family.gain_offset), norm(x))


def test_widths_are_what_is_captured(lm, ids):
    for name, value in activations(lm, ids, hook_names(lm)).items():
        assert value.shape == (*ids.shape, hook_width(lm, name))
        assert not value.requires_grad


def test_an_identity_edit_changes_no_bit(lm, ids):
    baseline = lm.logits(ids)
    for name in hook_names(lm):
        with edit(lm, name, lambda x: x):
            assert torch.equal(lm.logits(ids), baseline), name
        with edit(lm, name, lambda x: x.clone()):
            assert torch.equal(lm.logits(ids), baseline), name
    assert torch.equal(lm.logits(ids), baseline)


def test_an_edit_at_every_site_is_seen_there_and_reaches_the_logits(lm, ids):
    baseline = lm.logits(ids)
    for name in hook_names(lm):
        before = activations(lm, ids, [name])[name].clone()
        with edit(lm, name, lambda x: x + 0.5 * torch.arange(x.shape[-1])):
            after = activations(lm, ids, [name])[name]
            logits = lm.logits(ids)
        if not name.endswith("hook_normalized"):  # tapped beside the computation: the edit shows downstream of it
            torch.testing.assert_close(after, before + 0.5 * torch.arange(before.shape[-1]))
        assert not torch.allclose(logits, baseline, atol=1e-4), name


def test_adding_to_attn_out_or_to_resid_mid_is_the_same(lm, ids):
    if not has(lm, "hook_resid_mid"):
        pytest.skip("no middle in this family")
    direction = torch.linspace(-1, 1, lm.d_model)
    logits = []
    for site in ("hook_attn_out", "hook_resid_mid"):
        with edit(lm, f"blocks.1.{site}", lambda x: x + direction):
            logits.append(lm.logits(ids))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_adding_to_mlp_out_or_to_resid_post_is_the_same(lm, ids):
    if lm.layout.family.name == "opt_post_norm":
        pytest.skip("this family normalises after adding")
    direction = torch.linspace(-1, 1, lm.d_model)
    logits = []
    for site in ("hook_mlp_out", "hook_resid_post"):
        with edit(lm, f"blocks.1.{site}", lambda x: x + direction):
            logits.append(lm.logits(ids))
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_doubling_the_normalized_site_of_an_rmsnorm_doubles_what_the_mlp_reads(llama, ids):
    with edit(llama, "blocks.1.ln2.hook_normalized", lambda x: 2 * x):
        doubled = activations(llama, ids, ["blocks.1.hook_mlp_out"])["blocks.1.hook_mlp_out"]
    mid = activations(llama, ids, ["blocks.1.hook_resid_mid"])["blocks.1.hook_resid_mid"]
    block = llama.layout.blocks[1]
    torch.testing.assert_close(doubled, block.mlp(2 * block.post_attention_layernorm(mid)))


def test_edits_at_one_hook_apply_in_the_order_in_which_they_were_entered(llama, ids):
    name = "blocks.1.hook_resid_post"
    before = activations(llama, ids, [name])[name]
    with edit(llama, name, lambda x: x + 1), edit(llama, name, lambda x: 2 * x):
        torch.testing.assert_close(activations(llama, ids, [name])[name], 2 * (before + 1))


def test_the_real_models_keep_parity_too(real_lm):
    ids = torch.tensor([real_lm.encode("Once upon a time there was a little girl named Lily.", bos=True)])
    hidden, at = hidden_states(real_lm, ids), activations(real_lm, ids, hook_names(real_lm))
    baseline = real_lm.logits(ids)
    for layer in range(real_lm.n_layers):
        assert torch.equal(at[f"blocks.{layer}.hook_resid_pre"], hidden[layer])
        if layer + 1 < real_lm.n_layers:
            assert torch.equal(at[f"blocks.{layer}.hook_resid_post"], hidden[layer + 1])
    for name in hook_names(real_lm):
        with edit(real_lm, name, lambda x: x.clone()):
            assert torch.equal(real_lm.logits(ids), baseline)


def test_padding_on_the_right_does_not_change_the_real_tokens(lm, ids):
    name = f"blocks.{lm.n_layers - 1}.hook_resid_post"
    alone = activations(lm, ids[:, :8], [name])[name]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    padded = activations(lm, ids, [name], mask)[name][:, :8]
    torch.testing.assert_close(padded, alone)


def test_the_forward_pass_stops_after_the_deepest_hook(lm, ids):
    n_runs = [0] * lm.n_layers

    def count(layer):
        def hook(*_args):
            n_runs[layer] += 1

        return hook

    handles = [block.register_forward_pre_hook(count(layer)) for layer, block in enumerate(lm.layout.blocks)]
    try:
        activations(lm, ids, ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out"])
    finally:
        for handle in handles:
            handle.remove()
    assert n_runs == [1, 1, 0]


def test_no_hook_is_left_after_reading_editing_or_failing(lm, ids):
    before = n_hooks(lm.hf)
    activations(lm, ids, hook_names(lm))
    assert n_hooks(lm.hf) == before

    def fail(_x):
        raise ZeroDivisionError

    for name in hook_names(lm):
        with pytest.raises(ZeroDivisionError), edit(lm, name, fail):
            lm.logits(ids)
        assert n_hooks(lm.hf) == before


def test_no_hook_is_left_when_the_model_itself_fails(llama, ids):
    before = n_hooks(llama.hf)

    def fail(*_args):
        raise RuntimeError("out of order")

    with llama.layout.blocks[1].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="out of order"):
        activations(llama, ids, hook_names(llama))
    assert n_hooks(llama.hf) == before


def test_an_edit_that_never_fires_is_an_error(llama, ids):
    before = n_hooks(llama.hf)
    with pytest.raises(Internal, match="never took place"), edit(llama, "blocks.2.hook_resid_post", lambda x: x):
        activations(llama, ids, ["blocks.0.hook_resid_post"])
    assert n_hooks(llama.hf) == before


def test_an_edit_that_never_fired_does_not_hide_another_error(llama):
    with pytest.raises(KeyError, match="mine"), edit(llama, "blocks.2.hook_resid_post", lambda x: x):
        raise KeyError("mine")


def test_an_edit_of_another_shape_is_refused(llama, ids):
    with (
        pytest.raises(WrongShape, match=r"\(2, 12, 31\).*\(2, 12, 32\)"),
        edit(llama, "blocks.0.hook_resid_post", lambda x: x[..., :-1]),
    ):
        llama.logits(ids)


@pytest.mark.parametrize("site", SITES)
def test_a_hook_name_is_taken_apart_and_put_together(site):
    point = parse_hook(f"blocks.12.{site}")
    assert point == HookPoint(12, site)
    assert str(point) == f"blocks.12.{site}"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("blocks.2.resid_post", "blocks.2.hook_resid_post"),
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("blocks.3.hook_z", "blocks.3.attn.hook_z"),
        ("hook_mlp_out", "blocks.0.hook_mlp_out"),
        ("blocks.4.mlp_out", "blocks.4.hook_mlp_out"),
    ],
)
def test_an_unknown_hook_names_the_sites_and_the_nearest_name(name, suggestion):
    with pytest.raises(UnknownHook) as error:
        parse_hook(name)
    assert suggestion in error.value.fix
    assert all(site in error.value.why for site in SITES)


@pytest.mark.parametrize(
    "name", ["", "blocks.-1.hook_resid_post", "blocks.٣.hook_resid_post", "blocks.1.hook_resid_post\n"]
)
def test_strange_hook_names_are_refused(name):
    with pytest.raises(UnknownHook):
        parse_hook(name)


def test_a_layer_outside_the_model_names_the_range(llama):
    with pytest.raises(UnknownHook, match="3 layers, 0 to 2") as error:
        check_hook(llama, "blocks.3.hook_resid_post")
    assert "blocks.2.hook_resid_post" in error.value.fix


def test_a_parallel_block_has_no_middle_and_says_why(make_tiny, tiny_configs):
    lm = make_tiny(*tiny_configs["gpt_neox"], name="pythia")
    with pytest.raises(UnknownHook, match="same residual stream"):
        check_hook(lm, "blocks.0.hook_resid_mid")


def test_a_wrong_width_names_both(llama):
    check_width(llama, "blocks.2.hook_resid_post", 32)
    with pytest.raises(WrongShape, match=r"reads 768 numbers and blocks\.2\.hook_resid_post of llama has 32"):
        check_width(llama, "blocks.2.hook_resid_post", 768)


def test_reading_no_hook_is_refused(llama, ids):
    with pytest.raises(BadInput):
        activations(llama, ids, [])


FULL = set(SITES)
RESIDUAL = {"hook_resid_pre", "hook_resid_post"}


@pytest.mark.parametrize(
    ("model_type", "config", "sites"),
    [
        ("smollm3", {}, FULL),
        ("qwen2_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, FULL),
        ("starcoder2", {}, FULL),
        ("stablelm", {}, FULL),
        ("olmo2", {}, RESIDUAL),
        ("granite", {"residual_multiplier": 0.3}, RESIDUAL),
    ],
)
def test_an_unknown_family_is_found_by_structure_with_the_sites_that_are_proved(
    make_tiny, tiny_configs, ids, model_type, config, sites
):
    lm = make_tiny(model_type, {**tiny_configs["llama"][1], **config}, name=model_type)
    assert lm.layout.proved
    assert set(lm.layout.taps) == sites
    hidden = hidden_states(lm, ids)
    post = activations(lm, ids, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    assert torch.equal(post, hidden[1])
    if sites == RESIDUAL:
        with pytest.raises(UnknownHook, match="nothing but the residual stream"):
            check_hook(lm, "blocks.0.hook_mlp_out")


def test_a_family_without_such_a_structure_is_refused_with_what_was_looked_for():
    config = AutoConfig.for_model(
        "xlnet", d_model=32, n_layer=2, n_head=2, d_inner=32, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    hf = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(Unsupported, match=r"'xlnet' is not known.*Looked for a list of as many blocks"):
        find_layout(hf)
