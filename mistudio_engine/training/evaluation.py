"""An SAE against the model it was made for: reconstruction and sparsity on real text, and what splicing it in costs.

Works for any SAE, trained here or not. The formulas are in metrics.py; this file runs the model, adds up and divides.
It does not know what is done with the result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor

from mistudio_engine.api.errors import EmptyData, WrongShape
from mistudio_engine.api.events import Progress
from mistudio_engine.api.records import Evaluation
from mistudio_engine.models.hooks import check_hook, edit, hook_width
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.models.tokens import PackedTokens
from mistudio_engine.saes import SAE
from mistudio_engine.training import metrics

__all__ = ["evaluate"]

_MOST_NUMBERS = 1 << 26
"""In one (n, d_sae) matrix of activations, and in one (n, d_vocab) of logits: 256 MiB in fp32."""

_MOST_CONTEXTS = 8

_DENSE = 0.1
"""A feature that fires on more than this share of tokens counts as dense."""


@torch.no_grad()
def evaluate(
    lm: LanguageModel,
    sae: SAE,
    tokens: PackedTokens,
    *,
    hook_name: str,
    n_tokens: int = 32_768,
    batch: int | None = None,
) -> Generator[Progress, None, Evaluation]:
    """Measure an SAE on the first contexts of a tokenisation.

    The model runs over each batch three times: clean; with the SAE's output in place of the activations; with zeros in
    their place. BOS, EOS, other special tokens and padding keep their activations and are left out of every average;
    the loss is counted where both the token and the one it predicts are text.

    Args:
        lm: the model.
        sae: an SAE for `hook_name`, or a transcoder from it to `sae.cfg.hook_name_out`.
        tokens: text.
        hook_name: where the SAE reads.
        n_tokens: about as many tokens, whole batches.
        batch: contexts at once; None for as many as the vocabulary's size allows, at most 8.

    Yields:
        Progress after each forward pass.

    Raises:
        UnknownHook: the model has no such hook.
        WrongShape: the SAE does not fit the hook.
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
    context_size = tokens.info.context_size
    batch = batch or max(1, min(_MOST_CONTEXTS, _MOST_NUMBERS // (context_size * lm.d_vocab)))
    n_contexts = min(len(tokens), max(batch, n_tokens // context_size))
    totals = _Totals(sae)
    for start in range(0, n_contexts, batch):
        rows = slice(start, min(start + batch, n_contexts))
        ids = tokens.ids[rows].long().to(lm.device)
        mask = tokens.mask(rows, special=False).to(lm.device)  # (batch, seq)
        both = mask[:, :-1] & mask[:, 1:]
        if not bool(mask.any()):
            continue
        seen: dict[str, Tensor] = {}
        with edit(lm, hook_name, _keep(seen, "in")), edit(lm, hook_out, _keep(seen, "out")):
            clean = lm.logits(ids)
        yield _progress(start, n_contexts, "clean")

        spliced = totals.reconstruct(sae, seen["in"], seen["out"], mask)
        yield _progress(start, n_contexts, "sae")
        totals.n_predictions += int(both.sum())
        targets = ids[:, 1:][both]
        clean = clean[:, :-1][both]  # (n, d_vocab)
        totals.add("ce_clean", metrics.cross_entropy(clean, targets))
        for name, replacement in (("sae", spliced), ("zero", torch.zeros_like(spliced))):
            with edit(lm, hook_out, _put(replacement, mask)):
                logits = lm.logits(ids)[:, :-1][both]
            totals.add(f"ce_{name}", metrics.cross_entropy(logits, targets))
            totals.add(f"kl_{name}", metrics.kl_div(clean, logits))
            yield _progress(start, n_contexts, name)
    return totals.evaluation()


class _Totals:
    """Sums over all batches, in float64."""

    def __init__(self, sae: SAE) -> None:
        self.n_tokens = 0
        self.n_predictions = 0
        self._sums: dict[str, float] = {}
        self._mean = torch.zeros(sae.cfg.output_width, dtype=torch.float64, device=sae.device)
        self._fired = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.device)

    def add(self, name: str, per_token: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(per_token.double().sum())

    def reconstruct(self, sae: SAE, x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The SAE's output (batch, seq, d_out) at the masked positions, zero elsewhere, measured on the way."""
        spliced = torch.zeros_like(target)
        inputs, targets = x[mask], target[mask]  # (n, d)
        outputs = torch.empty_like(targets)
        at_once = max(1, _MOST_NUMBERS // sae.cfg.d_sae)
        for at in range(0, len(inputs), at_once):
            part = slice(at, at + at_once)
            feature_acts = sae.encode(inputs[part])
            # The skip path of a transcoder is in the forward pass only.
            sae_out = (
                sae(inputs[part]) if "W_skip" in sae.cfg.tensor_shapes() else sae.decode(feature_acts, inputs[part])
            )
            outputs[part] = sae_out.to(targets.dtype)
            n = len(feature_acts)
            self._mean_of("l0", metrics.l0(feature_acts), n)
            self._fired += (feature_acts > 0).sum(dim=0)
        goal, found = targets.double(), outputs.double()
        for name, metric in (("mse", metrics.mse), ("cosine", metrics.cosine), ("l2_ratio", metrics.l2_ratio)):
            self._mean_of(name, metric(goal, found), len(goal))
        self._mean_of("legacy", metrics.explained_variance_legacy(goal, found), len(goal))
        self._mean_of("mean_square", goal.pow(2).sum(dim=-1).mean(), len(goal))
        self._mean += goal.sum(dim=0)
        self.n_tokens += len(goal)
        spliced[mask] = outputs
        return spliced

    def evaluation(self) -> Evaluation:
        """The averages.

        Raises:
            EmptyData: nothing was measured.
        """
        if not self.n_predictions:
            raise EmptyData(
                "There is nothing to evaluate on: no two tokens of text in a row.",
                why="BOS, EOS and padding are left out.",
                fix="Choose a tokenisation with longer texts.",
            )
        means = {
            name: total / self.n_tokens for name, total in self._sums.items() if not name.startswith(("ce_", "kl_"))
        }
        losses = {
            name: total / self.n_predictions for name, total in self._sums.items() if name.startswith(("ce_", "kl_"))
        }
        fvu = metrics.fvu(torch.tensor(means["mse"]), torch.tensor(means["mean_square"]), self._mean / self.n_tokens)
        density = self._fired / self.n_tokens
        return Evaluation(
            n_tokens=self.n_tokens,
            l0=means["l0"],
            fvu=float(fvu),
            explained_variance=float(metrics.explained_variance(fvu)),
            explained_variance_legacy=means["legacy"],
            mse=means["mse"],
            cosine=means["cosine"],
            l2_ratio=means["l2_ratio"],
            ce_loss_clean=losses["ce_clean"],
            ce_loss_sae=losses["ce_sae"],
            ce_loss_zero=losses["ce_zero"],
            ce_loss_score=metrics.ce_loss_score(losses["ce_clean"], losses["ce_sae"], losses["ce_zero"]),
            kl_div_score=metrics.kl_div_score(losses["kl_sae"], losses["kl_zero"]),
            dead_fraction=float(metrics.dead_fraction(density)),
            dense_fraction=float((density > _DENSE).float().mean()),
        )

    def _mean_of(self, name: str, mean: Tensor, n: int) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(mean) * n


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    def look(x: Tensor) -> Tensor:
        seen[name] = x.clone()  # some models write into it afterwards
        return x

    return look


def _put(replacement: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(mask[..., None], replacement, x)


def _progress(start: int, n_contexts: int, stage: str) -> Progress:
    return Progress(fraction=start / n_contexts, stage=f"evaluating: {stage}", unit="tokens")
