"""Interventions do what their formulas say, where they say, and nothing anywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from steering_runs import GREEDY, PROMPTS, run
from torch import Tensor

from mistudio_engine.api.errors import BadInput, NotFound, UnknownHook, WrongShape
from mistudio_engine.api.sae_config import StandardConfig
from mistudio_engine.models.hooks import SITES, activations, edit
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.saes import SAE
from mistudio_engine.saes.standard import StandardSAE
from mistudio_engine.steering.batch import Batch
from mistudio_engine.steering.generation import generate
from mistudio_engine.steering.interventions import METHODS, Intervention, Window, applied, feature_direction
from mistudio_engine.steering.sampling import Sampling

HOOK = "blocks.1.hook_resid_post"


def direction(lm: LanguageModel) -> Tensor:
    return torch.linspace(-1, 1, lm.d_model)


def steered_activations(lm: LanguageModel, ids: Tensor, interventions, window: Window | None = None) -> Tensor:
    """What stands at HOOK once the interventions have acted, (rows, n_tokens, width)."""
    seen: list[Tensor] = []

    def look(h: Tensor) -> Tensor:
        seen.append(h.clone())
        return h

    with torch.no_grad(), applied(lm, interventions, window), edit(lm, HOOK, look):
        lm.hf(input_ids=ids)
    return seen[0]


@pytest.mark.parametrize("site", SITES)
def test_strength_zero_is_bit_equal_to_no_intervention(lm: LanguageModel, site: str) -> None:
    if site not in lm.layout.taps:
        pytest.skip(f"the {lm.layout.family.name} family has no {site}")
    ids = torch.tensor([lm.encode(p, bos=True)[:5] for p in ("Once upon a time", "Lily and her dog went")])
    plain = lm.logits(ids)
    hook = f"blocks.1.{site}"
    with applied(lm, [Intervention(hook, direction(lm), 0.0)]):
        assert torch.equal(lm.logits(ids), plain)
    with applied(lm, [Intervention(hook, direction(lm), (0.0, 6.0))]):
        mixed = lm.logits(ids)
    assert torch.equal(mixed[0], plain[0])
    assert not torch.equal(mixed[1], plain[1])


def test_a_row_with_strength_zero_generates_the_baseline_bit_for_bit(lm: LanguageModel) -> None:
    rows = [lm.encode(p, bos=True) for p in ("Once upon a time", "Once upon a time", "One", "Once upon a time")]
    plain, steered = Batch(lm, rows), Batch(lm, rows)
    steer = [Intervention(HOOK, direction(lm), (0.0, 9.0, None, -9.0))]
    for _ in range(12):
        a = plain.read(plain.tokens.shape[1])[:, -1]
        b = steered.read(steered.tokens.shape[1], steer)[:, -1]
        assert torch.equal(a[0].view(torch.int32), b[0].view(torch.int32))
        assert torch.equal(a[2].view(torch.int32), b[2].view(torch.int32))
        assert not torch.equal(a[1], b[1])
        plain.append(a.argmax(-1, keepdim=True))
        steered.append(a.argmax(-1, keepdim=True))


@pytest.mark.parametrize("method", ["add", "suppress", "orthogonal"])
def test_rows_that_are_left_alone_keep_negative_zeros_and_nan(
    gpt2: LanguageModel, sae: SAE, method, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = torch.tensor([-0.0, float("nan"), 0.0, 1e-45, float("inf")]).repeat(7)[:32]
    block = gpt2.layout.blocks[1]
    identity = {"add": 0.0, "suppress": 0.0, "orthogonal": 1.0}[method]
    for left_alone in (identity, None):
        it = Intervention(HOOK, direction(gpt2), (left_alone, 2.0), method, sae=sae, feature=3)
        handle = block.register_forward_hook(lambda m, a, out: odd.expand(2, 3, 32).clone())
        try:
            after = steered_activations(gpt2, torch.zeros(2, 3, dtype=torch.long), [it])
        finally:
            handle.remove()
        assert torch.equal(after[0].view(torch.int32), odd.expand(3, 32).contiguous().view(torch.int32))


def test_add_adds_strength_times_the_vector_at_every_position(lm: LanguageModel) -> None:
    ids = torch.tensor([lm.encode("Once upon a time", bos=True)])
    before = activations(lm, ids, [HOOK])[HOOK]
    after = steered_activations(lm, ids, [Intervention(HOOK, direction(lm), 3.0)])
    assert torch.equal(after, before + 3.0 * direction(lm))


def test_a_feature_adds_a_vector_whose_length_is_the_strength(gpt2: LanguageModel, sae: SAE) -> None:
    ids = torch.tensor([[65, 66, 67]])
    before = activations(gpt2, ids, [HOOK])[HOOK]
    after = steered_activations(gpt2, ids, [Intervention.of_feature(sae, 40, 5.0)])
    added = after - before
    assert torch.allclose(added.norm(dim=-1), torch.tensor(5.0), atol=1e-4)
    assert torch.allclose(added / 5.0, (sae.W_dec[40] / sae.W_dec[40].norm()).expand_as(added), atol=1e-5)


def test_suppress_takes_the_features_share_and_keeps_the_error(gpt2: LanguageModel, sae: SAE) -> None:
    ids = torch.tensor([[65, 66, 67, 68]])
    h = activations(gpt2, ids, [HOOK])[HOOK]
    feature_acts = sae.encode(h)
    feature = int(feature_acts[0].max(0).values.argmax())
    written = feature_acts[..., feature, None] * sae.W_dec[feature]
    after = steered_activations(gpt2, ids, [Intervention.of_feature(sae, feature, 0.5, method="suppress")])
    assert torch.allclose(after, h - 0.5 * written, atol=1e-5)
    ablated = steered_activations(gpt2, ids, [Intervention.of_feature(sae, feature, method="ablate")])
    assert torch.allclose(ablated, h - written, atol=1e-5)
    error = h - sae(h)
    without = feature_acts.clone()
    without[..., feature] = 0
    assert torch.allclose(ablated, sae.decode(without) + error, atol=1e-4)


def test_set_makes_what_the_feature_writes_a_given_length(gpt2: LanguageModel, sae: SAE) -> None:
    ids = torch.tensor([[65, 66, 67, 68]])
    h = activations(gpt2, ids, [HOOK])[HOOK]
    c, norm = 4.0, float(sae.W_dec[9].norm())
    after = steered_activations(gpt2, ids, [Intervention.of_feature(sae, 9, c, method="set")])
    assert torch.allclose(after, h + (c / norm - sae.encode(h)[..., 9, None]) * sae.W_dec[9], atol=1e-5)


def test_orthogonal_scales_the_component_and_cap_bounds_it(gpt2: LanguageModel) -> None:
    ids = torch.tensor([[65, 66, 67, 68]])
    v = direction(gpt2)
    unit = v / v.norm()
    h = activations(gpt2, ids, [HOOK])[HOOK]
    P = torch.outer(unit, unit)
    doubled = steered_activations(gpt2, ids, [Intervention(HOOK, v, 2.0, "orthogonal")])
    assert torch.allclose(doubled, h @ (torch.eye(32) - P) + 2.0 * h @ P, atol=1e-4)
    removed = steered_activations(gpt2, ids, [Intervention(HOOK, v, 0.0, "orthogonal")])
    assert torch.allclose(removed @ unit, torch.zeros(1, 4), atol=1e-4)
    limit = float((h @ unit).median())
    capped = steered_activations(gpt2, ids, [Intervention(HOOK, v, limit, "cap")])
    assert torch.allclose(capped @ unit, (h @ unit).clamp(max=limit), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_sae_and_its_twin_with_rescaled_decoder_rows_steer_alike(gpt2: LanguageModel, sae: SAE, method) -> None:
    ids = torch.tensor([[65, 66, 67, 68]])
    norms = sae.W_dec.norm(dim=1)
    twin = type(sae)(
        sae.cfg,
        {
            "W_enc": sae.W_enc * norms,
            "b_enc": sae.b_enc * norms,
            "W_dec": sae.W_dec / norms[:, None],
            "b_dec": sae.b_dec,
        },
    )
    ours, theirs = (
        steered_activations(gpt2, ids, [Intervention.of_feature(s, 5, 1.7, method=method)]) for s in (sae, twin)
    )
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_an_sae_that_normalises_loses_exactly_what_its_decoder_would_lose(gpt2: LanguageModel, sae: SAE, norm) -> None:
    ids = torch.tensor([[65, 66, 67, 68]])
    h = activations(gpt2, ids, [HOOK])[HOOK]
    cfg = sae.cfg.model_copy(update={"normalize_activations": norm})
    normed = type(sae)(cfg, dict(sae.named_parameters()))
    feature = int(normed.encode(h)[0].max(0).values.argmax())
    without = normed.encode(h)
    without[..., feature] = 0
    after = steered_activations(gpt2, ids, [Intervention.of_feature(normed, feature, method="ablate")])
    assert torch.allclose(after, normed.decode(without, like=h) + h - normed(h), atol=1e-4)


def test_positions_are_the_tokens_they_name_and_never_padding(gpt2: LanguageModel) -> None:
    rows, prompt_width = 2, 4
    real = torch.tensor([[False, True, True, True, True, True], [True] * 6])
    ids = torch.tensor([[65] * 6, [66] * 6])
    plain = activations(gpt2, ids, [HOOK])[HOOK]
    expected = {
        "all": [[0, 1, 1, 1, 1, 1], [1] * 6],
        "prompt": [[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]],
        "generated": [[0, 0, 0, 0, 1, 1]] * 2,
        "last": [[0, 0, 0, 1, 0, 0]] * 2,
    }
    for positions, where in expected.items():
        it = Intervention(HOOK, direction(gpt2), 1.0, positions=positions)
        after = steered_activations(gpt2, ids, [it], Window(0, prompt_width, real))
        assert (after != plain).any(-1).int().tolist() == where, positions
        # The same columns read in two passes, as with a cache.
        masks = [Window(start, prompt_width, real).mask(positions, rows, n) for start, n in ((0, 4), (4, 2))]
        assert torch.cat(masks, dim=1).int().tolist() == where, positions


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_steering_is_the_same_with_a_cache_and_without_and_in_a_batch(lm: LanguageModel, positions) -> None:
    it = Intervention(HOOK, direction(lm), 4.0, positions=positions)
    cached = run(generate(lm, PROMPTS, interventions=[it], sampling=GREEDY))
    again = run(generate(lm, PROMPTS, interventions=[it], sampling=GREEDY, cache=False))
    alone = [run(generate(lm, p, interventions=[it], sampling=GREEDY))[0] for p in PROMPTS]
    assert [g.token_ids for g in cached] == [g.token_ids for g in again] == [g.token_ids for g in alone]


def test_interventions_at_one_hook_add_up_in_any_order(gpt2: LanguageModel, sae: SAE) -> None:
    ids = torch.tensor([[65, 66, 67, 68]])
    both = [Intervention.of_feature(sae, 4, 3.0), Intervention.of_feature(sae, 5, method="ablate")]
    h = activations(gpt2, ids, [HOOK])[HOOK]
    one, other = (steered_activations(gpt2, ids, order) for order in (both, both[::-1]))
    each = sum((steered_activations(gpt2, ids, [it]) - h for it in both), h)
    assert torch.allclose(one, other, atol=1e-5)
    assert torch.allclose(one, each, atol=1e-4)


def test_half_precision_is_steered_with_one_rounding() -> None:
    from mistudio_engine.steering.interventions import _edited

    h = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    v = torch.linspace(-1, 1, 8)
    out = _edited(h, [Intervention(HOOK, v, 3.3)], Window())
    assert torch.equal(out, (h.float() + 3.3 * v).bfloat16())


def test_a_hook_that_never_fires_is_an_error(gpt2: LanguageModel) -> None:
    with pytest.raises(Exception, match="never"), applied(gpt2, [Intervention(HOOK, direction(gpt2))]):
        pass


def test_an_error_inside_leaves_the_model_as_it_was(gpt2: LanguageModel) -> None:
    ids = torch.tensor([[65, 66]])
    before = gpt2.logits(ids)
    with pytest.raises(RuntimeError, match="outside"), applied(gpt2, [Intervention(HOOK, direction(gpt2))]):
        gpt2.logits(ids)
        raise RuntimeError("from outside")
    assert torch.equal(gpt2.logits(ids), before)


def test_what_cannot_be_steered_is_refused_and_says_why(gpt2: LanguageModel, sae: SAE) -> None:
    v = direction(gpt2)
    with pytest.raises(BadInput, match="length 0"):
        Intervention(HOOK, torch.zeros(32))
    with pytest.raises(BadInput, match="length nan"):
        Intervention(HOOK, torch.full((32,), float("nan")))
    with pytest.raises(BadInput, match="strength of inf"):
        Intervention(HOOK, v, float("inf"))
    with pytest.raises(BadInput, match="no feature was given"):
        Intervention(HOOK, v, 1.0, "suppress")
    with pytest.raises(BadInput, match="'multiply'"):
        Intervention(HOOK, v, 1.0, "multiply")  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotFound, match="no feature 48"):
        feature_direction(sae, 48)
    with pytest.raises(UnknownHook):
        generate(gpt2, "a", interventions=[Intervention("blocks.9.hook_resid_post", v)])
    with pytest.raises(WrongShape, match="16 numbers"):
        generate(gpt2, "a", interventions=[Intervention(HOOK, v[:16])])
    with pytest.raises(WrongShape, match="3 strengths were given for 1"):
        generate(gpt2, "a", interventions=[Intervention(HOOK, v, (1, 2, 3))])
    with pytest.raises(BadInput, match="decoder row has length 0"):
        dead = type(sae)(sae.cfg, {**dict(sae.named_parameters()), "W_dec": torch.zeros(48, 32)})
        Intervention.of_feature(dead, 0, 1.0)


def test_a_strength_per_prompt_is_shared_by_its_samples(stories: LanguageModel) -> None:
    it = Intervention(HOOK, direction(stories), (None, 30.0))
    result = run(generate(stories, ["One day"] * 2, interventions=[it], sampling=Sampling(n=2, temperature=1.0)))
    plain = run(generate(stories, "One day", sampling=Sampling(n=2, temperature=1.0)))
    assert [g.token_ids for g in result[:2]] == [g.token_ids for g in plain]
    assert all(a.token_ids != b.token_ids for a, b in zip(result[:2], result[2:], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_in_half_precision_steers_its_rows_and_no_others(shared: Path) -> None:
    lm = LanguageModel.load(shared / "data" / "stories260K-hf", precision="bf16", device="cuda")
    cfg = StandardConfig(d_in=64, d_sae=128, hook_name=HOOK)
    shapes = cfg.tensor_shapes()
    generator = torch.Generator().manual_seed(0)
    sae = StandardSAE(cfg, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    plain = run(generate(lm, ["One day"] * 3, sampling=GREEDY))
    for method in METHODS:
        steer = Intervention.of_feature(sae.to("cuda"), 5, (None, 4.0, 40.0), method=method)
        steered = run(generate(lm, ["One day"] * 3, interventions=[steer], sampling=GREEDY))
        assert steered[0].token_ids == plain[0].token_ids
