"""Metrics against their formulas written out by hand in float64, and an evaluation against one written with loops."""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_data import D_IN, HOOK, config, packed, sparse_activations

from mistudio_engine.api.errors import EmptyData, WrongShape
from mistudio_engine.api.records import Evaluation
from mistudio_engine.models.hooks import edit
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import load_tokens, pack
from mistudio_engine.saes import SAE, new_sae
from mistudio_engine.training import evaluate, metrics


def result(job: Generator[Any, None, Evaluation]) -> Evaluation:
    while True:
        try:
            next(job)
        except StopIteration as end:
            return end.value


def test_each_metric_is_its_formula() -> None:
    x, y = sparse_activations(50).double(), (sparse_activations(50) + torch.randn(50, 16) * 0.1).double()
    acts = (torch.randn(50, 7, dtype=torch.float64) - 0.5).relu()
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    sse = [sum((b - a) ** 2 for a, b in zip(p, q, strict=True)) for p, q in pairs]
    mean = [sum(column) / 50 for column in zip(*x.tolist(), strict=True)]
    spread = [sum((a - m) ** 2 for a, m in zip(p, mean, strict=True)) for p, _ in pairs]
    norm = [(math.hypot(*p), math.hypot(*q)) for p, q in pairs]
    dot = [sum(a * b for a, b in zip(p, q, strict=True)) for p, q in pairs]

    assert float(metrics.mse(x, y)) == pytest.approx(sum(sse) / 50)
    fvu = metrics.fvu(metrics.mse(x, y), x.pow(2).sum(-1).mean(), x.mean(0))
    assert float(fvu) == pytest.approx(sum(sse) / sum(spread))
    assert float(metrics.explained_variance(fvu)) == pytest.approx(1 - sum(sse) / sum(spread))
    legacy = sum(1 - e / s for e, s in zip(sse, spread, strict=True)) / 50
    assert float(metrics.explained_variance_legacy(x, y)) == pytest.approx(legacy)
    cosine = sum(d / (a * b) for d, (a, b) in zip(dot, norm, strict=True)) / 50
    assert float(metrics.cosine(x, y)) == pytest.approx(cosine)
    assert float(metrics.l2_ratio(x, y)) == pytest.approx(sum(b / a for a, b in norm) / 50)
    assert float(metrics.l0(acts)) == pytest.approx(sum(a > 0 for row in acts.tolist() for a in row) / 50)
    assert float(metrics.l1(acts)) == pytest.approx(sum(a for row in acts.tolist() for a in row) / 50)
    density = [sum(a > 0 for a in column) / 50 for column in zip(*acts.tolist(), strict=True)]
    assert metrics.density(acts).tolist() == pytest.approx(density)
    assert float(metrics.dead_fraction(torch.tensor([0.0, 0.5, 0.0, 1.0]))) == 0.5


def test_losses_of_logits_are_their_formulas() -> None:
    p, q = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    targets = torch.tensor([0, 3, 8, 2, 2])
    soft_p, soft_q = p.exp() / p.exp().sum(-1, keepdim=True), q.exp() / q.exp().sum(-1, keepdim=True)
    ce = [-math.log(float(soft_p[i, t])) for i, t in enumerate(targets)]
    assert metrics.cross_entropy(p, targets).tolist() == pytest.approx(ce, rel=1e-5)
    kl = [sum(float(a * (a / b).log()) for a, b in zip(soft_p[i], soft_q[i], strict=True)) for i in range(5)]
    assert metrics.kl_div(p, q).tolist() == pytest.approx(kl, rel=1e-4)
    assert metrics.ce_loss_score(1.0, 1.5, 3.0) == 0.75
    assert metrics.kl_div_score(0.5, 2.0) == 0.75


def test_nothing_divides_by_zero() -> None:
    x = torch.ones(3, 4)
    assert math.isfinite(float(metrics.fvu(metrics.mse(x, x), x.pow(2).sum(-1).mean(), x.mean(0))))
    assert float(metrics.explained_variance_legacy(x, x)) == 1
    assert math.isfinite(float(metrics.l2_ratio(torch.zeros(3, 4), x)))
    assert metrics.ce_loss_score(2.0, 2.0, 2.0) == 1.0
    assert metrics.kl_div_score(0.0, 0.0) == 1.0


def random_sae(seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    cfg = config("topk")
    return new_sae(cfg, {name: torch.randn(s, generator=generator) * 0.3 for name, s in cfg.tensor_shapes().items()})


@torch.no_grad()
def by_hand(lm: LanguageModel, sae: SAE, ids: Tensor, mask: Tensor) -> dict[str, float]:
    """The whole evaluation a context and a token at a time."""
    sums: dict[str, float] = dict.fromkeys(("n", "m", "l0", "ce_clean", "ce_sae", "ce_zero", "kl_sae", "kl_zero"), 0.0)
    inputs, outputs = [], []
    for context, real in zip(ids, mask, strict=True):
        kept: list[Tensor] = []

        def look(x: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x.clone())
            return x

        with edit(lm, HOOK, look):
            clean = lm.logits(context[None])[0].double().log_softmax(-1)
        x = kept[0][0]
        inputs.append(x[real])
        outputs.append(sae(x[real]))
        sums["l0"] += float((sae.encode(x[real]) > 0).sum())
        sums["n"] += int(real.sum())
        for name, new in (("sae", sae(x)), ("zero", torch.zeros_like(x))):
            with edit(lm, HOOK, lambda x, new=new, real=real: torch.where(real[:, None], new, x)):
                edited = lm.logits(context[None])[0].double().log_softmax(-1)
            for i in range(len(context) - 1):
                if real[i] and real[i + 1]:
                    sums[f"ce_{name}"] -= float(edited[i, context[i + 1]])
                    sums[f"kl_{name}"] += float((clean[i].exp() * (clean[i] - edited[i])).sum())
        for i in range(len(context) - 1):
            if real[i] and real[i + 1]:
                sums["ce_clean"] -= float(clean[i, context[i + 1]])
                sums["m"] += 1
    x, y = torch.cat(inputs).double(), torch.cat(outputs).double()
    means = {name: value / sums["m"] for name, value in sums.items() if name[:2] in ("ce", "kl")}
    means["l0"] = sums["l0"] / sums["n"]
    means["fvu"] = float((x - y).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    means["n"] = sums["n"]
    return means


def test_an_evaluation_equals_one_written_out_by_hand(lm: LanguageModel) -> None:
    tokens, sae = packed(n_contexts=13, n_last=3), random_sae()
    ours = result(evaluate(lm, sae, tokens, hook_name=HOOK, n_tokens=10_000, batch=4))
    theirs = by_hand(lm, sae, tokens.ids.long(), tokens.mask(slice(None), special=False))
    assert ours.n_tokens == theirs["n"]
    assert ours.l0 == pytest.approx(theirs["l0"])
    assert ours.fvu == pytest.approx(theirs["fvu"], rel=1e-5)
    assert ours.ce_loss_clean == pytest.approx(theirs["ce_clean"], rel=1e-5)
    assert ours.ce_loss_sae == pytest.approx(theirs["ce_sae"], rel=1e-5)
    assert ours.ce_loss_zero == pytest.approx(theirs["ce_zero"], rel=1e-5)
    score = (theirs["ce_zero"] - theirs["ce_sae"]) / (theirs["ce_zero"] - theirs["ce_clean"])
    assert ours.ce_loss_score == pytest.approx(score, rel=1e-3)
    assert ours.kl_div_score == pytest.approx(1 - theirs["kl_sae"] / theirs["kl_zero"], rel=1e-3)


def test_an_sae_that_gives_back_its_input_scores_one_and_one_that_gives_nothing_zero(lm: LanguageModel) -> None:
    cfg = config("skip_transcoder", d_out=D_IN)
    tensors = {name: torch.zeros(shape) for name, shape in cfg.tensor_shapes().items()}
    nothing = result(evaluate(lm, new_sae(cfg, tensors), packed(), hook_name=HOOK))
    assert nothing.ce_loss_score == pytest.approx(0, abs=1e-6)
    assert nothing.kl_div_score == pytest.approx(0, abs=1e-6)
    assert nothing.dead_fraction == 1
    perfect = result(evaluate(lm, new_sae(cfg, tensors | {"W_skip": torch.eye(D_IN)}), packed(), hook_name=HOOK))
    assert perfect.ce_loss_score == pytest.approx(1, abs=1e-5)
    assert perfect.kl_div_score == pytest.approx(1, abs=1e-5)
    assert perfect.fvu == pytest.approx(0, abs=1e-9)
    assert (perfect.cosine, perfect.l2_ratio) == (pytest.approx(1), pytest.approx(1))


def test_a_transcoder_is_measured_at_the_hook_that_it_predicts(lm: LanguageModel) -> None:
    hook_in, hook_out = "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"  # the same activations
    cfg = config("skip_transcoder", d_out=D_IN, hook_name=hook_in, hook_name_out=hook_out)
    tensors = {name: torch.zeros(shape) for name, shape in cfg.tensor_shapes().items()} | {"W_skip": torch.eye(D_IN)}
    assert result(evaluate(lm, new_sae(cfg, tensors), packed(), hook_name=hook_in)).ce_loss_score == pytest.approx(1)


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
