"""An evaluation against one written with loops, and what it says of SAEs whose quality is known."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from training_data import BOS, D_IN, D_SAE, EOS, HOOK, config, packed

from mistudio_engine.api.errors import BadInput, EmptyData, WrongShape
from mistudio_engine.api.records import Evaluation
from mistudio_engine.models.hooks import activations, edit
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens, load_tokens, pack
from mistudio_engine.saes import SAE, new_sae
from mistudio_engine.training.evaluation import evaluate, measure

R = TypeVar("R")

EARLY = "blocks.0.hook_resid_post"
"""Followed by attention: what happens to BOS here is felt by every token after it."""

ALL = 10_000


def result(job: Generator[Any, None, R]) -> R:
    while True:
        try:
            next(job)
        except StopIteration as end:
            return end.value


def random_sae(seed: int = 0, **more: Any) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    cfg = config("topk", **more)
    return new_sae(cfg, {name: torch.randn(s, generator=generator) * 0.3 for name, s in cfg.tensor_shapes().items()})


def zero_transcoder(**tensors: Tensor) -> SAE:
    """One that predicts nothing, but for the tensors given."""
    cfg = config("skip_transcoder", d_out=D_IN)
    return new_sae(cfg, {name: torch.zeros(shape) for name, shape in cfg.tensor_shapes().items()} | tensors)


def only_text(n_contexts: int = 12) -> PackedTokens:
    """Contexts without BOS, EOS and padding."""
    tokens = packed(n_contexts=n_contexts)
    tokens.ids[(tokens.ids == BOS) | (tokens.ids == EOS)] = 7
    return tokens


@torch.no_grad()
def by_hand(lm: LanguageModel, sae: SAE, tokens: PackedTokens, hook: str) -> dict[str, Any]:
    """The whole evaluation a context and a token at a time, in float64."""
    mask, real = tokens.mask(slice(None), special=False), tokens.mask(slice(None))
    ce: dict[str, list[float]] = {"clean": [], "sae": [], "zero": []}
    kl: dict[str, list[float]] = {"sae": [], "zero": []}
    inputs, outputs, acts = [], [], []
    for ids, text, there in zip(tokens.ids.long(), mask, real, strict=True):
        x = activations(lm, ids[None], [hook])[hook][0].clone()
        inputs.append(x[text])
        outputs.append(sae(x[text]))
        acts.append(sae.encode(x[text]))
        with edit(lm, hook, lambda x: x):
            logits = {"clean": lm.logits(ids[None])[0]}
        with edit(lm, hook, lambda x, text=text: torch.where(text[:, None], sae(x), x)):
            logits["sae"] = lm.logits(ids[None])[0]
        with edit(lm, hook, torch.zeros_like):
            logits["zero"] = lm.logits(ids[None])[0]
        log_p = {name: value.double().log_softmax(-1) for name, value in logits.items()}
        for i in range(len(ids)):
            if not text[i]:
                continue
            for name in kl:
                kl[name].append(float((log_p["clean"][i].exp() * (log_p["clean"][i] - log_p[name][i])).sum()))
            if i + 1 < len(ids) and there[i + 1]:
                for name in ce:
                    ce[name].append(-float(log_p[name][i, ids[i + 1]]))
    means = {f"ce_loss_{name}": sum(values) / len(values) for name, values in ce.items()}
    ce_zero, ce_sae, ce_clean = (means[f"ce_loss_{name}"] for name in ("zero", "sae", "clean"))
    kl_sae, kl_zero = (sum(kl[name]) / len(kl[name]) for name in ("sae", "zero"))
    x, y, f = torch.cat(inputs).double(), torch.cat(outputs).double(), torch.cat(acts)
    fired = f > 0
    n_fired = torch.stack([(each > 0).sum(0) for each in acts])
    fvu = float((x - y).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    return {
        **means,
        "n_tokens": len(x),
        "l0": float(fired.sum() / len(x)),
        "l1": float(f.sum() / len(x)),
        "mse": float((x - y).pow(2).sum() / len(x)),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "cosine": float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()),
        "l2_norm_in": float(x.norm(dim=-1).mean()),
        "l2_norm_out": float(y.norm(dim=-1).mean()),
        "l2_ratio": float((y.norm(dim=-1) / x.norm(dim=-1)).mean()),
        "relative_reconstruction_bias": float(y.pow(2).sum() / (x * y).sum()),
        "ce_loss_score": (ce_zero - ce_sae) / (ce_zero - ce_clean),
        "kl_div_with_sae": kl_sae,
        "kl_div_with_ablation": kl_zero,
        "kl_div_score": 1 - kl_sae / kl_zero,
        "n_dead": int((~fired.any(0)).sum()),
        "dead_fraction": float((~fired.any(0)).float().mean()),
        "dense_fraction": float((fired.double().mean(0) > 0.1).float().mean()),
        "density": fired.double().mean(0),
        "consistent_activation": n_fired.sum(0) / (n_fired > 0).sum(0).clamp_min(1),
    }


@pytest.mark.parametrize("hook", [EARLY, HOOK])
def test_an_evaluation_equals_one_written_out_by_hand(lm: LanguageModel, hook: str) -> None:
    tokens, sae = packed(n_contexts=13, n_last=3), random_sae()
    ours = result(measure(lm, sae, tokens, hook_name=hook, n_tokens=ALL, batch=4))
    theirs = by_hand(lm, sae, tokens, hook)
    for name in ("density", "consistent_activation"):
        torch.testing.assert_close(getattr(ours.features, name).double(), theirs.pop(name).double())
    found = {name: getattr(ours.evaluation, name) for name in theirs}
    assert found == pytest.approx(theirs, rel=2e-5)


def test_batches_change_nothing_but_the_legacy_explained_variance(lm: LanguageModel) -> None:
    tokens, sae = packed(n_contexts=13, n_last=3), random_sae()
    small, large = (result(evaluate(lm, sae, tokens, hook_name=HOOK, n_tokens=ALL, batch=n)) for n in (1, 13))
    assert small.density_histogram == large.density_histogram
    depends = {"explained_variance_legacy", "density_histogram", "tokens"}
    assert small.model_dump(exclude=depends) == pytest.approx(large.model_dump(exclude=depends), rel=1e-5)
    assert small.explained_variance_legacy != pytest.approx(large.explained_variance_legacy, rel=1e-2)


def test_held_out_contexts_can_be_evaluated_alone(lm: LanguageModel) -> None:
    tokens, sae = packed(n_contexts=13, n_last=3), random_sae()
    last = PackedTokens(tokens.ids[9:], tokens.n_real[9:], tokens.document_lengths[9:], tokens.info)
    found = result(evaluate(lm, sae, tokens, hook_name=HOOK, contexts=slice(-4, None)))
    assert found == result(evaluate(lm, sae, last, hook_name=HOOK))
    first = result(evaluate(lm, sae, tokens, hook_name=HOOK, contexts=slice(9, None), n_tokens=20))
    assert first.n_tokens == int(tokens.mask(slice(9, 11), special=False).sum())


def test_a_few_tokens_are_at_least_one_context(lm: LanguageModel) -> None:
    tokens = packed()
    found = result(evaluate(lm, random_sae(), tokens, hook_name=HOOK, n_tokens=3))
    assert found.n_tokens == int(tokens.mask(slice(0, 1), special=False).sum())


def test_an_sae_that_gives_back_its_input_scores_one(lm: LanguageModel) -> None:
    found = result(evaluate(lm, zero_transcoder(W_skip=torch.eye(D_IN)), packed(), hook_name=HOOK))
    assert found.ce_loss_score == pytest.approx(1, abs=1e-5)
    assert found.kl_div_score == pytest.approx(1, abs=1e-5)
    assert found.kl_div_with_sae == pytest.approx(0, abs=1e-6)
    assert found.fvu == pytest.approx(0, abs=1e-9)
    assert (found.cosine, found.l2_ratio, found.relative_reconstruction_bias) == pytest.approx((1, 1, 1))


def test_an_sae_that_gives_nothing_is_as_bad_as_zeroing_the_hook(lm: LanguageModel) -> None:
    found = result(evaluate(lm, zero_transcoder(), only_text(), hook_name=EARLY))
    assert found.ce_loss_score == pytest.approx(0, abs=1e-6)
    assert found.kl_div_score == pytest.approx(0, abs=1e-6)
    assert found.kl_div_with_sae == pytest.approx(found.kl_div_with_ablation)
    assert (found.dead_fraction, found.n_dead) == (1, D_SAE)
    assert sum(found.density_histogram or []) == 0
    assert found.relative_reconstruction_bias is None


def test_an_sae_is_spliced_in_at_text_only_and_zeros_everywhere(lm: LanguageModel) -> None:
    with_bos = result(evaluate(lm, zero_transcoder(), packed(), hook_name=EARLY))
    assert with_bos.ce_loss_sae != pytest.approx(with_bos.ce_loss_zero, rel=1e-4)


def test_a_transcoder_is_measured_at_the_hook_that_it_predicts(lm: LanguageModel) -> None:
    hook_in, hook_out = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"  # the same activations
    cfg = config("skip_transcoder", d_out=D_IN, hook_name=hook_in, hook_name_out=hook_out)
    tensors = {name: torch.zeros(shape) for name, shape in cfg.tensor_shapes().items()} | {"W_skip": torch.eye(D_IN)}
    assert result(evaluate(lm, new_sae(cfg, tensors), packed(), hook_name=hook_in)).ce_loss_score == pytest.approx(1)


def test_a_transcoders_features_and_its_skip_path_are_both_in_its_output(lm: LanguageModel) -> None:
    hook_in, hook_out = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    cfg = config("skip_transcoder", d_out=D_IN, hook_name=hook_in, hook_name_out=hook_out)
    generator = torch.Generator().manual_seed(0)
    sae = new_sae(cfg, {name: torch.randn(s, generator=generator) * 0.2 for name, s in cfg.tensor_shapes().items()})
    tokens = packed()
    found = result(evaluate(lm, sae, tokens, hook_name=hook_in, n_tokens=ALL))
    acts = activations(lm, tokens.ids.long(), [hook_in, hook_out])
    mask = tokens.mask(slice(None), special=False)
    x, y = acts[hook_in][mask], acts[hook_out][mask]
    assert found.mse == pytest.approx(float((sae(x) - y).double().pow(2).sum(-1).mean()), rel=1e-5)
    assert found.l2_norm_in == pytest.approx(float(y.norm(dim=-1).mean()), rel=1e-5)


def test_features_are_measured_by_weights_and_by_text(lm: LanguageModel) -> None:
    sae, tokens = random_sae(), packed()
    features = result(measure(lm, sae, tokens, hook_name=HOOK, n_tokens=ALL)).features
    assert all(each is not None and each.shape == (D_SAE,) for each in features)
    torch.testing.assert_close(features.encoder_norm, sae.W_enc.norm(dim=0))
    torch.testing.assert_close(features.decoder_norm, sae.W_dec.norm(dim=1))
    assert features.encoder_bias is not None and torch.equal(features.encoder_bias, sae.get_parameter("b_enc"))
    cosine = torch.stack([torch.cosine_similarity(sae.W_enc[:, i], sae.W_dec[i], dim=0) for i in range(D_SAE)])
    torch.testing.assert_close(features.encoder_decoder_cosine, cosine)


def test_an_architecture_without_a_bias_or_with_two_widths_has_no_such_measures(lm: LanguageModel) -> None:
    gated = new_sae(config("gated"))
    assert result(measure(lm, gated, packed(), hook_name=HOOK)).features.encoder_bias is None
    hook_out = "blocks.1.hook_mlp_out"
    wide = new_sae(config("transcoder", d_out=D_IN, hook_name_out=hook_out))
    assert result(measure(lm, wide, packed(), hook_name=HOOK)).evaluation.mean_encoder_decoder_cosine is not None


def test_the_record_stays_small_and_is_plain_json(lm: LanguageModel) -> None:
    found = result(evaluate(lm, random_sae(d_sae=2048), packed(), hook_name=HOOK))
    content = json.loads(found.model_dump_json())
    assert len(content["density_histogram"]) == 32
    assert sum(content["density_histogram"]) + content["n_dead"] == 2048
    assert all(not isinstance(value, list) or len(value) <= 40 for value in content.values())
    assert None not in content.values()


def test_an_evaluation_of_an_older_version_is_still_read() -> None:
    old = {"n_tokens": 9, "l0": 1, "fvu": 0, "explained_variance": 1, "mse": 0, "cosine": 1, "l2_ratio": 1}
    old |= {"ce_loss_clean": 1, "ce_loss_sae": 1, "ce_loss_zero": 2, "ce_loss_score": 1, "dead_fraction": 0}
    assert Evaluation.model_validate(old).kl_div_with_sae is None


def test_no_hook_is_installed_between_steps_nor_left_by_a_cancel(lm: LanguageModel) -> None:
    ids = packed().ids[:2].long()
    before = lm.logits(ids)
    job = evaluate(lm, random_sae(), packed(), hook_name=HOOK, batch=2)
    for _ in range(5):
        next(job)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.hf.modules())
        assert torch.is_grad_enabled()
    job.close()
    assert torch.equal(lm.logits(ids), before)


def test_what_cannot_be_evaluated_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(WrongShape, match=r"width 20 does not fit blocks\.1\.hook_resid_post"):
        next(evaluate(lm, new_sae(config("standard", d_in=20)), packed(), hook_name=HOOK))
    with pytest.raises(EmptyData, match="nothing to evaluate on"):
        result(evaluate(lm, random_sae(), packed(n_contexts=1, n_last=1), hook_name=HOOK))
    with pytest.raises(BadInput, match=r"no context in slice\(24, None, None\): there are 24"):
        next(evaluate(lm, random_sae(), packed(), hook_name=HOOK, contexts=slice(24, None)))


def test_the_clean_loss_of_a_real_model_is_the_one_transformers_reports(shared: Path, tmp_path: Path) -> None:
    model = LanguageModel.load(shared / "data/stories260K-hf")
    text = (shared / "data/text/tinystories_1000.jsonl").read_text(encoding="utf-8")[:20_000]
    list(pack([text], model.tokenizer, tmp_path / "tokens", context_size=64))
    tokens = load_tokens(tmp_path / "tokens")
    cfg = config("standard", d_in=model.d_model)
    job = evaluate(model, new_sae(cfg), tokens, hook_name="blocks.2.hook_resid_post", n_tokens=8 * 64)
    ids = tokens.ids[:8].long()
    labels = ids.masked_fill(~tokens.mask(slice(0, 8), special=False), -100)
    assert bool((labels[:, 1:] != -100).all())
    labels[:, 1] = -100  # predicted from BOS, which is left out
    expected = float(model.hf(input_ids=ids, labels=labels).loss)
    evaluation = result(job)
    assert evaluation.ce_loss_clean == pytest.approx(expected, rel=1e-5)
    assert evaluation.ce_loss_zero > evaluation.ce_loss_clean + 1
