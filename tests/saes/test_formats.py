"""SAELens's folders of every age and ours: what is written, what is read, and what is refused rather than guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_data import ALL, IN_SAELENS, TRANSCODERS, activations, random_sae
from safetensors import safe_open
from safetensors.torch import save_file

from mistudio_engine.api.errors import BadInput, CorruptFile, NotFound, Unsupported, WrongShape
from mistudio_engine.saes import FORMATS, SAE, detect_format, load_sae, read_sparsity, save_sae
from mistudio_engine.saes.saelens import is_in_saelens

COMMON_KEYS = {
    "architecture",
    "apply_b_dec_to_input",
    "d_in",
    "d_sae",
    "device",
    "dtype",
    "metadata",
    "normalize_activations",
    "reshape_activations",
}


def tensors_of(sae: SAE) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in sae.named_parameters()}


def folder_of(path: Path, cfg: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, path / "sae_weights.safetensors")
    return path


def v6(sae: SAE, **more: Any) -> dict[str, Any]:
    """The least that a version 6 cfg.json needs."""
    cfg = {"architecture": sae.cfg.architecture, "d_in": 12, "d_sae": 40, "dtype": "float32"}
    return cfg | {"metadata": {"sae_lens_version": "6.1.0"}} | more


@pytest.mark.parametrize("architecture", IN_SAELENS)
def test_a_saelens_folder_has_all_common_keys_and_exactly_its_tensors(tmp_path: Path, architecture: str) -> None:
    sae = random_sae(architecture, model_name="gpt2-small", hook_name="blocks.6.hook_resid_pre", prepend_bos=True)
    folder = save_sae(sae, tmp_path / "sae", provenance={"training": {"seed": 3}})
    cfg = json.loads((folder / "cfg.json").read_text())
    own = {"topk": {"k", "rescale_acts_by_decoder_norm"}}.get(architecture, set())
    assert set(cfg) == COMMON_KEYS | own | ({"d_out"} if architecture in TRANSCODERS else set())
    assert cfg["device"] == "cpu"
    assert cfg["dtype"] == "float32"
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert cfg["metadata"]["mistudio"] == {"training": {"seed": 3}}
    wanted = ("model_name", "hook_name", "prepend_bos", "context_size", "dataset_path", "hook_head_index")
    assert set(wanted) <= set(cfg["metadata"])
    with safe_open(folder / "sae_weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(sae.cfg.tensor_shapes())
    assert load_sae(folder).cfg.metadata == {"mistudio": {"training": {"seed": 3}}}


@pytest.mark.parametrize("architecture", [name for name in ALL if name not in IN_SAELENS])
def test_what_saelens_has_no_architecture_for_is_refused_in_its_format_and_leaves_nothing(
    tmp_path: Path, architecture: str
) -> None:
    with pytest.raises(Unsupported, match=f"no architecture '{architecture}'.*native"):
        save_sae(random_sae(architecture), tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architecture", ALL)
def test_whatever_can_be_run_survives_in_our_own_format(tmp_path: Path, architecture: str) -> None:
    sae = random_sae(architecture, model_name="m", metadata={"mistudio": {"training": {"seed": 1}}})
    folder = save_sae(sae, tmp_path / "sae", format="native", sparsity=torch.linspace(0, 1, 40))
    again = load_sae(folder)
    assert detect_format(folder) == "native"
    assert again.cfg == sae.cfg
    assert type(again) is type(sae)
    assert tensors_of(again).keys() == tensors_of(sae).keys()
    assert all(torch.equal(tensors_of(sae)[name], tensor) for name, tensor in again.named_parameters())
    assert torch.equal(again(activations(sae)), sae(activations(sae)))


def test_every_architecture_that_saelens_has_is_written_for_it() -> None:
    assert [name for name in ALL if is_in_saelens(name)] == IN_SAELENS


@pytest.mark.parametrize("format", FORMATS)
def test_everything_in_a_config_survives(tmp_path: Path, format: str) -> None:
    sae = random_sae(
        "topk",
        dtype="bfloat16",
        apply_b_dec_to_input=False,
        normalize_activations="layer_norm",
        reshape_activations="hook_z",
        model_name="gemma-2-2b",
        hook_name="blocks.6.attn.hook_z",
        hook_head_index=2,
        prepend_bos=False,
        context_size=256,
        dataset_path="a/b",
        neuronpedia_id="gemma-2-2b/6-res",
        rescale_acts_by_decoder_norm=True,
        metadata={"free": ["form", 1, None], "mistudio": {"a": 1}},
    )
    folder = save_sae(sae, tmp_path / "sae", format=format, sparsity=torch.linspace(0, 1, 40))
    again = load_sae(folder)
    assert detect_format(folder) == format
    assert again.cfg == sae.cfg
    assert all(torch.equal(tensors_of(sae)[name], tensor) for name, tensor in again.named_parameters())
    sparsity = read_sparsity(folder)
    assert sparsity is not None
    torch.testing.assert_close(sparsity, torch.linspace(0, 1, 40))


def test_formats_convert_both_ways_without_loss(tmp_path: Path) -> None:
    sae = random_sae("gated", model_name="m", metadata={"mistudio": {"training": {"lr": 1e-3}}})
    native = load_sae(save_sae(sae, tmp_path / "a", format="native"))
    back = load_sae(save_sae(native, tmp_path / "b", format="saelens"))
    assert back.cfg == sae.cfg
    assert json.loads((tmp_path / "a/training_metadata.json").read_text()) == {"training": {"lr": 1e-3}}


def test_an_encoder_that_lies_transposed_in_memory_is_written_contiguously(tmp_path: Path) -> None:
    sae = random_sae("standard")
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T
    assert not sae.W_enc.is_contiguous()
    assert torch.equal(load_sae(save_sae(sae, tmp_path / "sae")).W_enc, sae.W_enc)


def test_version_3_is_read(tmp_path: Path) -> None:
    sae = random_sae("standard")
    cfg = {
        "hook_point": "blocks.2.attn.hook_z",
        "hook_point_layer": 2,
        "hook_point_head_index": None,
        "d_in": 12,
        "d_sae": 40,
        "dtype": "torch.float32",
        "normalize_activations": False,
        "activation_fn_str": "relu",
        "model_name": "gpt2-small",
    }
    folder = folder_of(tmp_path / "v3", cfg, tensors_of(sae) | {"scaling_factor": torch.ones(40)})
    read = load_sae(folder)
    assert read.cfg.hook_name == "blocks.2.attn.hook_z"
    assert read.cfg.reshape_activations == "hook_z"
    assert read.cfg.prepend_bos is True
    assert read.notes == ()
    x = activations(sae)
    assert torch.equal(read(x), sae(x))


def test_an_unfolded_scale_is_noted(tmp_path: Path) -> None:
    sae = random_sae("standard")
    cfg = {"d_in": 12, "d_sae": 40, "dtype": "float32", "normalize_activations": True}
    read = load_sae(folder_of(tmp_path / "v3", cfg, tensors_of(sae)))
    assert read.cfg.normalize_activations == "expected_average_only_in"
    assert "has to be in the weights already" in " ".join(read.notes)


def test_a_finetuned_scaling_factor_is_folded_into_the_decoder(tmp_path: Path) -> None:
    sae, scale = random_sae("standard"), torch.linspace(0.5, 2, 40)
    cfg = {"d_in": 12, "d_sae": 40, "dtype": "float32", "finetuning_scaling_factor": True}
    read = load_sae(folder_of(tmp_path / "v4", cfg, tensors_of(sae) | {"scaling_factor": scale}))
    x = activations(sae)
    torch.testing.assert_close(read(x), sae.decode(sae.encode(x) * scale))
    cfg["finetuning_scaling_factor"] = False
    with pytest.raises(CorruptFile, match="says that none was used"):
        load_sae(folder_of(tmp_path / "v4b", cfg, tensors_of(sae) | {"scaling_factor": scale}))


def test_log_thresholds_become_thresholds(tmp_path: Path) -> None:
    sae = random_sae("jumprelu")
    tensors = tensors_of(sae)
    tensors["log_threshold"] = tensors.pop("threshold").log()
    read = load_sae(folder_of(tmp_path / "log", v6(sae, apply_b_dec_to_input=True), tensors))
    torch.testing.assert_close(read.get_parameter("threshold"), sae.get_parameter("threshold"))


@pytest.mark.parametrize("architecture", ["jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_a_jumprelu_transcoders_log_thresholds_become_thresholds_too(tmp_path: Path, architecture: str) -> None:
    sae = random_sae(architecture)
    tensors = tensors_of(sae)
    tensors["log_threshold"] = tensors.pop("threshold").log()
    cfg = v6(sae, d_out=15, apply_b_dec_to_input=False)
    read = load_sae(folder_of(tmp_path / "log", cfg, tensors))
    torch.testing.assert_close(read.get_parameter("threshold"), sae.get_parameter("threshold"))


def test_a_jumprelu_that_does_not_say_whether_b_dec_is_subtracted_is_noted(tmp_path: Path) -> None:
    sae = random_sae("jumprelu")
    cfg = {"architecture": "jumprelu", "d_in": 12, "d_sae": 40, "dtype": "float32"}
    read = load_sae(folder_of(tmp_path / "min", cfg, tensors_of(sae)))
    assert read.cfg.apply_b_dec_to_input is True
    assert "Gemma Scope" in read.notes[0]


def test_metadata_without_a_version_is_kept_and_noted(tmp_path: Path) -> None:
    sae = random_sae("standard")
    cfg = v6(sae) | {"metadata": {"hook_name": "blocks.0.hook_resid_post", "note": "x"}}
    read = load_sae(folder_of(tmp_path / "old", cfg, tensors_of(sae)))
    assert read.cfg.hook_name == "blocks.0.hook_resid_post"
    assert read.cfg.metadata["note"] == "x"
    assert "metadata was kept" in read.notes[0]


def test_a_topk_without_k_is_refused_where_saelens_would_take_100(tmp_path: Path) -> None:
    sae = random_sae("topk")
    with pytest.raises(CorruptFile, match="does not say k"):
        load_sae(folder_of(tmp_path / "a", v6(sae), tensors_of(sae)))
    legacy = {"d_in": 12, "d_sae": 40, "dtype": "float32", "activation_fn_str": "topk"}
    with pytest.raises(CorruptFile, match="does not say k"):
        load_sae(folder_of(tmp_path / "b", legacy, tensors_of(sae)))


def test_a_missing_dtype_is_that_of_the_tensors_and_noted(tmp_path: Path) -> None:
    sae = random_sae("standard", dtype="bfloat16")
    cfg = v6(sae)
    del cfg["dtype"]
    read = load_sae(folder_of(tmp_path / "a", cfg, tensors_of(sae)))
    assert read.dtype == torch.bfloat16
    assert read.notes == ("The config has no dtype; the tensors are bfloat16.",)


def test_tensors_are_converted_to_the_type_of_the_config(tmp_path: Path) -> None:
    sae = random_sae("standard")
    folder = folder_of(tmp_path / "a", v6(sae, dtype="float16"), tensors_of(sae))
    assert load_sae(folder).dtype == torch.float16
    big = tensors_of(sae) | {"b_dec": torch.full((12,), 1e30)}
    with pytest.raises(CorruptFile, match="b_dec overflows as float16"):
        load_sae(folder_of(tmp_path / "b", v6(sae, dtype="float16"), big))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"architecture": "temporal"}, Unsupported, "'temporal'"),
        ({"architecture": "batchtopk"}, Unsupported, "'batchtopk'"),
        ({"architecture": ["standard"]}, Unsupported, "standard"),
        ({"d_in": 13}, WrongShape, r"W_enc has the shape \(12, 40\), expected \(13, 40\)"),
        ({"d_in": "many"}, CorruptFile, "d_in"),
        ({"d_sae": 10**30}, WrongShape, "W_enc"),
        ({"dtype": "int4"}, CorruptFile, "dtype"),
        ({"normalize_activations": "whatever"}, CorruptFile, "normalize_activations"),
        ({"sae_lens_version": "6.0.0", "metadata": "none"}, CorruptFile, "no JSON object"),
        ({"metadata": {"sae_lens_version": "six"}}, CorruptFile, "'six'"),
        ({"metadata": {"sae_lens_version": "6.0.0", "context_size": "long"}}, CorruptFile, "context_size"),
    ],
)
def test_a_cfg_that_cannot_be_right_is_refused(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    sae = random_sae("standard")
    with pytest.raises(error, match=said):
        load_sae(folder_of(tmp_path / "sae", v6(sae) | change, tensors_of(sae)))


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\x00", '{"d_in": ' + "[" * 20_000])
def test_a_cfg_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    folder = folder_of(tmp_path / "sae", {}, tensors_of(random_sae("standard")))
    (folder / "cfg.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"cfg\.json"):
        load_sae(folder)


def test_an_activation_that_saelens_would_replace_by_a_relu_is_refused(tmp_path: Path) -> None:
    cfg = {"d_in": 12, "d_sae": 40, "dtype": "float32", "activation_fn_str": "tanh-relu"}
    with pytest.raises(Unsupported, match="tanh-relu"):
        load_sae(folder_of(tmp_path / "sae", cfg, tensors_of(random_sae("standard"))))


def test_extra_and_missing_tensors_are_named(tmp_path: Path) -> None:
    sae = random_sae("standard")
    with pytest.raises(WrongShape, match="also has extra"):
        load_sae(folder_of(tmp_path / "a", v6(sae), tensors_of(sae) | {"extra": torch.ones(2)}))
    tensors = tensors_of(sae)
    del tensors["b_enc"]
    with pytest.raises(WrongShape, match="lacks b_enc"):
        load_sae(folder_of(tmp_path / "b", v6(sae), tensors))


def test_a_language_models_folder_is_no_sae(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(Unsupported, match=r"It has config\.json, model\.safetensors"):
        load_sae(tmp_path)


def test_a_native_folder_of_a_newer_version_is_refused_clearly(tmp_path: Path) -> None:
    folder = save_sae(random_sae("standard"), tmp_path / "sae", format="native")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 2}))
    with pytest.raises(Unsupported, match=r"version 2.*Update miStudio"):
        load_sae(folder)


def test_sparsity_is_checked_on_the_way_out_and_optional_on_the_way_in(tmp_path: Path) -> None:
    sae = random_sae("standard")
    with pytest.raises(WrongShape, match=r"\(41,\), expected \(40,\)"):
        save_sae(sae, tmp_path / "a", sparsity=torch.zeros(41))
    with pytest.raises(BadInput, match="between 0 and 1"):
        save_sae(sae, tmp_path / "a", sparsity=torch.full((40,), -3.0))
    assert not (tmp_path / "a").exists()
    assert read_sparsity(save_sae(sae, tmp_path / "a")) is None


def test_what_is_no_json_is_refused_before_anything_appears(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be written as JSON"):
        save_sae(random_sae("standard"), tmp_path / "a", provenance={"loss": float("nan")})
    with pytest.raises(BadInput, match="no SAE format 'zip'"):
        save_sae(random_sae("standard"), tmp_path / "a", format="zip")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_folder_is_not_found_as_an_sae(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no folder sae"):
        load_sae(str(tmp_path / "sae"))
