"""Generation: prompts in, continuations out, a token a step, with or without interventions.

A loop of our own rather than transformers' `generate`, because it is a generator: between two steps anything else may
use the model, so hooks are installed within a step only and the random numbers are the sampler's. Greedy it gives
`generate`'s tokens. It knows what is changed (interventions.py) but not why, and judges no text.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Literal, NamedTuple, cast

from mistudio_engine.api.errors import BadInput, EmptyData
from mistudio_engine.models.language_model import LanguageModel
from mistudio_engine.steering.batch import Batch
from mistudio_engine.steering.interventions import Intervention, check
from mistudio_engine.steering.sampling import Sampler, Sampling
from mistudio_engine.steering.text_stream import TextStream

__all__ = ["Generation", "Prompt", "TokenStep", "check_token_ids", "eos_ids", "generate", "prompt_ids"]

FinishReason = Literal["eos", "stop", "length"]

Prompt = str | Sequence[int]
"""Text, or token ids where the caller did the tokenising (a chat template)."""

N_READ_TOKENS = 1024
"""Prompt tokens read in one step, over all rows together: a long prompt is read in pieces, so a step stays short."""


class TokenStep(NamedTuple):
    """One step of the work; row r is sample r % n of prompt r // n."""

    stage: Literal["reading", "writing", "scoring"]
    """Reading the prompt, writing a token, or scoring what was written (compare and sweep only)."""

    index: int
    """Steps of this stage done before this one."""

    n_steps: int
    """At most this many in this stage."""

    token_ids: tuple[int | None, ...] = ()
    """Each row's new token while writing; None where the row is finished."""

    pieces: tuple[str, ...] = ()
    """The text that each row's new token completed."""


@dataclass(frozen=True)
class Generation:
    """One continuation."""

    prompt: int
    """Index of the prompt."""

    sample: int
    """Which of its samples."""

    prompt_ids: tuple[int, ...]

    token_ids: tuple[int, ...]
    """What was generated, the ending EOS included."""

    text: str
    """Its text as it follows the prompt's, special tokens left out, cut before a stop sequence."""

    finish_reason: FinishReason
    """The model ended it, a stop sequence did, or max_new_tokens."""


def generate(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    interventions: Sequence[Intervention] = (),
    sampling: Sampling | None = None,
    cache: bool = True,
    bos: bool = True,
) -> Generator[TokenStep, None, list[Generation]]:
    """Continue prompts, all of them in one batch; closing the generator cancels.

    Args:
        prompts: texts or token ids, of any lengths.
        interventions: a strength per row means one per prompt; the samples of a prompt share it.
        cache: keep keys and values; without, everything is computed again at each step.
        bos: begin texts with the model's BOS token, if it has one; token ids are taken as they are.

    Returns:
        The continuations by prompt, then by sample. Greedy they equal transformers' `generate`, token for token; the
        same seed gives the same random numbers whatever else is in the batch.

    Raises:
        EmptyData: no prompt, or one without tokens.
        BadInput: prompt and max_new_tokens together do not fit the model's context, a token id outside the
            vocabulary, or (while generating) logits that are not numbers.
        UnknownHook, WrongShape: an intervention does not fit the model or the batch.
    """
    sampling = sampling or Sampling()
    ids = [prompt_ids(lm, prompt, bos=bos) for prompt in _listed(prompts)]
    if not ids:
        raise EmptyData("There is no prompt to continue.", fix="Give at least one prompt.")
    check(lm, interventions, len(ids))
    longest = max(len(i) for i in ids)
    if longest + sampling.max_new_tokens > lm.n_ctx:
        raise BadInput(
            f"A prompt of {longest} tokens and {sampling.max_new_tokens} new ones do not fit the context of "
            f"{lm.n_ctx} tokens of {lm.name}.",
            fix=f"Shorten the prompt, or set max_new_tokens to at most {lm.n_ctx - longest}.",
        )
    return _generate(lm, ids, [it.repeated(sampling.n) for it in interventions], sampling, cache)


def prompt_ids(lm: LanguageModel, prompt: Prompt, *, bos: bool = True) -> list[int]:
    """A prompt's tokens.

    Raises:
        EmptyData: there are none.
        BadInput: an id outside the vocabulary, or more tokens than the model's context holds.
    """
    ids = lm.encode(prompt, bos=bos) if isinstance(prompt, str) else [int(token_id) for token_id in prompt]
    if not ids:
        raise EmptyData("A prompt has no tokens.", fix="Give text, or let it begin with BOS (bos=True).")
    if len(ids) > lm.n_ctx:
        raise BadInput(
            f"A prompt of {len(ids)} tokens does not fit the context of {lm.n_ctx} tokens of {lm.name}.",
            fix=f"Shorten it to less than {lm.n_ctx} tokens.",
        )
    check_token_ids(lm, ids)
    return ids


def check_token_ids(lm: LanguageModel, token_ids: Sequence[int]) -> None:
    """Every id is in the vocabulary, else BadInput: on a GPU one outside it would end the process."""
    for token_id in token_ids:
        if not 0 <= token_id < lm.d_vocab:
            raise BadInput(
                f"Token id {token_id} is outside the vocabulary of {lm.name}.",
                fix=f"Ids go from 0 to {lm.d_vocab - 1}.",
            )


def eos_ids(lm: LanguageModel) -> frozenset[int]:
    """The tokens that end a text, as the model's generation settings have them, else as its tokenizer has them."""
    settings = getattr(lm.hf, "generation_config", None)
    found: Any = getattr(settings, "eos_token_id", None)
    found = lm.tokenizer.eos_token_id if found is None else found
    return frozenset([found] if isinstance(found, int) else found or ())


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))
    return [cast(Prompt, prompts)] if is_one else list(cast("Sequence[Prompt]", prompts))


def _generate(
    lm: LanguageModel, prompts: list[list[int]], interventions: list[Intervention], sampling: Sampling, cache: bool
) -> Generator[TokenStep, None, list[Generation]]:
    rows = [ids for ids in prompts for _ in range(sampling.n)]
    batch, sampler, eos = Batch(lm, rows, cache=cache), Sampler(sampling), eos_ids(lm)
    streams = [TextStream(partial(_text, lm), ids, sampling.stop_sequences) for ids in rows]
    written: list[list[int]] = [[] for _ in rows]
    reasons: dict[int, FinishReason] = {}

    per_step = max(1, N_READ_TOKENS // len(rows)) if cache else batch.prompt_width
    ends = [*range(per_step, batch.prompt_width, per_step), batch.prompt_width]
    for index, end in enumerate(ends[:-1]):
        batch.read(end, interventions)
        yield TokenStep("reading", index, len(ends))
    for index in range(sampling.max_new_tokens):
        logits = batch.read(batch.tokens.shape[1], interventions)[:, -1]
        if logits.isnan().any():
            raise BadInput(
                f"The model's logits are not numbers after {index} tokens.",
                fix="Lower the strength, or load the model in fp32: half precision overflows sooner.",
            )
        chosen = sampler.choose(logits, batch.tokens.to(logits.device))
        batch.append(chosen[:, None])
        new: list[int | None] = [None] * len(rows)
        pieces = [""] * len(rows)
        for row, token_id in enumerate(chosen.tolist()):
            if row in reasons:
                continue  # the row is still computed with the others; what it says is nobody's
            new[row] = token_id
            written[row].append(token_id)
            pieces[row] = "" if token_id in eos else streams[row].push(token_id)
            at_end = token_id in eos or index + 1 == sampling.max_new_tokens
            if at_end:
                pieces[row] += streams[row].finish()
            if streams[row].stopped or at_end:
                reasons[row] = "stop" if streams[row].stopped else "eos" if token_id in eos else "length"
        yield TokenStep("writing", index, sampling.max_new_tokens, tuple(new), tuple(pieces))
        if len(reasons) == len(rows):
            break
    return [
        Generation(
            row // sampling.n, row % sampling.n, tuple(ids), tuple(written[row]), streams[row].text, reasons[row]
        )
        for row, ids in enumerate(rows)
    ]


def _text(lm: LanguageModel, ids: list[int]) -> str:
    return lm.decode([token_id for token_id in ids if token_id not in lm.special_ids])
