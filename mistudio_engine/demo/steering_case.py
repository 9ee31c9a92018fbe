"""The steering that is known to work on the demo model, and how to tell that it did.

The feature that carries *a text about cooking* (`concept_scores` names it) is added to neutral text set at home; then
words for food become several times as probable, the text stays about as likely to the unsteered model, and a random
feature of the same length does nothing of the kind. It knows words and numbers, no model and no dictionary.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from mistudio_engine.demo.lexicon import ADJECTIVES, NOUNS, VERBS, WORDS

__all__ = ["SteeringCase", "concept_tokens", "steering_case"]


class SteeringCase(NamedTuple):
    """What to steer along, from where, how far, and what to count."""

    concept: str
    """The concept whose single feature is the direction: contextual, as the feature of a word says what comes after it
    rather than the word."""

    target: str
    """The lexical concept whose probability it raises."""

    tokens: tuple[str, ...]
    """The tokens of the target; their probabilities are summed."""

    prompts: tuple[str, ...]
    """Neutral beginnings, each to be continued; measures are means over all of them."""

    strength: float
    unit: Literal["norm"]
    """Strength is times the median norm of the activations at `DEMO_HOOK`, along a unit vector, at all positions."""

    max_new_tokens: int
    temperature: float


def concept_tokens(concept: str) -> tuple[str, ...]:
    """The tokens, with the space before them, of the words of a lexical concept.

    Raises `ValueError` for a contextual concept, which has no words of its own.
    """
    if concept in NOUNS:
        forms = {form for noun in NOUNS[concept] for form in noun}
    elif concept in ADJECTIVES:
        forms = set(ADJECTIVES[concept])
    elif concept == "motion":
        forms = {form for verb in VERBS["motion"] for form in verb}
    elif concept == "number":
        forms = set(WORDS["number"])
    else:
        raise ValueError(f"{concept!r} has no words of its own. Name a lexical concept of CONCEPTS, such as 'food'.")
    return tuple(f" {form}" for form in sorted(forms))


def steering_case() -> SteeringCase:
    """Cooking raises food."""
    return SteeringCase(
        concept="cooking",
        target="food",
        tokens=concept_tokens("food"),
        prompts=(
            "At home last winter the farmer",
            "At home today the old teacher",
            "At home tomorrow another dog",
            "At home next Monday she",
            "At home every evening the painter",
            "At home yesterday Anna",
            "At home last Friday some wolves",
            "At home next summer Victor",
            "At home today he",
            "At home every week this nurse",
        ),
        strength=0.8,
        unit="norm",
        max_new_tokens=32,
        temperature=0.0,
    )
