"""The catalogue: what every operation owes, and the files that are made from it."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mistudio_engine.api import generate, wire
from mistudio_engine.api.errors import BadInput
from mistudio_engine.api.operations import OPERATIONS, JobOperation, Operation, SearchFeatures, SetLabel, TrainSAE
from mistudio_engine.api.operations.base import snake_case

EVERY = pytest.mark.parametrize("kind", OPERATIONS.values(), ids=OPERATIONS.keys())


def bare(hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Annotated:
        return bare(typing.get_args(hint)[0])
    options = [each for each in typing.get_args(hint) if each is not type(None)]
    return bare(options[0]) if type(None) in typing.get_args(hint) and len(options) == 1 else hint


@EVERY
def test_an_operation_says_what_it_does_and_answers(kind: type[Operation[Any]]) -> None:
    assert (kind.__doc__ or "").strip().endswith((".", "`."))
    assert isinstance(kind.result, type) and issubclass(kind.result, BaseModel), (
        "an answer is a model, never a bare list"
    )
    assert kind.tool == snake_case(kind.__name__)
    if issubclass(kind, JobOperation):
        assert isinstance(kind.outcome, type) and issubclass(kind.outcome, BaseModel)


@EVERY
def test_path_parameters_are_fields_and_reads_have_scalars_only(kind: type[Operation[Any]]) -> None:
    for route in kind.routes:
        assert set(route.parameters) <= set(kind.model_fields)
    if kind.routes[0].method in ("GET", "DELETE"):
        for name, field in kind.model_fields.items():
            hint = bare(field.annotation)
            assert hint in (str, int, float, bool) or typing.get_origin(hint) is typing.Literal, f"{name}: {hint}"


def test_no_two_operations_share_a_route() -> None:
    routes = [route for kind in OPERATIONS.values() for route in kind.routes]
    assert len(routes) == len(set(routes))


@EVERY
def test_a_misspelt_argument_is_refused_by_name(kind: type[Operation[Any]]) -> None:
    with pytest.raises(BadInput, match="modle is not an argument"):
        wire.parse_operation(kind, {"modle": "x"})


def test_hyperparameters_may_stand_beside_the_other_arguments() -> None:
    flat = TrainSAE(model="m", dataset="d", hook_name="h", lr=0.01, batch_size=100, num_steps=50)  # type: ignore[call-arg]
    assert (flat.hyperparameters.lr, flat.hyperparameters.n_tokens) == (0.01, 5000)


def test_the_documents_names_are_accepted() -> None:
    document = {
        "model": "m",
        "dataset": "d",
        "hook_name": "h",
        "hidden_dim": 64,
        "latent_dim": 512,
        "top_k_sparsity": 8,
        "learning_rate": 0.001,
        "num_steps": 10,
        "batch_size": 256,
    }
    operation = wire.parse_operation(TrainSAE, document)
    assert isinstance(operation, TrainSAE)
    assert (operation.d_in, operation.d_sae, operation.k) == (64, 512, 8)
    assert operation.hyperparameters.lr == 0.001


def test_a_value_given_twice_is_refused() -> None:
    with pytest.raises(BadInput, match="give it once"):
        wire.parse_operation(
            TrainSAE, {"model": "m", "dataset": "d", "hook_name": "h", "lr": 0.1, "hyperparameters": {"lr": 0.2}}
        )


@pytest.mark.parametrize(
    "operation",
    [
        SearchFeatures(query="a & b = c?", sae="x", include_dense=True, limit=3),
        SetLabel(feature="sae/x-1#7", label="cats"),
        TrainSAE(model="m", dataset="d", hook_name="blocks.1.hook_resid_post", k=4),
    ],
    ids=lambda operation: operation.tool,
)
def test_a_request_carries_all_that_differs_from_the_default(operation: Operation[Any]) -> None:
    request = wire.request_of(operation)
    route = type(operation).routes[0]
    pattern, path = route.path.split("/"), request.path.removeprefix(wire.API).split("/")
    in_path = {name[1:-1]: value for name, value in zip(pattern, path, strict=True) if name.startswith("{")}
    assert wire.parse_operation(type(operation), {**request.query, **(request.body or {}), **in_path}) == operation


def test_what_was_given_travels_even_if_it_is_the_default() -> None:
    given = TrainSAE(model="m", dataset="d", hook_name="h", seed=0)
    assert (wire.request_of(given).body or {}).keys() == {"model", "dataset", "hook_name", "seed"}


def test_the_files_made_from_the_catalogue_are_current() -> None:
    folder = Path(generate.__file__).parent
    fix = "run `python -m mistudio_engine.api.generate`"
    assert (folder / "catalogue.txt").read_text(encoding="utf-8") == generate.catalogue(), fix
    assert (folder / "client.pyi").read_text(encoding="utf-8") == generate.stub(), fix
