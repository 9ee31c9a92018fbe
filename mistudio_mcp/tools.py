"""Which operations agents are offered, under which arguments: the curated set, as data.

Most tools are an operation under its own name. A few take what agents have at hand (a ref) instead of what an operation
has (a slug and an index); those say how one becomes the other. It knows no protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model

from mistudio_engine.api.operations import (
    ControlJob,
    Describe,
    EvalSAE,
    Export,
    Extract,
    FeaturesOnText,
    Find,
    GetDataset,
    GetFeature,
    GetModel,
    GetSAE,
    JobOperation,
    LabelFeatures,
    ListJobs,
    Neighbours,
    Operation,
    ScoreLabels,
    SearchFeatures,
    SetLabel,
    ShowJob,
    Status,
    Steer,
    TestFeature,
    TrainSAE,
)
from mistudio_engine.api.operations.base import Effect, WaitSeconds
from mistudio_engine.api.refs import FeatureRef, feature_of, kind_and_slug

__all__ = ["PROFILES", "TOOLS", "AgentTool", "Profile", "tools_of"]


class Arguments(BaseModel):
    """Arguments of a tool that differ from its operation's fields."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class DescribeArguments(Arguments):
    """One thing whole: configuration, where it comes from, how healthy it is, and what can be done next."""

    ref: str
    """As find lists it: KIND/NAME, such as sae/stories-l2."""


class GetFeatureArguments(Arguments):
    """One feature: how often and how strongly it fires, on which tokens, what it promotes, examples, its labels.

    Read it, then label it with set_label or try it with steer.
    """

    ref: FeatureRef
    """Such as sae/stories-l2#7."""

    n: Annotated[int, Field(ge=0, le=30)] = 5
    """Examples to show."""

    sampling: Literal["top", "quantile", "random", "zero", "all"] = "top"
    sections: list[Literal["analysis", "neighbours", "ablation"]] = []
    """What to say besides: analysis of the words that it fires on, nearest features by direction, what its ablation
    found."""


class TestFeatureArguments(Arguments):
    """Run one feature on up to 64 texts of your own: where it peaks and whether it fires; with what you expected of
    each, AUROC, precision and recall: a true description separates the texts, AUROC 1.

    Use it to check an idea before set_label.
    """

    __test__: ClassVar[bool] = False

    ref: FeatureRef
    """Such as sae/stories-l2#7."""

    texts: Annotated[list[Annotated[str, Field(min_length=1, max_length=20_000)]], Field(min_length=1, max_length=64)]
    expected: list[bool] | None = None
    """For each text whether it should fire."""


class NeighboursArguments(Arguments):
    """The features nearest to one and those most opposite: by decoder direction, label, logits or co-activation."""

    ref: FeatureRef
    by: Literal["decoder", "coactivation", "label", "logits"] = "decoder"
    k: Annotated[int, Field(ge=1, le=50)] = 10
    """How many of each sign."""


class JobArguments(Arguments):
    """One job: state, stage, progress, time left, metrics, result or error. Without an id the latest jobs."""

    id: str | None = None
    """Such as train-0007."""

    wait_s: WaitSeconds = 0.0
    """Wait this long for its end."""


class JobControlArguments(Arguments):
    """Cancel, pause, resume, stop (end early and keep what is usable) or retry a job."""

    id: str
    action: Literal["cancel", "pause", "resume", "stop", "retry"]


Profile = Literal["research", "full"]
"""Which tools an agent is offered: every one costs it attention in every call."""


PROFILES: tuple[Profile, ...] = get_args(Profile)


class AgentTool(NamedTuple):
    """A tool."""

    name: str
    arguments: type[BaseModel]
    """What it takes; its docstring is the description."""

    operation: Callable[[Any], Operation[Any]]
    """The operation that validated arguments stand for."""

    result: Any
    """What that answers."""

    effect: Effect
    idempotent: bool
    profile: Profile = "research"
    """The smallest profile that has it."""


def tools_of(profile: Profile) -> list[AgentTool]:
    """The tools of a profile, in the order in which an agent needs them."""
    return [tool for tool in TOOLS if profile == "full" or tool.profile == profile]


def _plain(kind: type[Operation[Any]]) -> AgentTool:
    return AgentTool(kind.tool, kind, lambda arguments: arguments, kind.result, kind.effect, kind.idempotent)


def _in_part(kind: type[Operation[Any]], *names: str) -> AgentTool:
    """An operation with these of its arguments, and those that every job has; a template may hold the others."""
    of_jobs = JobOperation.model_fields if issubclass(kind, JobOperation) else ()
    fields = {name: kind.model_fields[name] for name in (*names, *of_jobs)}
    arguments = create_model(
        kind.__name__,
        __config__=ConfigDict(extra="forbid", protected_namespaces=(), defer_build=True),
        __doc__=kind.__doc__,
        **{name: (field.annotation, field) for name, field in fields.items()},  # type: ignore[call-overload]
    )
    return AgentTool(
        kind.tool,
        arguments,
        lambda given: kind(**given.model_dump(exclude_unset=True)),
        kind.result,
        kind.effect,
        kind.idempotent,
    )


def _adapted(
    name: str, arguments: type[Arguments], kind: type[Operation[Any]], make: Callable[[Any], Operation[Any]]
) -> AgentTool:
    return AgentTool(name, arguments, make, kind.result, kind.effect, kind.idempotent)


def _describe(arguments: DescribeArguments) -> Describe:
    kind, slug = kind_and_slug(arguments.ref)
    return Describe(kind=kind, slug=slug)  # type: ignore[arg-type]


def _get_feature(arguments: GetFeatureArguments) -> GetFeature:
    key = feature_of(arguments.ref)
    sections = {name: True for name in arguments.sections}
    return GetFeature(sae=key.sae, index=key.index, n=arguments.n, sampling=arguments.sampling, **sections)


def _test_feature(arguments: TestFeatureArguments) -> TestFeature:
    return TestFeature(feature=arguments.ref, texts=arguments.texts, expected=arguments.expected)


def _neighbours(arguments: NeighboursArguments) -> Neighbours:
    key = feature_of(arguments.ref)
    return Neighbours(sae=key.sae, index=key.index, by=arguments.by, n=arguments.k)


def _job(arguments: JobArguments) -> ShowJob | ListJobs:
    # The wait is done by the server in slices, with progress to clients that ask for it.
    return ListJobs(limit=10) if arguments.id is None else ShowJob(job=arguments.id)


def _job_control(arguments: JobControlArguments) -> ControlJob:
    return ControlJob(job=arguments.id, action=arguments.action)


TOOLS: tuple[AgentTool, ...] = (
    _plain(Status),
    _plain(Find),
    _adapted("describe", DescribeArguments, Describe, _describe),
    _plain(GetModel),
    _plain(GetDataset),
    _plain(GetSAE),
    _plain(TrainSAE),
    _plain(EvalSAE),
    _in_part(Extract, "sae", "also", "dataset", "n_tokens", "features", "n_examples", "template"),
    _in_part(LabelFeatures, "sae", "features", "provider", "model", "max_usd", "template"),
    _plain(SetLabel),
    _in_part(
        SearchFeatures,
        *("query", "like", "sae", "mode", "category", "min_confidence"),
        *("include_dense", "limit", "cursor"),
    ),
    _in_part(FeaturesOnText, "sae", "text", "contrast_text", "k", "include_dense"),
    _adapted("get_feature", GetFeatureArguments, GetFeature, _get_feature),
    _adapted("test_feature", TestFeatureArguments, TestFeature, _test_feature),
    _adapted("neighbours", NeighboursArguments, Neighbours, _neighbours)._replace(profile="full"),
    _in_part(ScoreLabels, "sae", "features", "methods", "provider", "model", "n", "max_usd")._replace(profile="full"),
    _plain(Steer),
    _adapted("job", JobArguments, ShowJob, _job),
    _adapted("job_control", JobControlArguments, ControlJob, _job_control),
    _in_part(Export, "sae", "format", "feature_selection", "range_start", "range_end", "indices"),
)
"""All tools, in the order in which an agent needs them."""
