"""An SAE against the model it was made for: reconstruction and sparsity on real text, and what splicing it in costs.

Works for any SAE, trained here or not. The formulas are in metrics.py; this file runs the model, adds up and divides.
The definitions are those of SAELens's run_evals, number for number (benchmarks/eval_parity.py), with these differences:

- A transcoder is measured at the hook that it predicts and with its skip path; SAELens compares it with its own input.
- Padding is left out even where its id is not that of a special token. What counts as special is said by the tokens:
  all special tokens, chat marks too, where SAELens leaves out BOS, EOS, PAD and SEP only.
- relative_reconstruction_bias is a quotient of sums over all batches, not a mean of each batch's.

It does not know what is done with the result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mistudio_engine.api.errors import BadInput, EmptyData, WrongShape
from mistudio_engine.api.events import Progress
from mistudio_engine.api.records import Evaluation
from mistudio_engine.models.hooks import check_hook, edit, hook_width
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens
from mistudio_engine.saes import SAE
from mistudio_engine.training import metrics

__all__ = ["FeatureMeasures", "Measurement", "evaluate", "measure"]

_MOST_NUMBERS = 1 << 26
"""In one (n, d_sae) matrix of activations, and in one (n, d_vocab) of logits: 256 MiB in fp32."""

_MOST_CONTEXTS = 8

_DENSE = 0.1
"""A feature that fires on more than this share of tokens counts as dense."""


class FeatureMeasures(NamedTuple):
    """Numbers for each feature, on the CPU, (d_sae,) each."""

    density: Tensor
    """Share of the tokens on which it is active."""

    consistent_activation: Tensor
    """On how many tokens of a context it is active, if it is active there at all; 0 for a dead feature. SAELens calls
    it consistent_activation_heuristic and has NaN for a dead one."""

    encoder_norm: Tensor
    """Length of its column of W_enc."""

    decoder_norm: Tensor
    """Length of its row of W_dec."""

    encoder_bias: Tensor | None
    """b_enc; None for an architecture without it."""

    encoder_decoder_cosine: Tensor | None
    """cos(encoder, decoder direction); None where input and output have different widths."""


class Measurement(NamedTuple):
    """All that `measure` finds."""

    evaluation: Evaluation
    features: FeatureMeasures


def evaluate(
    lm: LanguageModel,
    sae: SAE,
    tokens: PackedTokens,
    *,
    hook_name: str,
    n_tokens: int = 32_768,
    contexts: slice | None = None,
    batch: int | None = None,
) -> Generator[Progress, Any, Evaluation]:
    """As `measure`, without the numbers for each feature."""
    measurement = yield from measure(
        lm, sae, tokens, hook_name=hook_name, n_tokens=n_tokens, contexts=contexts, batch=batch
    )
    return measurement.evaluation


@torch.no_grad()
def measure(
    lm: LanguageModel,
    sae: SAE,
    tokens: PackedTokens,
    *,
    hook_name: str,
    n_tokens: int = 32_768,
    contexts: slice | None = None,
    batch: int | None = None,
) -> Generator[Progress, None, Measurement]:
    """Measure an SAE on contexts of a tokenisation.

    The model runs over each batch three times: clean; with the SAE's output in place of the activations; with zeros in
    their place. BOS, EOS, other special tokens and padding are left out of every average and keep their activations
    when the SAE is spliced in, but are zeroed with the others. Of text, the loss is counted where a token follows, be
    it special: that a text ends here is a prediction, too.

    Args:
        lm: the model.
        sae: an SAE for `hook_name`, or a transcoder from it to `sae.cfg.hook_name_out`.
        tokens: text.
        hook_name: where the SAE reads.
        n_tokens: about as many tokens, whole contexts and at least one.
        contexts: take them from among these, such as `slice(-64, None)` for the last 64; None for all.
        batch: contexts at once; None for as many as the vocabulary's size allows, at most 8.

    Yields:
        Progress after each forward pass.

    Raises:
        UnknownHook: the model has no such hook.
        WrongShape: the SAE does not fit the hook.
        BadInput: `contexts` has none of those that there are.
        EmptyData: there is no text in the contexts.
    """
    hook_out = sae.cfg.hook_name_out or hook_name
    for name, width in ((hook_name, sae.cfg.d_in), (hook_out, sae.cfg.output_width)):
        check_hook(lm, name)
        if hook_width(lm, name) != width:
            raise WrongShape(
                f"The SAE's width {width} does not fit {name} of {lm.name}, which is {hook_width(lm, name)} wide.",
                fix="Use the hook and the model that the SAE was made for.",
            )
    rows = _rows(tokens, contexts, n_tokens)
    batch = batch or max(1, min(_MOST_CONTEXTS, _MOST_NUMBERS // (tokens.info.context_size * lm.d_vocab)))
    totals = _Totals(sae)
    n_done = 0
    for chosen in rows.split(batch):
        ids = tokens.ids[chosen].long().to(lm.device)
        mask = tokens.mask(chosen, special=False).to(lm.device)  # (batch, seq)
        if not bool(mask.any()):
            n_done += len(chosen)
            continue
        seen: dict[str, Tensor] = {}
        with edit(lm, hook_name, _keep(seen, "in")), edit(lm, hook_out, _keep(seen, "out")):
            clean = lm.logits(ids)[mask]  # (n, d_vocab)
        yield _progress(n_done, len(rows), "clean")

        spliced = totals.reconstruct(sae, seen["in"], seen["out"], mask)
        yield _progress(n_done, len(rows), "sae")
        targets, has_target = _targets(ids, tokens.mask(chosen).to(lm.device), mask)
        totals.n_predictions += int(has_target.sum())
        totals.add("ce_clean", metrics.cross_entropy(clean, targets)[has_target])
        for name, replacement in (("sae", _put(spliced, mask)), ("zero", torch.zeros_like)):
            with edit(lm, hook_out, replacement):
                logits = lm.logits(ids)[mask]
            totals.add(f"ce_{name}", metrics.cross_entropy(logits, targets)[has_target])
            totals.add(f"kl_{name}", metrics.kl_div(clean, logits))
            yield _progress(n_done, len(rows), name)
        n_done += len(chosen)
    return totals.measurement(sae)


class _Totals:
    """Sums over all batches, in float64."""

    def __init__(self, sae: SAE) -> None:
        self.n_tokens = 0
        self.n_predictions = 0
        self._sums: dict[str, float] = {}
        self._mean = torch.zeros(sae.cfg.output_width, dtype=torch.float64, device=sae.device)
        self._n_fired = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.device)
        self._n_contexts = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.device)

    def add(self, name: str, per_token: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(per_token.double().sum())

    def reconstruct(self, sae: SAE, x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The SAE's output (batch, seq, d_out) at the masked positions, zero elsewhere, measured on the way."""
        spliced = torch.zeros_like(target)
        inputs, targets = x[mask], target[mask]  # (n, d)
        context_of = mask.nonzero()[:, 0]  # (n,)
        n_fired = torch.zeros(len(mask), sae.cfg.d_sae, dtype=torch.int32, device=sae.device)
        outputs = torch.empty_like(targets)
        at_once = max(1, _MOST_NUMBERS // sae.cfg.d_sae)
        for at in range(0, len(inputs), at_once):
            part = slice(at, at + at_once)
            feature_acts = sae.encode(inputs[part])
            sae_out = sae.decode(feature_acts, like=inputs[part])
            skip = sae.skip(inputs[part].to(sae.dtype))
            outputs[part] = (sae_out if skip is None else sae_out + skip).to(targets.dtype)
            self._mean_of("l0", metrics.l0(feature_acts), len(feature_acts))
            self._mean_of("l1", metrics.l1(feature_acts), len(feature_acts))
            n_fired.index_add_(0, context_of[part], (feature_acts != 0).int())
        self._n_fired += n_fired.sum(dim=0)
        self._n_contexts += (n_fired > 0).sum(dim=0)
        goal, found = targets.double(), outputs.double()
        n = len(goal)
        self._mean_of("mse", metrics.mse(goal, found), n)
        self._mean_of("cosine", metrics.cosine(goal, found), n)
        self._mean_of("l2_ratio", metrics.l2_ratio(goal, found), n)
        self._mean_of("l2_norm_in", metrics.l2_norm(goal), n)
        self._mean_of("l2_norm_out", metrics.l2_norm(found), n)
        self._mean_of("legacy", metrics.explained_variance_legacy(goal, found), n)
        self.add("mean_square", goal.pow(2))
        self.add("mean_square_out", found.pow(2))
        self.add("mean_dot", goal * found)
        self._mean += goal.sum(dim=0)
        self.n_tokens += n
        spliced[mask] = outputs
        return spliced

    def measurement(self, sae: SAE) -> Measurement:
        """The averages.

        Raises:
            EmptyData: nothing was measured.
        """
        if not self.n_predictions:
            raise EmptyData(
                "There is nothing to evaluate on: no token of text that another token follows.",
                why="BOS, EOS and padding are left out.",
                fix="Choose a tokenisation with longer texts.",
            )
        means = {
            name: total / (self.n_predictions if name.startswith("ce_") else self.n_tokens)
            for name, total in self._sums.items()
        }
        fvu = metrics.fvu(torch.tensor(means["mse"]), torch.tensor(means["mean_square"]), self._mean / self.n_tokens)
        features = self._features(sae)
        cosine = features.encoder_decoder_cosine
        evaluation = Evaluation(
            n_tokens=self.n_tokens,
            l0=means["l0"],
            l1=means["l1"],
            fvu=float(fvu),
            explained_variance=float(metrics.explained_variance(fvu)),
            explained_variance_legacy=means["legacy"],
            mse=means["mse"],
            cosine=means["cosine"],
            l2_norm_in=means["l2_norm_in"],
            l2_norm_out=means["l2_norm_out"],
            l2_ratio=means["l2_ratio"],
            relative_reconstruction_bias=metrics.relative_reconstruction_bias(
                means["mean_square_out"], means["mean_dot"]
            ),
            ce_loss_clean=means["ce_clean"],
            ce_loss_sae=means["ce_sae"],
            ce_loss_zero=means["ce_zero"],
            ce_loss_score=metrics.ce_loss_score(means["ce_clean"], means["ce_sae"], means["ce_zero"]),
            kl_div_with_sae=means["kl_sae"],
            kl_div_with_ablation=means["kl_zero"],
            kl_div_score=metrics.kl_div_score(means["kl_sae"], means["kl_zero"]),
            n_dead=int((features.density == 0).sum()),
            dead_fraction=float(metrics.dead_fraction(features.density)),
            dense_fraction=float((features.density > _DENSE).float().mean()),
            density_histogram=metrics.density_histogram(features.density),
            mean_encoder_decoder_cosine=None if cosine is None else float(cosine.mean()),
        )
        return Measurement(evaluation, features)

    def _features(self, sae: SAE) -> FeatureMeasures:
        W_enc, W_dec = sae.W_enc.detach().cpu(), sae.W_dec.detach().cpu()
        b_enc = sae.get_parameter("b_enc").detach().cpu() if "b_enc" in sae.cfg.tensor_shapes() else None
        same_width = sae.cfg.d_in == sae.cfg.output_width
        return FeatureMeasures(
            density=(self._n_fired / self.n_tokens).cpu(),
            consistent_activation=(self._n_fired / self._n_contexts.clamp_min(1)).cpu(),
            encoder_norm=W_enc.norm(dim=0, dtype=torch.float32),
            decoder_norm=W_dec.norm(dim=1, dtype=torch.float32),
            encoder_bias=b_enc,
            encoder_decoder_cosine=metrics.encoder_decoder_cosine(W_enc, W_dec) if same_width else None,
        )

    def _mean_of(self, name: str, mean: Tensor, n: int) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(mean) * n


def _rows(tokens: PackedTokens, contexts: slice | None, n_tokens: int) -> Tensor:
    """Which contexts, (n,)."""
    rows = torch.tensor(range(len(tokens))[contexts or slice(None)])
    if not len(rows):
        raise BadInput(
            f"There is no context in {contexts}: there are {len(tokens)}.", fix="Choose others, or leave it out."
        )
    return rows[: max(1, n_tokens // tokens.info.context_size)]


def _targets(ids: Tensor, real: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """For each masked token the one after it, and whether there is one that is not padding, both (n,)."""
    has_target = torch.zeros_like(mask)
    has_target[:, :-1] = real[:, 1:]
    return ids.roll(-1, dims=1)[mask], has_target[mask]


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    def look(x: Tensor) -> Tensor:
        seen[name] = x.clone()  # some models write into it afterwards
        return x

    return look


def _put(replacement: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(mask[..., None], replacement, x)


def _progress(n_done: int, n_contexts: int, stage: str) -> Progress:
    return Progress(fraction=n_done / n_contexts, stage=f"evaluating: {stage}", unit="tokens")
