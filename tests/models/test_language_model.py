"""A model folder loads whole or is refused with its fault named; tokens, sizes and unembedding are what they claim."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistudio_engine.api.errors import (
    BadInput,
    CorruptFile,
    EmptyData,
    MistudioError,
    NotFound,
    Unsupported,
    WrongShape,
)
from mistudio_engine.models.checkpoint import load_tokenizer
from mistudio_engine.models.hooks import activations, hook_names
from mistudio_engine.models.language_model import (
    LanguageModel,
    architecture,
    n_params,
    supported_precisions,
    unembedding,
    weight_bytes,
)


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A whole model folder, to be spoilt."""
    path = tmp_path / "tiny-llama"
    llama.hf.save_pretrained(path)
    llama.tokenizer.save_pretrained(path)
    return path


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_folder_loads_with_the_weights_that_were_saved(llama, folder, ids):
    lm = LanguageModel.load(folder)
    assert torch.equal(lm.logits(ids), llama.logits(ids))
    assert (lm.name, lm.n_layers, lm.d_model, lm.d_vocab, lm.n_ctx) == ("tiny-llama", 3, 32, 260, 64)
    assert (lm.bos_token_id, lm.special_ids) == (256, frozenset({256, 257, 258, 259}))
    assert not lm.hf.training
    assert not any(p.requires_grad for p in lm.hf.parameters())


def test_loading_leaves_no_message_behind(folder, capfd):
    LanguageModel.load(folder)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precisions_are_held_and_run_as_asked(llama, folder, ids, precision, dtype):
    lm = LanguageModel.load(folder, precision=precision)
    assert {p.dtype for p in lm.hf.parameters()} == {dtype}
    assert lm.logits(ids).dtype == dtype
    torch.testing.assert_close(lm.logits(ids).float(), llama.logits(ids), atol=0.1, rtol=0.1)
    assert all(x.dtype == dtype for x in activations(lm, ids, hook_names(lm)).values())


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp8"])
def test_a_precision_that_this_device_lacks_is_refused_with_those_it_has(folder, precision):
    with pytest.raises(Unsupported, match=precision) as error:
        LanguageModel.load(folder, precision=precision, device="cpu")
    assert "fp32, bf16, fp16" in error.value.fix
    assert supported_precisions("cpu") == ("fp32", "bf16", "fp16")


@pytest.mark.parametrize("device", ["cuda:99", "cuda:x", "tpu", ""])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(folder, device):
    with pytest.raises(Unsupported, match=f"no device {device!r}.*cpu"):
        LanguageModel.load(folder, device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_models_run_on_the_gpu_and_take_the_bytes_foretold(shared, precision):
    folder = shared / "data" / "bitllama-3M-hf"
    lm = LanguageModel.load(folder, precision=precision, device="cuda")
    ids = torch.tensor([lm.encode("Once upon a time", bos=True)])
    assert torch.isfinite(lm.logits(ids)).all()
    foretold = weight_bytes(json.loads((folder / "config.json").read_text()), precision)
    assert sum(p.numel() * p.element_size() for p in lm.hf.parameters()) == pytest.approx(foretold, rel=0.1)


def test_a_folder_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(NotFound, match="nowhere"):
        LanguageModel.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    if name == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CorruptFile, match=name):
        LanguageModel.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"hidden_size": 32}', b"[" * 100_000])
def test_a_broken_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"config\.json"):
        LanguageModel.load(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b'{"model": 1}', b'{"version": "1.0", "model": {"type": "BPE"}}']
)
def test_a_broken_tokenizer_is_named(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CorruptFile, match="tokenizer"):
        LanguageModel.load(folder)


def test_torn_weights_are_refused_wherever_they_are_torn(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for n_bytes in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(CorruptFile, match=r"model\.safetensors.*torn"):
            LanguageModel.load(folder)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 8) + b"\xff" * 8,
        b"PK\x03\x04" + b"\0" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_what_is_no_safetensors_is_refused_fast(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        LanguageModel.load(folder)


def test_weights_that_are_missing_are_named_and_not_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        LanguageModel.load(folder)


def test_a_config_with_more_or_fewer_layers_than_the_weights_is_refused(folder):
    change_config(folder, num_hidden_layers=4)
    with pytest.raises(CorruptFile, match=r"lack model\.layers\.3.* and 4 more"):
        LanguageModel.load(folder)
    change_config(folder, num_hidden_layers=2)
    with pytest.raises(CorruptFile, match=r"at least 3 layers, and config\.json says 2"):
        LanguageModel.load(folder)


def test_a_config_of_another_width_is_refused(folder):
    change_config(folder, intermediate_size=64)
    with pytest.raises(CorruptFile):
        LanguageModel.load(folder)


def test_pickled_weights_are_refused_with_a_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Unsupported, match="run code") as error:
        LanguageModel.load(folder)
    assert "save_pretrained" in error.value.fix


def test_sharded_weights_load_and_a_missing_shard_is_named(llama, tmp_path, ids):
    folder = tmp_path / "sharded"
    llama.hf.save_pretrained(folder, max_shard_size="40KB")
    llama.tokenizer.save_pretrained(folder)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(LanguageModel.load(folder).logits(ids), llama.logits(ids))
    shards[1].unlink()
    with pytest.raises(CorruptFile, match=shards[1].name):
        LanguageModel.load(folder)


def test_an_index_cannot_lead_out_of_the_folder(folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFile, match="no file of this folder"):
        LanguageModel.load(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "unheard-of", "architectures": ["UnheardOfForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
    ],
)
def test_what_is_no_causal_language_model_is_refused(folder, fields):
    change_config(folder, **fields)
    with pytest.raises(Unsupported, match="not a causal language model"):
        LanguageModel.load(folder)


def test_code_that_comes_with_a_model_is_never_run(folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w').close()")
    change_config(folder, model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    with pytest.raises(Unsupported, match="never run"):
        LanguageModel.load(folder)
    change_config(folder, model_type="llama")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["modeling_evil.Evil", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    LanguageModel.load(folder)
    assert not ran.exists()


def test_weights_saved_quantised_are_refused(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(Unsupported, match="saved quantised"):
        LanguageModel.load(folder)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.tensor([[260]]), BadInput),
        (torch.tensor([[-1]]), BadInput),
        (torch.zeros(1, 65, dtype=torch.int64), BadInput),
        (torch.zeros(1, 0, dtype=torch.int64), EmptyData),
        (torch.zeros(3, dtype=torch.int64), WrongShape),
    ],
)
def test_ids_that_the_model_cannot_take_are_refused(llama, ids, error):
    with pytest.raises(error):
        llama.logits(ids)
    with pytest.raises(error):
        activations(llama, ids, ["blocks.0.hook_resid_post"])


def test_a_mask_of_another_shape_is_refused(llama, ids):
    with pytest.raises(WrongShape):
        llama.logits(ids, torch.ones(2, 3))


def test_packed_int32_ids_give_the_same_logits(llama, ids):
    assert torch.equal(llama.logits(ids.int()), llama.logits(ids))


def test_bos_is_added_when_asked_whatever_the_tokenizer_does_by_itself(llama, shared):
    stories = LanguageModel.load(shared / "data" / "stories260K-hf")
    assert stories.tokenizer.encode("Hi")[0] == stories.bos_token_id  # its own habit
    assert llama.tokenizer.encode("Hi")[0] != llama.bos_token_id
    for lm in (stories, llama):
        plain, with_bos = lm.encode("Hi", bos=False), lm.encode("Hi", bos=True)
        assert with_bos == [lm.bos_token_id, *plain]
        assert lm.bos_token_id not in plain


def test_bos_is_not_made_up_for_a_model_that_has_none(llama, make_tokenizer):
    lm = LanguageModel(llama.hf, make_tokenizer(eos_token="</s>"), name="no-bos", folder=Path("no-bos"))
    assert lm.bos_token_id is None
    assert lm.encode("Hi", bos=True) == lm.encode("Hi", bos=False)


def test_tokens_read_as_text_with_their_spaces_and_the_bytes_of_split_characters(llama):
    assert llama.token_strings(llama.encode("a b\n", bos=True)) == ["<s>", "a", " ", "b", "\n"]
    assert llama.token_strings(llama.encode("é€", bos=False)) == ["<0xC3>", "<0xA9>", "<0xE2>", "<0x82>", "<0xAC>"]
    assert llama.token_strings([0, 27, 127, 259]) == ["<0x00>", "<0x1B>", "<0x7F>", "<mark>"]


def test_sentencepiece_tokens_read_as_text_too(shared):
    lm = LanguageModel.load(shared / "data" / "stories260K-hf")
    assert lm.token_strings(lm.encode("Once upon a time", bos=True)) == ["<s>", " Once", " upon", " a", " time"]
    assert lm.token_strings(lm.tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xE2>", "<0x00>"])) == [
        "\n",
        "<0xE2>",
        "<0x00>",
    ]
    assert lm.decode(lm.encode("héllo 世界\n", bos=False)) == "héllo 世界\n"


def test_no_token_reads_as_nothing_and_ids_beyond_the_tokenizer_have_a_name(real_lm, llama):
    for lm in (real_lm, llama):
        strings = lm.token_strings(range(lm.d_vocab + 2))
        assert all(strings)
        assert strings[-1] == f"<id {lm.d_vocab + 1}>"


def test_weight_bytes_from_the_config_alone_are_those_of_the_model(lm):
    config = lm.hf.config.to_dict()
    assert n_params(config) == sum(p.numel() for p in lm.hf.parameters())
    assert weight_bytes(config, "fp32") == sum(p.numel() * p.element_size() for p in lm.hf.parameters())
    assert weight_bytes(config, "bf16") * 2 == weight_bytes(config, "fp32")
    assert weight_bytes(config, "nf4") < weight_bytes(config, "int8") < weight_bytes(config, "bf16")


def test_a_large_model_is_estimated_without_its_memory():
    config = {  # Llama 3.1 8B
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    assert n_params(config) == 8_030_261_248
    assert weight_bytes(config, "bf16") == 16_060_522_496
    assert 5.5e9 < weight_bytes(config, "nf4") < 5.9e9


@pytest.mark.parametrize("fields", [{"hidden_size": -1}, {"hidden_size": "wide"}, {"num_attention_heads": 0}])
def test_a_config_that_makes_no_model_is_a_typed_error(tiny_configs, fields):
    with pytest.raises(MistudioError):
        weight_bytes({"model_type": "llama", **tiny_configs["llama"][1], **fields}, "fp32")


def test_the_architecture_accounts_for_every_parameter_and_hook(lm):
    shown = architecture(lm)
    assert sum(row["n_params"] for row in shown["modules"]) == shown["n_params"]
    assert sorted(point["name"] for point in shown["hook_points"]) == sorted(hook_names(lm))
    assert shown["d_vocab"] == 260
    assert json.loads(json.dumps(shown)) == shown


def test_unembedding_and_gain_turn_the_normalised_residual_into_logits(lm, ids):
    W_U, gain = unembedding(lm)
    assert W_U.shape == (lm.d_vocab, lm.d_model)
    last = activations(lm, ids, [f"blocks.{lm.n_layers - 1}.hook_resid_post"]).popitem()[1]
    if gain is not None:
        assert gain.shape == (lm.d_model,)
        if isinstance(lm.layout.final_norm, torch.nn.LayerNorm):
            last = last - last.mean(-1, keepdim=True)
        last = last / (last.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain
        bias = getattr(lm.layout.final_norm, "bias", None)
        last = last if bias is None else last + bias
    logits = last @ W_U.T
    head_bias = getattr(lm.hf.get_output_embeddings(), "bias", None)
    logits = logits if head_bias is None else logits + head_bias
    cap = getattr(lm.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(logits, lm.logits(ids), rtol=1e-3, atol=1e-3)


def test_a_tokenizer_has_nothing_that_the_first_call_changes(folder):
    """All share it, and a change at the side of another thread's call is an error there ("Already borrowed")."""
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    rules["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    path.write_text(json.dumps(rules))
    backend = load_tokenizer(folder).backend_tokenizer
    assert backend.truncation is None and backend.padding is None


def test_a_tokenizer_is_read_once_until_its_files_change(folder):
    first = load_tokenizer(folder)
    assert load_tokenizer(folder) is first
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text())
    path.write_text(json.dumps({**named, "eos_token": "<another>"}))
    assert load_tokenizer(folder).eos_token == "<another>" != first.eos_token
    path.unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptFile):
        load_tokenizer(folder)
