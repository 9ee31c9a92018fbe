"""An operation is a value: a small class whose fields are the parameters and whose type argument is the result.

`TrainSAE` is the tool `train_sae`; its docstring is the description, each field's docstring describes a parameter, and
`route=` gives the REST path. Every door (REST, MCP, client, command line, widgets) is derived from the catalogue
`OPERATIONS`. An operation knows nothing of how it is carried out: that is its handler's business.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from mistudio_engine.api.docstrings import describe_fields
from mistudio_engine.api.records import Job

__all__ = ["OPERATIONS", "Effect", "JobOperation", "Operation", "Route", "WaitSeconds", "snake_case"]

R = TypeVar("R")
Outcome = TypeVar("Outcome")

Effect = Literal["read", "write", "destroy"]
"""What an operation does to the world: nothing, adds or changes, takes away."""

WaitSeconds = Annotated[float, Field(ge=0, le=45)]
"""How long a call may wait for its job before it hands over the job itself."""


class Route(NamedTuple):
    """A REST path below `/api/v1`."""

    method: str
    path: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the fields that stand in the path."""
        return tuple(re.findall(r"{(\w+)}", self.path))


def snake_case(name: str) -> str:
    """`TrainSAE` → `train_sae`, `FeaturesOnText` → `features_on_text`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


OPERATIONS: dict[str, type[Operation[Any]]] = {}
"""Every operation by its name."""


class Operation(BaseModel, Generic[R]):
    """Base of all operations; `R` is what `call` answers.

    Class keywords:
        route: method and path below `/api/v1`, such as `"GET /features"`; path parameters are fields.
        also: further routes for the same operation, as the documents name them.
        effect: "read", "write" or "destroy".
        idempotent: calling it twice is the same as once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)

    tool: ClassVar[str] = ""
    routes: ClassVar[tuple[Route, ...]] = ()
    effect: ClassVar[Effect] = "read"
    idempotent: ClassVar[bool] = True
    result: ClassVar[Any] = None

    def __init_subclass__(cls, **_: Any) -> None:
        """Swallows the class keywords, which pydantic passes on to the hook below as well."""
        super().__init_subclass__()

    @classmethod
    def __pydantic_init_subclass__(
        cls,
        *,
        route: str | None = None,
        also: tuple[str, ...] = (),
        effect: Effect | None = None,
        idempotent: bool | None = None,
        **_: Any,
    ) -> None:
        describe_fields(cls)
        if route is None:
            return  # an abstract base or a parametrised generic
        cls.tool = snake_case(cls.__name__)
        cls.routes = tuple(Route(*each.split(" ", 1)) for each in (route, *also))
        method = cls.routes[0].method
        cls.effect = effect or ("read" if method == "GET" else "destroy" if method == "DELETE" else "write")
        cls.idempotent = cls.effect != "write" if idempotent is None else idempotent
        cls.result = _type_argument(cls)
        if cls.tool in OPERATIONS:
            raise TypeError(f"two operations are called {cls.tool!r}: {OPERATIONS[cls.tool]} and {cls}")
        OPERATIONS[cls.tool] = cls


class JobOperation(Operation[Job], Generic[Outcome]):
    """An operation that takes long: `call` answers a `Job`, whose result will be an `Outcome`."""

    outcome: ClassVar[Any] = None

    dry_run: bool = False
    """Only say what it would cost, as the plan of a job that is not started."""

    idempotency_key: Annotated[str, Field(max_length=200)] | None = None
    """Two calls with one key start one job."""

    wait_s: WaitSeconds = 0.0
    """Seconds to wait for the end before answering."""

    @classmethod
    def __pydantic_init_subclass__(cls, *, route: str | None = None, **keywords: Any) -> None:
        super().__pydantic_init_subclass__(route=route, **keywords)
        if route is not None:
            cls.outcome, cls.result = _type_argument(cls), Job


def _type_argument(cls: type[BaseModel]) -> Any:
    """`X` of the nearest base `Something[X]`."""
    for base in cls.__mro__:
        arguments = getattr(base, "__pydantic_generic_metadata__", {}).get("args", ())
        if arguments:
            return arguments[0]
    raise TypeError(f"{cls.__name__} does not say what it answers: write Operation[Result]")
