"""What a feature does to predictions equals a float64 computation by hand, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from discovery_data import drain
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound
from mistudio_engine.discovery import ablation as module
from mistudio_engine.discovery.ablation import (
    Passage,
    ablate,
    bootstrap,
    contribution,
    matched_controls,
    written_rows,
)
from mistudio_engine.models.hooks import activations
from mistudio_engine.models.language_model import LanguageModel
from tests.saes.sae_data import activations as random_activations
from tests.saes.sae_data import random_sae

D_MODEL, D_SAE, D_VOCAB = 16, 24, 90
IN, OUT = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def hf() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def lm(hf, tokenizer) -> LanguageModel:
    return LanguageModel(hf, tokenizer, name="small", folder=Path("small"))


@pytest.fixture
def passages() -> list[Passage]:
    generator = np.random.default_rng(3)
    made = []
    for length in (12, 20, 7, 20, 15):
        ids = generator.integers(2, D_VOCAB, length)
        ids[0] = 0
        made.append(Passage(ids, ids != 0))
    return made


def sae_at(architecture: str, hook: str = IN, **more):
    return random_sae(architecture, seed=2, d_in=D_MODEL, d_sae=D_SAE, hook_name=hook, **more)


def by_hand(hf, sae, passage: Passage, feature: int, layer: int = 0, direction: Tensor | None = None):
    """Activations, change of loss and KL at every position in float64, with hooks of the test's own.

    With a direction a push of the contribution's length along that is taken away instead.
    """
    double = LlamaForCausalLM(hf.config).double()
    double.load_state_dict({name: value.double() for name, value in hf.state_dict().items()})
    tensors = {name: tensor.double() for name, tensor in sae.state_dict().items()}
    sae = type(sae)(sae.cfg.model_copy(update={"dtype": "float64"}), tensors)
    ids = torch.from_numpy(passage.token_ids)[None]
    seen: list[Tensor] = []

    def take(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        acts = sae.encode(x)
        acts[:, ~torch.from_numpy(passage.counts)] = 0
        without = acts.clone()
        without[..., feature] = 0
        change = sae.decode(acts, like=x) - sae.decode(without, like=x)
        if direction is not None:
            change = change.norm(dim=-1, keepdim=True) * (direction / direction.norm()).double()
        seen.append(acts[0, :, feature])
        return (x - change, *output[1:]) if isinstance(output, tuple) else x - change

    with torch.no_grad():
        clean = double(ids).logits[0].log_softmax(-1)
        handle = double.model.layers[layer].register_forward_hook(take)
        ablated = double(ids).logits[0].log_softmax(-1)
        handle.remove()
    loss = (clean - ablated)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return seen[0].numpy(), loss.numpy(), (clean.exp() * (clean - ablated)).sum(-1).numpy()


def firing_feature(lm, sae, passages, hook: str = IN) -> int:
    """A feature that fires on some tokens of each text."""
    acts = [sae.encode(activations(lm, torch.from_numpy(p.token_ids)[None], [hook])[hook][0, 1:]) for p in passages]
    n_active = torch.stack([(each > 0).sum(0) for each in acts])  # (n, d_sae)
    good = ((n_active > 0).sum(0) >= 4) & (n_active.sum(0) < 60)
    return int(torch.nonzero(good)[0])


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("standard", {}),
        ("topk", {"k": 5}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("gated", {}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("standard", {"normalize_activations": "constant_norm_rescale"}),
    ],
)
def test_changes_of_loss_and_kl_are_those_of_a_float64_computation(hf, lm, passages, architecture, more):
    sae = sae_at(architecture, **more)
    feature = firing_feature(lm, sae, passages)
    found, steps = drain(ablate(lm, sae, IN, feature, passages))
    assert steps[-1].fraction == 1
    assert found.n_passages == 5 and len(found.passages) == 5 - found.n_silent >= 4
    losses, kls = [], []
    for effect in found.passages:
        passage = passages[effect.passage]
        acts, loss, kl = by_hand(hf, sae, passage, feature)
        np.testing.assert_allclose(effect.feature_acts, acts, atol=1e-4)
        first = int(np.argmax(acts > 0))
        assert not effect.kl[:first].any() and not effect.loss[:first].any()
        np.testing.assert_allclose(effect.loss[first:-1], loss[first:], atol=2e-4)
        np.testing.assert_allclose(effect.kl[first:], kl[first:], atol=2e-4)
        assert np.abs(kl[first:]).max() > 1e-3, "the feature does something here, or the test shows nothing"
        losses.append(loss[first:].mean())
        kls.append(kl[first:].mean())
    assert found.loss_after.mean == pytest.approx(np.mean(losses), abs=2e-4)
    assert found.kl_after.mean == pytest.approx(np.mean(kls), abs=2e-4)
    assert found.kl_after.low <= found.kl_after.mean <= found.kl_after.high
    assert found.n_firing == sum(int((effect.feature_acts > 0).sum()) for effect in found.passages)


def test_controls_take_a_vector_of_the_same_length_away_at_the_same_places(hf, lm, passages):
    sae = sae_at("standard")
    feature = firing_feature(lm, sae, passages)
    controls = [each for each in (1, 4, 9) if each != feature]
    found, _ = drain(ablate(lm, sae, IN, feature, passages, controls=controls))
    kl = []
    for effect in found.passages:
        first = int(np.argmax(effect.feature_acts > 0))
        pushes = [
            by_hand(hf, sae, passages[effect.passage], feature, direction=sae.W_dec[each])[2] for each in controls
        ]
        kl.append([each[first:].mean() for each in pushes])
    own = [float(effect.kl[int(np.argmax(effect.feature_acts > 0)) :].mean()) for effect in found.passages]
    assert found.control_kl_after.mean == pytest.approx(np.mean(kl), abs=2e-4)
    assert found.excess_kl.mean == pytest.approx(np.mean(own) - np.mean(kl), abs=2e-4)
    assert found.controls_below == pytest.approx(np.mean(np.mean(kl, axis=0) < np.mean(own)))


def test_the_change_of_logits_is_measured_where_the_feature_fires(hf, lm, passages):
    """On the last residual stream only a norm stands between the feature and the logits: the lens foretells it."""
    last = "blocks.2.hook_resid_post"
    sae = sae_at("standard", hook=last)
    feature = firing_feature(lm, sae, passages, hook=last)
    found, _ = drain(ablate(lm, sae, last, feature, passages, k=10))
    assert found.lens.correlation > 0.8
    assert found.lens.promoted_overlap >= 0.5
    values = [value for _, value in found.promoted]
    assert values == sorted(values, reverse=True) and values[0] > 0 > found.suppressed[0][1]


def test_a_feature_that_never_fires_changes_nothing_at_all(lm, passages):
    sae = sae_at("standard")
    sae.b_enc[5] = -1e6
    found, _ = drain(ablate(lm, sae, IN, 5, passages, controls=[1]))
    assert found.n_silent == found.n_passages == 5
    assert found.n_firing == 0 and found.kl_after is None and not found.promoted


def test_a_feature_that_writes_nothing_changes_nothing_bit_for_bit(lm, passages):
    sae = sae_at("standard")
    feature = firing_feature(lm, sae, passages)
    sae.W_dec[feature] = 0
    found, _ = drain(ablate(lm, sae, IN, feature, passages))
    assert found.n_firing > 0
    assert not any(effect.loss.any() or effect.kl.any() for effect in found.passages)
    assert found.promoted[0][1] == 0 == found.kl_after.high


def test_batches_do_not_matter(lm, passages, monkeypatch):
    sae = sae_at("standard")
    feature = firing_feature(lm, sae, passages)
    together, _ = drain(ablate(lm, sae, IN, feature, passages, controls=[1]))
    monkeypatch.setattr(module, "_STEP_NUMBERS", 1)
    alone, steps = drain(ablate(lm, sae, IN, feature, passages, controls=[1]))
    assert len(steps) > 5
    for one, other in zip(together.passages, alone.passages, strict=True):
        np.testing.assert_allclose(one.kl, other.kl, atol=1e-5)
    assert together.kl_after.mean == pytest.approx(alone.kl_after.mean, abs=1e-5)


def test_no_hook_is_there_between_two_steps_nor_after_a_cancel(lm, passages):
    sae = sae_at("standard")
    work = ablate(lm, sae, IN, firing_feature(lm, sae, passages), passages, controls=[1, 2])
    ids = torch.from_numpy(passages[1].token_ids)[None]
    before = lm.logits(ids)
    for _ in range(3):
        next(work)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.hf.modules())
    work.close()
    assert torch.equal(lm.logits(ids), before)


@pytest.mark.parametrize("architecture", ["transcoder", "topk_transcoder", "skip_transcoder"])
def test_a_transcoders_feature_is_read_at_one_hook_and_taken_away_at_the_other(hf, lm, passages, architecture):
    sae = random_sae(architecture, seed=2, d_in=D_MODEL, d_out=D_MODEL, d_sae=D_SAE, hook_name=IN, hook_name_out=OUT)
    feature = firing_feature(lm, sae, passages)
    found, _ = drain(ablate(lm, sae, IN, feature, passages))
    effect = found.passages[0]
    ids = torch.from_numpy(passages[effect.passage].token_ids)[None]
    counts = torch.from_numpy(passages[effect.passage].counts)
    handles, seen = [], []
    with torch.no_grad():
        clean = hf(ids).logits[0].log_softmax(-1)

        def read(_module, _args, output):
            seen.append((output[0] if isinstance(output, tuple) else output).clone())

        def write(_module, _args, output):
            x = output[0] if isinstance(output, tuple) else output
            acts = sae.encode(seen[0])[..., feature] * counts
            new = x - acts[..., None] * sae.W_dec[feature]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(hf.model.layers[0].register_forward_hook(read))
        handles.append(hf.model.layers[1].register_forward_hook(write))
        ablated = hf(ids).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    kl = (clean.exp() * (clean - ablated)).sum(-1).numpy()
    first = int(np.argmax(effect.feature_acts > 0))
    assert kl[first:].max() > 1e-4
    np.testing.assert_allclose(effect.kl[first:], kl[first:], atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "more"),
    [("standard", {}), ("topk", {"k": 6, "rescale_acts_by_decoder_norm": True}), ("jumprelu", {})],
)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_a_contribution_is_what_the_saes_own_decoder_adds_for_it(architecture, more, norm):
    sae = random_sae(architecture, **more, normalize_activations=norm)
    x = random_activations(sae)
    acts = sae.encode(x)
    feature = int((acts > 0).sum(0).argmax())
    without = acts.clone()
    without[:, feature] = 0
    expected = sae.decode(acts, like=x) - sae.decode(without, like=x)
    written, own = contribution(sae, x, feature)
    torch.testing.assert_close(own, acts[:, feature])
    torch.testing.assert_close(written, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, {"rescale_acts_by_decoder_norm": True}])
def test_rows_are_what_an_activation_of_one_writes(more):
    sae = sae_at("topk", k=3, **more)
    one_each = torch.eye(D_SAE)[[7, 2]]
    expected = sae.decode(one_each) - sae.decode(torch.zeros_like(one_each))
    torch.testing.assert_close(written_rows(sae, [7, 2]), expected)
    sae.W_dec[2] = 0
    assert not written_rows(sae, np.array([2])).any()


def test_a_model_that_overflows_gives_no_numbers(hf, lm, passages):
    sae = sae_at("standard")
    feature = firing_feature(lm, sae, passages)
    with torch.no_grad():
        row = hf.model.embed_tokens.weight[passages[2].token_ids[3]]
        before = row.clone()
        row.fill_(float("inf"))
    with pytest.raises(BadInput, match="An activation is NaN or infinite"):
        drain(ablate(lm, sae, IN, feature, passages))
    with torch.no_grad():
        row.copy_(before)
        head = hf.lm_head.weight[5].clone()
        hf.lm_head.weight[5] = float("nan")
    with pytest.raises(BadInput, match="A prediction is NaN or infinite"):
        drain(ablate(lm, sae, IN, feature, passages))
    with torch.no_grad():
        hf.lm_head.weight[5] = head


def test_controls_fire_about_as_often_and_are_drawn_by_the_seed():
    frequency = np.concatenate([[0.0], np.geomspace(1e-5, 0.5, 400)])
    drawn = matched_controls(frequency, 200, 4, seed=7)
    assert drawn == matched_controls(frequency, 200, 4, seed=7)
    assert len({tuple(matched_controls(frequency, 200, 4, seed=s)) for s in range(20)}) > 10
    assert 200 not in drawn and len(set(drawn)) == 4
    assert all(abs(np.log(frequency[each] / frequency[200])) < 1 for each in drawn)
    assert matched_controls([0.1, 0.0, 0.2], 0, 5) == [2]
    assert 0 not in matched_controls(frequency, 0, 9)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        interval = bootstrap(generator.normal(3.0, 2.0, 60), seed, 400)
        hits += interval.low <= 3.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99
    assert bootstrap([2.5], 0) == (2.5, 2.5, 2.5, 1)


def test_what_cannot_be_measured_is_refused(lm, passages):
    sae = sae_at("standard")
    with pytest.raises(EmptyData, match="no text"):
        next(ablate(lm, sae, IN, 0, []))
    with pytest.raises(NotFound, match="no feature 99"):
        drain(ablate(lm, sae, IN, 99, passages))
    with pytest.raises(BadInput, match="65 tokens"):
        next(ablate(lm, sae, IN, 0, [Passage(np.full(65, 3), np.ones(65, bool))]))
