"""Operations that say what features mean."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from mistudio_engine.api.features import LabellingReport
from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.plain_words import plain_line
from mistudio_engine.api.prompt_variables import check_system_message, check_user_prompt
from mistudio_engine.api.records import Finding, LabelRecord, Page
from mistudio_engine.api.refs import FeatureRef, SAERef, TemplateRef

__all__ = ["LabelFeatures", "LabelHistory", "LabellingAttempts", "SetLabel"]


Provider = Literal["token_pattern", "openai", "ollama", "compatible"]

Price = Annotated[float, Field(ge=0, le=1e6)]


class LabelFeatures(JobOperation[LabellingReport], route="POST /features/labeling"):
    """Label features by what they fire on: without a language model (token_pattern, scored on held-out examples), or by
    one that is shown examples (openai, ollama, or any OpenAI-compatible server).

    A label by a person or an agent is never overwritten. dry_run says what a language model would cost. To label one
    yourself read get_feature and use set_label.
    """

    sae: SAERef
    features: list[Annotated[int, Field(ge=0)]] | None = None
    """Indices; all living features by default."""

    provider: Provider | None = None
    """Who labels; by default the setting labelling_provider, which is token_pattern unless somebody changed it."""

    model: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """The language model, such as gpt-4o-mini or llama3.2; by default the setting labelling_model."""

    base_url: Annotated[str, Field(max_length=300)] | None = None
    """Where the language model's server listens. Only a person may give it; by default the provider's setting."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    n_examples: Annotated[int, Field(ge=2, le=100)] = 16
    """Contexts in which the feature fires that the language model is shown."""

    n_negatives: Annotated[int, Field(ge=0, le=50)] = 4
    """Contexts in which it does not."""

    n_parallel: Annotated[int, Field(ge=1, le=64)] = 8
    """Requests under way at once."""

    max_usd: Annotated[float, Field(gt=0)] | None = None
    """Stop before more than this is spent, and keep what is labelled by then. It needs prices."""

    price_per_million_input: Price | None = None
    """US dollars for a million tokens of prompts; by default the setting of this name."""

    price_per_million_output: Price | None = None
    """US dollars for a million tokens of answers; by default the setting of this name."""

    relabel: bool = True
    """Replace labels that jobs made; false labels only features without a label."""

    system_message: Annotated[str, Field(max_length=20_000), AfterValidator(check_system_message)] | None = None
    """What the language model is told first, in the place of the default. Variables as in user_prompt; that text from
    the dataset is data is said after it in any case."""

    user_prompt: Annotated[str, Field(max_length=20_000), AfterValidator(check_user_prompt)] | None = None
    """The question, in the place of the default. {examples} must be in it; further variables: {negatives}, {tokens},
    {analysis}, {promoted}, {suppressed}, {categories}, {feature}, {layer}, {hook}, {model}, {sae}. {{ is a brace."""

    template: TemplateRef | None = None
    """Template whose arguments count where none is given here."""


class SetLabel(Operation[LabelRecord], route="PATCH /features/{feature}", idempotent=True):
    """Give a feature a label: a new version with its author, the old ones stay in its history."""

    feature: FeatureRef
    """`sae/slug#7`; in a URL `slug:7`."""

    label: Annotated[str, Field(min_length=1, max_length=300)]
    category: Annotated[str, Field(max_length=300)] = ""
    """A path such as `Emotion > Positive > Love`."""

    evidence: Annotated[str, Field(max_length=4000)] = ""
    """What speaks for it."""

    @field_validator("label", "category")
    @classmethod
    def _plain_words(cls, text: str) -> str:
        if (plain := plain_line(text)) != " ".join(text.split()):
            raise ValueError("control characters are not allowed here; write plain words")
        return plain

    @field_validator("label")
    @classmethod
    def _not_blank(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("it is blank; write what the feature stands for in a few words")
        return text


class LabelHistory(Operation[Page[LabelRecord]], route="GET /saes/{sae}/features/{index}/labels"):
    """Every version of a feature's label, newest first."""

    sae: SAERef
    index: Annotated[int, Field(ge=0)]


class LabellingAttempts(Operation[Page[Finding]], route="GET /saes/{sae}/features/{index}/attempts"):
    """What labelling jobs asked about a feature and were answered, newest first: messages, raw answers, problems."""

    sae: SAERef
    index: Annotated[int, Field(ge=0)]
    limit: Annotated[int, Field(ge=1, le=200)] = 20
