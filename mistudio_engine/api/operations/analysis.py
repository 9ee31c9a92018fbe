"""Operations on what the words of features have in common, and a map of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mistudio_engine.api.analysis import AnalysisReport, FeatureAnalysis, FeatureMap, MapReport
from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.refs import SAERef, TemplateRef

__all__ = ["AnalyseFeatures", "MapFeatures", "ShowAnalysis", "ShowMap"]

PipelineName = Annotated[str, Field(min_length=1, max_length=1000)]
Index = Annotated[int, Field(ge=0)]
NExamples = Annotated[int, Field(ge=1, le=1000)]
What = Literal["decoder", "labels"]
Method = Literal["umap", "pca"]


class AnalyseFeatures(JobOperation[AnalysisReport], route="POST /features/analysis"):
    """Say of features what the words that they fire on have in common: parts of speech, lemmas, entities, groups, what
    stands before and after, where they stand, each share against text on which they are silent.

    Read them with show_analysis; labelling prompts can use them.
    """

    sae: SAERef
    features: list[Index] | None = None
    """Indices; all living features by default."""

    pipeline: PipelineName | None = None
    """spaCy pipeline: an installed package such as en_core_web_sm, blank:en or another language's code, or (given by a
    person) a folder that spaCy wrote. By default the setting nlp_pipeline, else blank:xx, which knows no grammar."""

    n_examples: NExamples = 50
    """At most this many examples of each kind (top, quantile, random, zero) for a feature."""

    template: TemplateRef | None = None
    """Template whose arguments count where none is given here."""


class ShowAnalysis(Operation[FeatureAnalysis], route="GET /saes/{sae}/features/{index}/analysis"):
    """What the words that a feature fires on have in common; computed at once where it is not kept."""

    sae: SAERef
    index: Index
    pipeline: PipelineName | None = None
    """As in analyse_features; by default whichever the kept one was made with."""

    n_examples: NExamples = 50
    """At most this many examples of each kind, where it is computed."""


class MapFeatures(JobOperation[MapReport], route="POST /features/map"):
    """Lay out the living features on a plane so that alike ones are near one another, and keep the map with the
    extraction. See it with show_map.
    """

    sae: SAERef
    what: What = "decoder"
    """What makes features alike: the direction of their decoder rows, or the meaning of their labels."""

    method: Method = "umap"
    """umap keeps neighbours together; pca shows the two directions of largest variance, and takes no time."""

    n_neighbors: Annotated[int, Field(ge=2, le=200)] = 15
    """UMAP: how many neighbours shape a feature's surroundings."""

    min_dist: Annotated[float, Field(ge=0, le=1)] = 0.1
    """UMAP: how near points may lie."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """UMAP: the same seed gives the same map."""

    template: TemplateRef | None = None
    """Template whose arguments count where none is given here."""


class ShowMap(Operation[FeatureMap], route="GET /saes/{sae}/map"):
    """Features on a plane with their labels and how often they fire, in columns."""

    sae: SAERef
    what: What = "decoder"
    method: Method | None = None
    """By default whichever there is, umap first."""

    category: str | None = None
    """Only features whose category begins with this."""

    labelled: bool | None = None
    """Only features with a label, or only those without."""

    min_frequency: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Only features that fire on at least this share of the tokens."""

    max_frequency: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Only features that fire on at most this share of the tokens."""

    limit: Annotated[int, Field(ge=1, le=200_000)] = 5000
    cursor: str | None = None
