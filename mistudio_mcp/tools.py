"""Which operations agents are offered, under which arguments: the curated set, as data.

Most tools are an operation under its own name. A few take what agents have at hand (a ref) instead of what an operation
has (a slug and an index); those say how one becomes the other. It knows no protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

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
    LabelFeatures,
    ListJobs,
    Operation,
    SearchFeatures,
    SetLabel,
    ShowJob,
    Status,
    Steer,
    TrainSAE,
)
from mistudio_engine.api.operations.base import Effect, WaitSeconds
from mistudio_engine.api.refs import FeatureRef, feature_of, kind_and_slug

__all__ = ["TOOLS", "AgentTool"]


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


def _plain(kind: type[Operation[Any]]) -> AgentTool:
    return AgentTool(kind.tool, kind, lambda arguments: arguments, kind.result, kind.effect, kind.idempotent)


def _adapted(
    name: str, arguments: type[Arguments], kind: type[Operation[Any]], make: Callable[[Any], Operation[Any]]
) -> AgentTool:
    return AgentTool(name, arguments, make, kind.result, kind.effect, kind.idempotent)


def _describe(arguments: DescribeArguments) -> Describe:
    kind, slug = kind_and_slug(arguments.ref)
    return Describe(kind=kind, slug=slug)  # type: ignore[arg-type]


def _get_feature(arguments: GetFeatureArguments) -> GetFeature:
    key = feature_of(arguments.ref)
    return GetFeature(sae=key.sae, index=key.index, n=arguments.n, sampling=arguments.sampling)


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
    _plain(Extract),
    _plain(LabelFeatures),
    _plain(SetLabel),
    _plain(SearchFeatures),
    _plain(FeaturesOnText),
    _adapted("get_feature", GetFeatureArguments, GetFeature, _get_feature),
    _plain(Steer),
    _adapted("job", JobArguments, ShowJob, _job),
    _adapted("job_control", JobControlArguments, ControlJob, _job_control),
    _plain(Export),
)
"""The tools in the order in which an agent needs them."""
