"""Operations on what a feature does to the model, and where it fires on given texts."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from mistudio_engine.api.ablation import AblationReport, FeatureAblation, FeatureTest
from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.operations.on_text import Text
from mistudio_engine.api.refs import FeatureRef, SAERef

__all__ = ["AblateFeatures", "ShowAblation", "TestFeature"]


class AblateFeatures(JobOperation[AblationReport], route="POST /features/ablation"):
    """Measure what features do: take each one's contribution away where it fires, keep everything else, and see how the
    model's predictions change, beside controls of the same length.

    It needs an extraction. The whole answer for a feature is show_ablation's.
    """

    sae: SAERef
    features: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=64)]
    texts: Annotated[list[Text], Field(min_length=1, max_length=64)] | None = None
    """Measure on these instead of on each feature's own examples."""

    n_contexts: Annotated[int, Field(ge=1, le=128)] = 16
    """At most this many of each feature's examples, strongest ones and ones from all levels in turns."""

    n_after: Annotated[int, Field(ge=0, le=512)] = 32
    """Tokens of a context to look at after its strongest one."""

    n_controls: Annotated[int, Field(ge=0, le=16)] = 4
    """Other features to compare each with."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """For the choice of controls, and the intervals."""

    @model_validator(mode="after")
    def _one_source(self) -> AblateFeatures:
        # What is stored of a call has every field, so what differs from its default counts as given.
        fields = type(self).model_fields
        extra = [name for name in ("n_contexts", "n_after") if getattr(self, name) != fields[name].default]
        if self.texts is not None and extra:
            named = " and ".join(extra)
            raise ValueError(f"{named} choose among examples; leave them out when texts are given")
        return self


class ShowAblation(Operation[FeatureAblation], route="GET /saes/{sae}/features/{index}/ablation"):
    """What the latest ablation of a feature found: change of loss and KL beside its controls, measured changes of
    logits beside the logit lens, and the texts token by token."""

    sae: SAERef
    index: Annotated[int, Field(ge=0)]


class TestFeature(Operation[FeatureTest], route="POST /features/{feature}/test", effect="read"):
    """Run one feature on texts of your own: where it peaks and whether it fires; with what you expected of each, how
    well that fits. A good description separates the texts perfectly."""

    __test__: ClassVar[bool] = False  # its name is a tool's, not a test's

    feature: FeatureRef
    """`sae/slug#7`; in a URL `slug:7`."""

    texts: Annotated[list[Text], Field(min_length=1, max_length=64)]
    expected: Annotated[list[bool], Field(max_length=64)] | None = None
    """For each text whether it should fire."""

    min_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """It counts as fired from this share of its known maximum on; with 0 from anything above zero."""

    @model_validator(mode="after")
    def _an_expectation_for_each(self) -> TestFeature:
        if self.expected is not None and len(self.expected) != len(self.texts):
            raise ValueError(f"expected has {len(self.expected)} entries for {len(self.texts)} texts; give one each")
        return self
