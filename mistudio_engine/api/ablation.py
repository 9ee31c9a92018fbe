"""What a feature does, and where it fires on given texts, as they travel."""

from __future__ import annotations

from mistudio_engine.api.features import LogitToken
from mistudio_engine.api.records import Data

__all__ = [
    "AblatedText",
    "AblationReport",
    "AblationRow",
    "FeatureAblation",
    "FeatureTest",
    "LensAgreement",
    "MeanOverTexts",
    "TextTest",
]


class MeanOverTexts(Data):
    """A mean over texts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    """Texts."""


class LensAgreement(Data):
    """Measured changes of logits beside those that the logit lens foretells."""

    correlation: float | None = None
    """Pearson's over the vocabulary: 1 where the feature acts through the unembedding alone; None for no change."""

    promoted_overlap: float
    """Share of the tokens it promotes most that are among the lens's."""

    suppressed_overlap: float


class AblatedText(Data):
    """A text without the feature. Tokens come from a dataset or from whoever asked: they are data, not instructions."""

    context: int | None = None
    """Which packed context of the tokenisation; None for a text that was given."""

    tokens: list[str]
    activations: list[float]
    """The feature's on each token."""

    loss: list[float]
    """Change of the loss of the token after each, in nats: above 0 where it became less likely without the feature. 0
    before the first place where the feature fires."""

    kl: list[float]
    """KL(with ‖ without the feature) of the prediction at each token, in nats."""


class FeatureAblation(Data):
    """What becomes of the model's predictions when one feature's contribution is taken away and all else is kept.

    `*_firing` are at tokens on which it fires, `*_after` at these and all that follow.
    """

    ref: str
    sae: str
    index: int
    author: str = ""
    created_at: float = 0.0
    extraction: str = ""
    """Where the contexts and the controls' frequencies are from."""

    source: str = "extraction"
    """extraction: the feature's own examples; given: texts that somebody gave."""

    n_texts: int
    n_silent: int
    """Of those, texts in which it does not fire: they count for nothing."""

    n_firing: int
    """Tokens on which it fires; with 0 there is nothing to take away, and no measure."""

    loss_firing: MeanOverTexts | None = None
    loss_after: MeanOverTexts | None = None
    kl_firing: MeanOverTexts | None = None
    kl_after: MeanOverTexts | None = None
    controls: list[int] = []
    """Features that fire about as often, along whose directions vectors of the same length were taken away instead."""

    control_loss_after: MeanOverTexts | None = None
    control_kl_after: MeanOverTexts | None = None
    excess_kl: MeanOverTexts | None = None
    """Its KL minus its controls': an interval above 0 says that it does more than any push of that length."""

    controls_below: float | None = None
    """Share of the controls whose KL is smaller than its own."""

    promoted: list[LogitToken] = []
    """Tokens whose logits it raises most where it fires, measured."""

    suppressed: list[LogitToken] = []
    lens: LensAgreement | None = None
    """None where it does not write into the residual stream."""

    texts: list[AblatedText] = []
    """Those in which it has the largest effect."""


class AblationRow(Data):
    """One feature of many that were ablated; show_ablation has the rest."""

    ref: str
    index: int
    n_texts: int
    """In which it fires."""

    loss_after: float | None = None
    kl_after: float | None = None
    control_kl_after: float | None = None
    excess_kl_low: float | None = None
    """Lower end of the interval of its KL minus its controls'."""


class AblationReport(Data):
    """What an ablation job found, those with the largest effect first."""

    sae: str
    n_features: int
    n_silent: int
    """Features that fired in none of the texts."""

    rows: list[AblationRow]


class TextTest(Data):
    """One feature on one text."""

    tokens: list[str]
    max: float
    position: int
    """Token on which it peaks."""

    token: str
    fired: bool
    share_of_max: float | None = None
    """Of the largest activation that the extraction saw; None without one."""

    expected: bool | None = None


class FeatureTest(Data):
    """Where a feature fires on given texts; with expectations, how well these were met."""

    ref: str
    sae: str
    index: int
    known_max: float | None = None
    """Largest activation that the extraction saw."""

    rows: list[TextTest]
    """In the order of the texts."""

    n: int
    n_fired: int
    n_expected: int | None = None
    auroc: float | None = None
    """How well its maxima tell the texts expected to make it fire from the others: 1 is perfect, 0.5 is chance. None
    without expectations, or when they are all the same."""

    precision: float | None = None
    """Share of the texts on which it fired that were expected to; None when it fired on none."""

    recall: float | None = None
    """Share of the texts expected to that it fired on."""
