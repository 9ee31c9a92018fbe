"""How well labels foretell where their features fire, as it travels: one method's score, and a scoring job's report."""

from __future__ import annotations

from typing import Any, Literal

from mistudio_engine.api.records import Data

__all__ = ["BaselineScore", "Distribution", "MethodScore", "ScoringMethod", "ScoringReport"]

ScoringMethod = Literal["detection", "fuzzing"]
"""detection: in which of some texts does the feature fire? fuzzing: are the marked tokens those on which it fires?"""


class BaselineScore(Data):
    """What a text that was not made for the feature scores on the same items."""

    text: str
    """What the judge was told in the label's place. Words from the dataset in it are data."""

    feature: int | None = None
    """Of which feature it is the label; None for the top token's."""

    balanced_accuracy: float | None = None
    """None where too few of its items were answered."""

    low: float | None = None
    high: float | None = None

    n_paired: int = 0
    """Items that were answered both for the label and for this one."""

    lead: float | None = None
    """The label's balanced accuracy less this one's, both on those items; None where there are too few."""

    lead_low: float | None = None
    """Beginning of the lead's 95 % interval: above 0 where the label is better beyond chance."""

    lead_high: float | None = None


class MethodScore(Data):
    """How well a label did by one method, on contexts that it was not made from."""

    method: ScoringMethod
    balanced_accuracy: float
    """Mean of recall and specificity: 1 is perfect, 0.5 is chance, 0 is perfectly wrong."""

    low: float
    """Beginning of its 95 % interval, from a bootstrap over contexts."""

    high: float
    recall: float
    """Share of the items with the feature that were found."""

    specificity: float
    """Share of the items without it that were left out."""

    n_positive: int
    """Items with the feature that were answered."""

    n_negative: int
    n_contexts: int
    """Contexts that the answered items come from."""

    negatives: dict[str, int] = {}
    """Items without the feature that were shown, by how they were chosen: random, decoder, similar, wrong_tokens."""

    similar_by: str | None = None
    """What found similar texts: an embedder's name, or shared rare words."""

    scorer: str
    """Who judged: `token_pattern` (the label's own rule) or the language model."""

    n_questions: int = 0
    """What the language model was asked for the label itself."""

    n_unparsed: int = 0
    """Answers that were not of the form asked for. Their items are left out, never guessed."""

    n_unanswered: int = 0
    """Questions to which no answer came."""

    n_prompt_tokens: int = 0
    """Of all questions, the baselines' as well."""

    n_completion_tokens: int = 0
    parse_failure_rate: float = 0.0
    """n_unparsed over the answers that came; 0 to 1."""

    baselines: dict[str, BaselineScore] = {}
    """other_label and top_token, on the same items."""

    beats_baselines: bool | None = None
    """Above all of them; None where one could not be scored."""

    verdict: str
    """The result in a sentence."""

    job: str
    """Slug of the job that scored it."""

    extraction: str
    """Slug of the extraction that the items are from."""

    seed: int = 0


class Distribution(Data):
    """Numbers in short."""

    n: int
    mean: float
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float
    histogram: list[int]
    """Counts in ten equal bins of [0, 1]."""


class ScoringReport(Data):
    """What a scoring job did."""

    sae: str
    status: Literal["completed", "max_usd_reached", "stopped"] = "completed"
    """Whether it came to the end; if not, `n_left` labels were not scored."""

    scorer: str
    """Who judged, such as token_pattern or openai/gpt-4o-mini."""

    n_scored: int
    n_left: int = 0
    n_failed: int = 0
    failures: dict[str, int] = {}
    """Reasons, with how many features each."""

    left_out: dict[str, dict[str, int]] = {}
    """By method: labels that only the other method could score, by reason."""

    failed: list[dict[str, Any]] = []
    """Some of those that have no score, or none by one `method`: feature, reason, and a sentence on it."""

    balanced_accuracy: dict[str, Distribution] = {}
    """Of the labels, by method."""

    baselines: dict[str, dict[str, Distribution]] = {}
    """By method, then of another feature's labels and of the top tokens."""

    n_beat_baselines: dict[str, int] = {}
    """By method: labels above both baselines."""

    n_level_with_top_token: dict[str, int] = {}
    """By method: labels that do as well as their top token alone, and no better."""

    n_questions: int = 0
    """Of a language model about the labels, the baselines not counted."""

    usd: float | None = None
    """What the whole job has cost, in US dollars; None where nobody said the prices."""

    parse_failure_rate: float = 0.0
    """Answers that were not of the form asked for, over all that came; 0 to 1."""

    negatives: dict[str, int] = {}
    """Items of all features without the feature, by how they were chosen."""

    samples: list[dict[str, Any]] = []
    """Some features with what became of them, the best first."""
