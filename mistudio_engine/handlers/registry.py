"""Which function carries out which operation: three dicts, filled by three decorators.

`handles(Op)` answers at once. A `JobOperation` has a pair instead: `plans(Op)` checks the arguments and says what it
would cost, without changing anything; `runs(Op)` is the job, a generator. The registry knows neither store nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.records import Plan

__all__ = ["HANDLERS", "PLANS", "RUNS", "Planned", "Run", "handles", "plans", "runs"]

F = TypeVar("F", bound=Callable[..., Any])


class Planned(NamedTuple):
    """An operation that can be carried out."""

    plan: Plan
    subject: str | None = None
    """Ref of what it works on or makes."""

    priority: int = 0
    open: Callable[[], Any] | None = None
    """Makes the subject's record, right before the job is queued; not called for a dry run."""

    settled: Mapping[str, Any] = {}
    """What the job keeps to where its arguments leave it open, whatever is set or made meanwhile (`Job.settled`).
    Never a key."""


class Run(NamedTuple):
    """How an operation's job is run."""

    function: Callable[..., Any]
    """`(operation, engine, job_context)` → generator of Progress."""

    lane: Literal["compute", "interactive", "io"]
    resumes: Literal["checkpoint", "start", "never"]


HANDLERS: dict[type[Operation[Any]], Callable[..., Any]] = {}
PLANS: dict[type[Operation[Any]], Callable[..., Planned]] = {}
RUNS: dict[type[Operation[Any]], Run] = {}


def handles(operation: type[Operation[Any]]) -> Callable[[F], F]:
    """Register `function(operation, engine) -> result`."""

    def register(function: F) -> F:
        HANDLERS[operation] = function
        return function

    return register


def plans(operation: type[JobOperation[Any]]) -> Callable[[F], F]:
    """Register `function(operation, engine) -> Planned`; it raises what speaks against the call and changes nothing."""

    def register(function: F) -> F:
        PLANS[operation] = function
        return function

    return register


def runs(
    operation: type[JobOperation[Any]],
    *,
    lane: Literal["compute", "interactive", "io"],
    resumes: Literal["checkpoint", "start", "never"] = "start",
) -> Callable[[F], F]:
    """Register `function(operation, engine, context) -> Generator[Progress, Signal, outcome]`."""

    def register(function: F) -> F:
        RUNS[operation] = Run(function, lane, resumes)
        return function

    return register
