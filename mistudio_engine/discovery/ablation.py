"""What a feature does to the model's predictions: its contribution is taken away, and the model runs on without it.

    x ← x − f_i(x) · W_dec[i]

The rest of the activation stays as it is, the SAE's error and the other features included, so what is measured is this
feature alone and not how well the SAE reconstructs. (Splicing in the reconstruction would add its error to every
number: Marks et al. 2024, arXiv 2403.19647, keep the error term for the same reason.) A transcoder's feature is read at
its input hook and taken away where it writes.

Any push of that length changes something. Controls say how much: at the same places a vector of the same length is
taken away along other features' directions, and the effect is set beside theirs, with a bootstrap interval over texts.

It knows neither labels nor where the texts come from.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound
from mistudio_engine.discovery.activation_block import check_finite
from mistudio_engine.discovery.logit_lens import RESIDUAL_SITES
from mistudio_engine.models.hooks import check_width, edit, parse_hook
from mistudio_engine.models.language_model import unembedding

if TYPE_CHECKING:
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.saes.base import SAE

__all__ = [
    "Ablation",
    "AblationProgress",
    "Interval",
    "LensAgreement",
    "Passage",
    "PassageEffect",
    "ablate",
    "bootstrap",
    "contribution",
    "matched_controls",
    "writing",
    "written_rows",
]

_STEP_NUMBERS = 1 << 24
"""Logits of one forward pass: 64 MiB in fp32, and about as much again for each copy that the measures need."""

_STEP_FLOPS_CPU, _STEP_FLOPS_GPU = 1e10, 2e12
"""Arithmetic in one forward pass, unless a single text needs more."""

_CANDIDATES = 8
"""Controls are drawn from so many times their number of features, those that fire nearly as often."""


class Passage(NamedTuple):
    """A text to measure on."""

    token_ids: NDArray[np.int64]
    """(n_tokens,)"""

    counts: NDArray[np.bool_]
    """(n_tokens,) False for special tokens, at which nothing is taken away."""


class AblationProgress(NamedTuple):
    """One forward pass."""

    n_done: int
    n_total: int

    @property
    def fraction(self) -> float:
        """Share that is done."""
        return self.n_done / self.n_total


class Interval(NamedTuple):
    """A mean over texts and what it may as well have been."""

    mean: float
    low: float
    """2.5 % of the bootstrap's means are below …"""

    high: float
    """… and 2.5 % above."""

    n: int
    """Texts."""


class PassageEffect(NamedTuple):
    """What the ablation did to one text. Position p predicts token p + 1, and the last one nothing."""

    passage: int
    """Which of those given."""

    feature_acts: NDArray[np.float32]
    """(n_tokens,) the feature's activation; 0 on tokens that do not count."""

    loss: NDArray[np.float32]
    """(n_tokens,) change of the loss of the next token in nats, above 0 where it became less likely; 0 before the first
    place where the feature fires, and at the end."""

    kl: NDArray[np.float32]
    """(n_tokens,) KL(clean ‖ ablated) in nats."""


class LensAgreement(NamedTuple):
    """Measured changes of logits beside those that the logit lens foretells."""

    correlation: float
    """Pearson's, over the vocabulary: 1 where the feature acts through the unembedding alone; NaN for no change."""

    promoted_overlap: float
    """Share of the k tokens it promotes most that are among the lens's k."""

    suppressed_overlap: float


class Ablation(NamedTuple):
    """What a feature does, over all texts in which it fires."""

    feature: int
    n_passages: int
    """Texts given."""

    n_silent: int
    """Of those, texts in which it does not fire."""

    n_firing: int
    """Tokens on which it fires."""

    loss_firing: Interval | None
    """Change of the loss of the token after one on which it fires: each text's mean, then their mean. None where it
    fires nowhere, like all that follow."""

    loss_after: Interval | None
    """Change of loss over all tokens after the first on which it fires."""

    kl_firing: Interval | None
    kl_after: Interval | None
    controls: tuple[int, ...]
    """Features whose directions were taken instead."""

    control_loss_after: Interval | None
    """As loss_after, of the controls' mean. None without controls."""

    control_kl_after: Interval | None
    excess_kl: Interval | None
    """The feature's KL minus its controls', text by text: above 0 it does more than any push of that length."""

    controls_below: float | None
    """Share of the controls whose KL is smaller than the feature's."""

    promoted: tuple[tuple[int, float], ...]
    """Tokens whose logits the feature raises most where it fires, measured: id and mean of clean − ablated."""

    suppressed: tuple[tuple[int, float], ...]
    lens: LensAgreement | None
    """None where the feature does not write into the residual stream."""

    passages: tuple[PassageEffect, ...]
    """The texts in which it fires."""


def ablate(
    lm: LanguageModel,
    sae: SAE,
    hook_name: str,
    feature: int,
    passages: Sequence[Passage],
    *,
    controls: Sequence[int] = (),
    k: int = 20,
    seed: int = 0,
) -> Generator[AblationProgress, None, Ablation]:
    """Measure what a feature does on some texts; a generator of forward passes.

    Args:
        lm: the language model.
        sae: reads at `hook_name` and writes there, or at its own `hook_name_out`.
        hook_name: where the SAE reads.
        feature: index.
        passages: each at most as long as the model's context.
        controls: features whose directions are taken instead, such as `matched_controls` gives.
        k: tokens to name.
        seed: of the bootstrap.

    Raises:
        EmptyData: there are no texts.
        NotFound: no feature of such an index.
        UnknownHook, WrongShape: the hook is not the model's, or a width does not fit.
        BadInput: a text is longer than the context, a control's decoder row is zero, or the model overflows.
    """
    if not passages:
        raise EmptyData("There is no text to ablate a feature on.", fix="Give texts, or extract the SAE's features.")
    check_width(lm, hook_name, sae.cfg.d_in)
    hook_out = sae.cfg.hook_name_out or hook_name
    check_width(lm, hook_out, sae.cfg.output_width)
    rows = [_decoder_row(sae, control) for control in controls]
    for control, row in zip(controls, rows, strict=True):
        if not row.norm() > 0:
            raise BadInput(
                f"Feature {control} is no control: its decoder row is zero.",
                fix="Choose one of those that `writing` names.",
            )
    directions = [row / row.norm() for row in rows]
    batches = _batches(lm, passages)
    tally = _Tally(lm.d_vocab, len(controls))
    n_done, n_total = 0, len(batches) * (2 + len(controls))
    for which in batches:
        ids, counts = _padded([passages[each] for each in which])
        clean, x = _clean(lm, ids, hook_name)
        check_finite("An activation", x[counts.to(x.device)])
        taken, acts = contribution(sae, x, feature)
        keep = counts.to(acts)[..., None]
        taken, acts = taken * keep.to(taken), acts * keep[..., 0]
        n_done += 1
        yield AblationProgress(n_done, n_total)
        if not bool((acts > 0).any()):
            tally.silent(len(which))
            n_done += 1 + len(controls)
            continue
        measured = _Measured(clean, ids, torch.tensor([len(passages[each].token_ids) for each in which]), acts.cpu())
        del clean
        loss, kl = measured.effect(_without(lm, hook_out, ids, taken), tally.shift)
        n_done += 1
        yield AblationProgress(n_done, n_total)
        length = taken.float().norm(dim=-1, keepdim=True)  # (rows, n_tokens, 1)
        control_effects = []
        for direction in directions:
            push = (length * direction.to(length.device)).to(taken.dtype)
            control_effects.append(measured.effect(_without(lm, hook_out, ids, push)))
            n_done += 1
            yield AblationProgress(n_done, n_total)
        tally.add(which, measured, loss, kl, control_effects)
    return _summed(lm, sae, hook_out, feature, len(passages), tuple(controls), tally, k, seed)


def contribution(sae: SAE, x: Tensor, feature: int) -> tuple[Tensor, Tensor]:
    """What a feature adds to the SAE's output for activations x, and its activations.

    Args:
        x: (…, d_in).

    Returns:
        f·W_dec[i], un-normalised as the SAE's decoder does it, (…, d_out) in x's dtype on its device; and f, (…) fp32.

    Raises:
        NotFound: no feature of this index.
    """
    row = _decoder_row(sae, feature)
    with torch.no_grad():
        z, norm = sae.normalize(x.to(sae.device))
        acts = sae.encode_normalized(z, torch.tensor([feature], device=z.device))[0].float()  # (…, 1)
    # A transcoder's output is not in its input's norm: its decoder undoes none.
    scale = norm.scale if not sae.cfg.is_transcoder else torch.ones_like(norm.scale)
    return (acts * scale * row).to(x), acts[..., 0].to(x.device)


def written_rows(sae: SAE, features: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """What an activation of 1 of each feature writes, (n, d_out) in fp32, before its norm is undone.

    These are rows of W_dec, of length 1 in SAEs that count their rows as normed (`rescale_acts_by_decoder_norm`).
    """
    rows = sae.W_dec[torch.as_tensor(np.array(features, dtype=np.int64))].detach().float()
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return rows
    return torch.nn.functional.normalize(rows, dim=-1)  # a row of zeros stays one


def writing(sae: SAE) -> NDArray[np.bool_]:
    """(d_sae,) whether a feature writes anything: its decoder row has a direction."""
    return (torch.linalg.vector_norm(sae.W_dec.detach(), dim=1, dtype=torch.float32) > 0).cpu().numpy()


def _decoder_row(sae: SAE, feature: int) -> Tensor:
    """What an activation of 1 writes, (d_out,) in fp32."""
    if not 0 <= feature < len(sae.W_dec):
        raise NotFound(f"The SAE has no feature {feature}.", why=f"It has {len(sae.W_dec)}, counted from 0.")
    return written_rows(sae, [feature])[0]


def matched_controls(frequency: ArrayLike, feature: int, n: int, seed: int = 0) -> list[int]:
    """n features drawn from among those that fire nearly as often as this one; fewer where fewer are alive.

    Args:
        frequency: (d_sae,) share of tokens on which each fires; 0 for those that are unknown, dead, or write nothing.
        feature: index; never among the answers.
        n: how many.
        seed: for the draw.
    """
    frequency = np.asarray(frequency, dtype=np.float64)
    others = np.flatnonzero(frequency > 0)
    others = others[others != feature]
    own = max(frequency[feature], frequency[others].min(initial=1.0))
    distance = np.abs(np.log(frequency[others]) - np.log(own))
    nearest = others[np.argsort(distance, kind="stable")[: _CANDIDATES * n]]
    chosen = np.random.default_rng([seed, feature]).permutation(nearest)[:n]
    return sorted(int(each) for each in chosen)


def bootstrap(values: ArrayLike, seed: int = 0, n_resamples: int = 2000) -> Interval:
    """The mean of `values` (n,) with the percentile bootstrap's 95 % interval (Efron 1979).

    Raises:
        EmptyData: there are none.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise EmptyData("There is nothing to average.", fix="Give at least one value.")
    drawn = np.random.default_rng(seed).integers(0, len(values), (n_resamples, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high), len(values))


def _batches(lm: LanguageModel, passages: Sequence[Passage]) -> list[list[int]]:
    """Passages of like length together, as many as a step may have."""
    for passage in passages:
        if not 0 < len(passage.token_ids) <= lm.n_ctx or len(passage.counts) != len(passage.token_ids):
            raise BadInput(
                f"A text of {len(passage.token_ids)} tokens cannot be used.",
                fix=f"Give texts of 1 to {lm.n_ctx} tokens, each with what counts.",
            )
    n_params = sum(p.numel() for block in lm.layout.blocks for p in block.parameters()) + lm.d_model * lm.d_vocab
    flops = _STEP_FLOPS_CPU if lm.device.type == "cpu" else _STEP_FLOPS_GPU
    n_tokens = int(min(_STEP_NUMBERS / lm.d_vocab, flops / (2 * n_params)))
    batches: list[list[int]] = []
    for each in sorted(range(len(passages)), key=lambda i: (len(passages[i].token_ids), i)):
        # They come by length, so the one that joins is the longest.
        if batches and (len(batches[-1]) + 1) * len(passages[each].token_ids) <= n_tokens:
            batches[-1].append(each)
        else:
            batches.append([each])
    return batches


def _padded(passages: Sequence[Passage]) -> tuple[Tensor, Tensor]:
    """Ids and what counts, (rows, n_tokens); behind a text stands padding, which causal attention never looks at."""
    width = max(len(passage.token_ids) for passage in passages)
    ids, counts = (
        torch.zeros(len(passages), width, dtype=torch.long),
        torch.zeros(len(passages), width, dtype=torch.bool),
    )
    for row, passage in enumerate(passages):
        ids[row, : len(passage.token_ids)] = torch.from_numpy(np.asarray(passage.token_ids, dtype=np.int64))
        counts[row, : len(passage.counts)] = torch.from_numpy(np.asarray(passage.counts, dtype=bool))
    return ids, counts


def _clean(lm: LanguageModel, ids: Tensor, hook_name: str) -> tuple[Tensor, Tensor]:
    """The model's logits, and what the SAE reads."""
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x.clone())  # some models write into it afterwards
        return x

    with edit(lm, hook_name, look):
        logits = lm.logits(ids)
    return logits, seen[0]


def _without(lm: LanguageModel, hook_out: str, ids: Tensor, taken: Tensor) -> Tensor:
    """The logits with `taken` (rows, n_tokens, d_out) subtracted at a hook; bit-equal where it is zero everywhere."""

    def subtract(h: Tensor) -> Tensor:
        if not taken.any():
            return h
        push = taken.to(h.device, torch.promote_types(h.dtype, torch.float32))
        return torch.where(push.any(dim=-1, keepdim=True), (h - push).to(h.dtype), h)

    with edit(lm, hook_out, subtract):
        return lm.logits(ids)


class _Measured:
    """The places of one batch at which something is measured, with the clean logits there."""

    def __init__(self, clean: Tensor, ids: Tensor, lengths: Tensor, acts: Tensor) -> None:
        self.acts, self.lengths = acts, lengths
        self.firing = acts > 0  # (rows, n_tokens) on the CPU
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        has_next = torch.zeros_like(real)
        has_next[:, :-1] = real[:, 1:]
        self.after = (self.firing.cumsum(dim=1) > 0) & real
        self.has_next = has_next & self.after
        self._targets = ids.roll(-1, dims=1)[self.after].to(clean.device)[:, None]
        self._at_firing = clean[self.firing.to(clean.device)].float()  # (n_firing, d_vocab)
        self._log_p = clean[self.after.to(clean.device)].float().log_softmax(dim=-1)  # (n_measured, d_vocab)
        self._p = self._log_p.exp()

    def effect(self, logits: Tensor, shift: Callable[[Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
        """Change of loss, and KL, (rows, n_tokens) each; `shift` is given clean − ablated where the feature fires."""
        if shift is not None:
            shift(self._at_firing - logits[self.firing.to(logits.device)].float())
        log_q = logits[self.after.to(logits.device)].float().log_softmax(dim=-1)
        lost = self._log_p - log_q  # (n_measured, d_vocab)
        loss, kl = torch.zeros(self.after.shape), torch.zeros(self.after.shape)
        loss[self.after] = lost.gather(1, self._targets)[:, 0].cpu()
        loss[~self.has_next] = 0.0
        kl[self.after] = lost.mul_(self._p).sum(dim=-1).clamp_min(0.0).cpu()
        check_finite("A prediction", loss, kl)
        return loss, kl


class _Tally:
    """Means of each text, and the sum of the changes of logits."""

    def __init__(self, d_vocab: int, n_controls: int) -> None:
        self.n_silent = self.n_firing = 0
        self.means: dict[str, list[float]] = {"loss_firing": [], "loss_after": [], "kl_firing": [], "kl_after": []}
        self.control_loss: list[list[float]] = []
        self.control_kl: list[list[float]] = []
        self.effects: list[PassageEffect] = []
        self.sum = torch.zeros(d_vocab, dtype=torch.float64)
        self._n_controls = n_controls

    def silent(self, n: int) -> None:
        self.n_silent += n

    def shift(self, change: Tensor) -> None:
        self.sum += change.double().sum(dim=0).cpu()

    def add(
        self,
        which: Sequence[int],
        measured: _Measured,
        loss: Tensor,
        kl: Tensor,
        controls: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        for row, passage in enumerate(which):
            firing, after, has_next = measured.firing[row], measured.after[row], measured.has_next[row]
            n_firing = int(firing.sum())
            if not n_firing:
                self.n_silent += 1
                continue
            self.n_firing += n_firing
            for name, values, where in (
                ("loss_firing", loss, firing & has_next),
                ("loss_after", loss, has_next),
                ("kl_firing", kl, firing),
                ("kl_after", kl, after),
            ):
                if where.any():  # a feature that fires on the last token alone foretells nothing
                    self.means[name].append(float(values[row][where].double().mean()))
            if has_next.any():
                self.control_loss.append([float(each[row][has_next].double().mean()) for each, _ in controls])
            self.control_kl.append([float(each[row][after].double().mean()) for _, each in controls])
            n = int(measured.lengths[row])
            self.effects.append(
                PassageEffect(passage, measured.acts[row, :n].numpy(), loss[row, :n].numpy(), kl[row, :n].numpy())
            )


def _summed(
    lm: LanguageModel,
    sae: SAE,
    hook_out: str,
    feature: int,
    n_passages: int,
    controls: tuple[int, ...],
    tally: _Tally,
    k: int,
    seed: int,
) -> Ablation:
    """The tally as an answer."""
    means = {name: bootstrap(values, seed) if values else None for name, values in tally.means.items()}
    control_loss = control_kl = excess = below = None
    if controls and tally.control_kl:
        own, theirs = np.array(tally.means["kl_after"]), np.array(tally.control_kl)  # (n,), (n, n_controls)
        control_kl = bootstrap(theirs.mean(axis=1), seed)
        excess = bootstrap(own - theirs.mean(axis=1), seed)
        below = float((theirs.mean(axis=0) < own.mean()).mean())
        control_loss = bootstrap(np.mean(tally.control_loss, axis=1), seed) if tally.control_loss else None
    promoted: list[tuple[int, float]] = []
    suppressed: list[tuple[int, float]] = []
    lens = None
    if tally.n_firing:
        shift = (tally.sum / tally.n_firing).numpy()
        k = min(k, len(shift))
        promoted, suppressed = _ends(shift, k), _ends(-shift, k)
        foretold = _foretold(lm, sae, hook_out, feature)
        lens = None if foretold is None else _agreement(shift, foretold, k)
    return Ablation(
        feature=feature,
        n_passages=n_passages,
        n_silent=tally.n_silent,
        n_firing=tally.n_firing,
        **means,
        controls=controls,
        control_loss_after=control_loss,
        control_kl_after=control_kl,
        excess_kl=excess,
        controls_below=below,
        promoted=tuple(promoted),
        suppressed=tuple((token, -value) for token, value in suppressed),
        lens=lens,
        passages=tuple(sorted(tally.effects, key=lambda effect: effect.passage)),
    )


def _ends(values: NDArray[np.float64], k: int) -> list[tuple[int, float]]:
    """The k tokens with the largest values, of equal ones the smaller id first."""
    order = np.argsort(-values, kind="stable")[:k]
    return [(int(token), float(values[token])) for token in order]


def _foretold(lm: LanguageModel, sae: SAE, hook_out: str, feature: int) -> NDArray[np.float64] | None:
    """What the logit lens says of a feature, (d_vocab,); None where it does not write into the residual stream."""
    W_U, gain = unembedding(lm)
    if parse_hook(hook_out).site not in RESIDUAL_SITES or sae.cfg.output_width != W_U.shape[1]:
        return None
    row = sae.W_dec[feature].detach().to(W_U.device, torch.float32)
    return ((row if gain is None else row * gain) @ W_U.float().T).double().cpu().numpy()


def _agreement(shift: NDArray[np.float64], foretold: NDArray[np.float64], k: int) -> LensAgreement:
    one, other = shift - shift.mean(), foretold - foretold.mean()
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))

    def overlap(sign: float) -> float:
        pairs = [{token for token, _ in _ends(sign * values, k)} for values in (shift, foretold)]
        return len(set.intersection(*pairs)) / k

    return LensAgreement(float(one @ other) / norms if norms else float("nan"), overlap(1.0), overlap(-1.0))
