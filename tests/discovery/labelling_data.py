"""Evidence for the tests of labelling by a language model: small contexts whose every word is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mistudio_engine.discovery.extraction_store import Example, FeatureStats
from mistudio_engine.discovery.labelling.labeller import Evidence, is_held_out
from mistudio_engine.discovery.labelling.patient_chat import PatientChat
from mistudio_engine.discovery.labelling.prompts import Place, Prompt

WORDS = ["<s>", " the", " cat", " dog", " sat", " on", " a", " mat", "\n", " «quoted»", " red", " ran"]
ID = {word.strip(): at for at, word in enumerate(WORDS)}
PLACE = Place(sae="tiny-sae", model="tiny", hook="blocks.2.hook_resid_post", layer=2, categories=["Animal > Cat"])


def strings(ids: Iterable[int]) -> list[str]:
    """Text of each id: the words above, and one of its own for each further id."""
    return [WORDS[i] if i < len(WORDS) else f" word{i}" for i in ids]


def example(
    context: int, ids: Sequence[int], values: Sequence[float], group: Any = "top", position: int | None = None
) -> Example:
    """A whole context."""
    acts = np.array(values, dtype=np.float32)
    at = int(acts.argmax()) if position is None else position
    return Example(0, group, context, at, float(acts[at]), None, 0, np.array(ids, dtype=np.int32), acts)


def cats(feature: int = 0, n_contexts: int = 24, *, word: str = "cat") -> Evidence:
    """A feature that fires on one word, more strongly in earlier contexts, and not at all in every fourth."""
    explain, score = [], []
    for context in range(n_contexts):
        # A word of its own says which context is shown.
        ids = [0, ID["the"], ID[word], ID["sat"], 1000 + context]
        strength = 0.0 if context % 4 == 3 else 10.0 - 0.1 * context
        made = example(context, ids, [0, 0, strength, 0, 0], "zero" if strength == 0 else "top", 2)
        (score if is_held_out(context) else explain).append(made)
    n_active = sum(bool(each.values.max() > 0) for each in explain + score)
    return Evidence(FeatureStats(feature, n_active, 0.1, 10.0, 9.0, 9.0 * n_active), explain, score)


def prompt(**settings: Any) -> Prompt:
    """The default prompt, with other settings where some are given."""
    return Prompt(strings, PLACE, **settings)


def patient(server: Any, **settings: Any) -> PatientChat:
    """A chat whose waits are short."""
    return PatientChat(server, **{"first_backoff_seconds": 0.01, "seed": 0, **settings})
