"""Operations that look at all features of an SAE at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mistudio_engine.api.health import DictionaryHealth
from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.operations.datasets import Deleted, Limit
from mistudio_engine.api.records import ExtractionRecord, Page
from mistudio_engine.api.refs import SAERef, TemplateRef

__all__ = [
    "DeleteExtraction",
    "Extract",
    "Extracted",
    "ListExtractions",
    "ShowExtraction",
    "ShowHealth",
    "UseExtraction",
]

ExtractionName = Annotated[str, Field(min_length=1, max_length=200)]


class Extracted(ExtractionRecord):
    """What came of it."""

    also: list[ExtractionRecord] = []
    """Of the further SAEs, in their order."""


class Extract(JobOperation[Extracted], route="POST /features/extraction"):
    """Look at every feature of an SAE in one pass over text: how often and how strongly it fires, on which tokens, with
    which other features, with examples and histograms, and the tokens that it promotes.

    Label the features next (label_features), then search them (search_features).
    """

    sae: SAERef
    also: Annotated[list[SAERef], Field(max_length=64)] = []
    """Further SAEs of the same model, of any hooks: the model reads the text once for all of them."""

    dataset: str | None = None
    """Dataset or tokenisation; by default the one it was trained on."""

    n_tokens: Annotated[int, Field(ge=256)] | None = None
    """At most this many tokens, in contexts chosen at random; all by default."""

    features: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Only these; all by default. Not together with `also`."""

    n_examples: Annotated[int, Field(ge=1, le=100)] = 20
    """Contexts with the strongest activations kept for each feature."""

    n_quantiles: Annotated[int, Field(ge=1, le=16)] = 5
    """Equal parts of [0, maximum] that examples are drawn from."""

    n_per_quantile: Annotated[int, Field(ge=0, le=50)] = 5
    """Examples from each."""

    n_random: Annotated[int, Field(ge=0, le=50)] = 5
    """Contexts drawn from those in which a feature fires."""

    n_zero: Annotated[int, Field(ge=5, le=50)] = 5
    """Contexts drawn from those in which it never does; fewer only where there are not so many."""

    n_top_tokens: Annotated[int, Field(ge=1, le=500)] = 50
    """Tokens kept by count, by mean and by maximum."""

    n_partners: Annotated[int, Field(ge=0, le=200)] = 20
    """Features kept that fire on the same tokens most; pairs are counted on a sample of the tokens."""

    min_activation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Smaller activations count as none."""

    exclude_special: bool = True
    """Leave BOS, EOS and other special tokens out of everything."""

    exclude_tokens: Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=1000)] = []
    """Leave these tokens out as well, with and without a space in front."""

    exclude_first: Annotated[int, Field(ge=0)] = 0
    """Leave so many positions at the beginning of each context out."""

    window: Annotated[int, Field(ge=0, le=4096)] = 12
    """Tokens shown before and after the prime one unless somebody says how many; whole contexts are kept."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """For the choice of contexts and the quantile and random examples."""

    template: TemplateRef | None = None
    """Template whose arguments count where none is given here."""

    @model_validator(mode="after")
    def _fits_together(self) -> Extract:
        if self.also and self.features is not None:
            raise ValueError("features are of one SAE; leave features out, or extract the others by themselves")
        if len({self.sae, *self.also}) <= len(self.also):
            raise ValueError("an SAE is named twice; name each once")
        return self


class ListExtractions(Operation[Page[ExtractionRecord]], route="GET /extractions"):
    """List extractions, newest first."""

    sae: SAERef | None = None
    limit: Limit = 50
    cursor: str | None = None


class ShowExtraction(Operation[ExtractionRecord], route="GET /extractions/{extraction}"):
    """One extraction's record: how many features live, are dense or dead, how many fire on a token."""

    extraction: ExtractionName


class ShowHealth(Operation[DictionaryHealth], route="GET /saes/{sae}/health"):
    """How healthy an SAE's dictionary is: dead, dense and rare features, near twins, how often features fire, how well
    the text tells where they do, how sure their labels are.
    """

    sae: SAERef


class UseExtraction(JobOperation[ExtractionRecord], route="POST /extractions/{extraction}/use"):
    """Make an earlier extraction its SAE's current one, which cards, search and labels speak of."""

    extraction: ExtractionName


class DeleteExtraction(Operation[Deleted], route="DELETE /extractions/{extraction}"):
    """Delete an extraction with all that was derived from it. Labels stay; search forgets the SAE if it was current."""

    extraction: ExtractionName
