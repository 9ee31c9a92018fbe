"""What an agent is offered and answered, whichever way it is connected."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from fastmcp import Client
from mcp_types import TextContent

from mistudio_engine.api.operations import OPERATIONS
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_mcp import build_server
from mistudio_mcp.tools import tools_of
from tests.behaviour.doors import Loop, Served
from tests.mcp.conftest import Agent

OFFERED = [
    *("status", "find", "describe", "get_model", "get_dataset", "get_sae", "train_sae", "eval_sae", "extract"),
    *("label_features", "set_label", "search_features", "features_on_text", "get_feature", "test_feature"),
    *("steer", "job", "job_control", "export"),
]

IN_FULL_ONLY = ["neighbours", "score_labels"]

OPERATION_OF = {"job": "show_job", "job_control": "control_job"}
"""Tools that are called differently from their operation."""

MAX_SCHEMA_TOKENS = 12_000
MAX_ANSWER_TOKENS = 6_000
CHARACTERS_PER_TOKEN = 4

TRAIN: dict[str, Any] = {"model": "tiny", "dataset": "corpus", "hook_name": DEMO_HOOK, "d_sae": 64, "k": 8}
ENDLESS = {**TRAIN, "hyperparameters": {"n_tokens": 50_000_000, "batch_size": 512, "buffer_tokens": 4096}}

CALLS: dict[str, dict[str, Any]] = {
    "status": {},
    "find": {"kind": "dataset"},
    "describe": {"ref": "model/tiny"},
    "train_sae": {**TRAIN, "dry_run": True},
    "get_model": {"source": "embedded", "dry_run": True},
    "job": {},
}
"""Calls that cost nothing and are answered."""


def tokens(value: Any) -> float:
    return len(json.dumps(value, ensure_ascii=False)) / CHARACTERS_PER_TOKEN


def plain(tool: Any) -> dict[str, Any]:
    return tool.model_dump(mode="json", by_alias=True, exclude_none=True)


def test_an_agent_connects_lists_the_tools_and_asks_for_the_status(each_agent: Agent) -> None:
    assert [tool.name for tool in each_agent.tools()] == OFFERED
    status = each_agent.call("status")
    assert not status.is_error
    assert status.structured_content["state"] == "ready"
    assert status.structured_content["next_call"]["tool"] in OFFERED


def test_the_full_profile_has_more_in_the_same_order(studio: Served, loop: Loop) -> None:
    async def names() -> list[str]:
        async with Client(build_server(studio.engine.acall, "full")) as client:
            return [tool.name for tool in await client.list_tools()]

    full = loop.run(names())
    assert sorted(full) == sorted([*OFFERED, *IN_FULL_ONLY])
    assert [name for name in full if name in OFFERED] == OFFERED


def test_the_schemas_of_all_tools_fit_into_their_budget(agent: Agent) -> None:
    assert sum(tokens(plain(tool)) for tool in agent.tools()) <= MAX_SCHEMA_TOKENS


def test_the_list_of_tools_is_the_same_bytes_each_time(agent: Agent, studio: Served, loop: Loop) -> None:
    async def anew() -> list[Any]:
        async with Client(build_server(studio.engine.acall)) as client:
            return await client.list_tools()

    first, second = ([plain(tool) for tool in tools] for tools in (agent.tools(), loop.run(anew())))
    assert json.dumps(first) == json.dumps(second)


@pytest.mark.parametrize("tool", tools_of("research"), ids=lambda tool: tool.name)
def test_the_hints_say_what_the_operation_does(agent: Agent, tool: Any) -> None:
    hints = next(each for each in agent.tools() if each.name == tool.name).annotations
    operation = OPERATIONS[OPERATION_OF.get(tool.name, tool.name)]
    assert hints.read_only_hint == (operation.effect == "read")
    assert hints.destructive_hint == (operation.effect == "destroy")
    assert hints.idempotent_hint == operation.idempotent


def test_every_tool_describes_itself_its_arguments_and_its_answer(agent: Agent) -> None:
    for tool in agent.tools():
        assert tool.description.endswith((".", "`."))
        assert tool.input_schema["type"] == tool.output_schema["type"] == "object"
        assert tool.input_schema["additionalProperties"] is False
        assert "title" not in json.dumps(tool.input_schema).replace('"title": {', "")
        jsonschema.Draft202012Validator.check_schema(tool.input_schema)
        jsonschema.Draft202012Validator.check_schema(tool.output_schema)


@pytest.mark.parametrize("name", CALLS)
def test_an_answer_is_structure_by_its_schema_and_the_same_as_text(agent: Agent, name: str) -> None:
    schema = next(tool for tool in agent.tools() if tool.name == name).output_schema
    answer = agent.call(name, **CALLS[name])
    assert not answer.is_error, answer
    jsonschema.validate(answer.structured_content, schema)
    assert isinstance(answer.content[0], TextContent) and answer.content[0].text
    assert tokens(answer.structured_content) <= MAX_ANSWER_TOKENS


def test_a_misspelt_argument_is_refused_with_the_call_that_was_meant(each_agent: Agent) -> None:
    answer = each_agent.call("find", kind="model", querry="tiny")
    error = answer.structured_content
    assert answer.is_error
    assert error["code"] == "bad_input"
    assert "querry is not an argument of find" in error["what"]
    assert "kind, query, limit, cursor" in error["fix"]
    assert error["next_call"] == {"tool": "find", "arguments": {"kind": "model", "query": "tiny"}}
    healed = each_agent.call(error["next_call"]["tool"], **error["next_call"]["arguments"])
    assert [row["ref"] for row in healed.structured_content["rows"]] == ["model/tiny"]


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("find", {}, "bad_input"),
        ("find", {"kind": "unicorn"}, "bad_input"),
        ("find", {"kind": "model", "limit": "many"}, "bad_input"),
        ("describe", {"ref": "first"}, "bad_input"),
        ("describe", {"ref": "unicorn/first"}, "bad_input"),
        ("describe", {"ref": "sae/nobody"}, "not_found"),
        ("get_feature", {"ref": "sae/nobody"}, "bad_input"),
        ("get_feature", {"ref": "sae/nobody#1"}, "not_found"),
        ("job", {"id": "train-9999"}, "not_found"),
        ("job_control", {"id": "train-9999", "action": "explode"}, "bad_input"),
        ("train_sae", {**TRAIN, "k": "some"}, "bad_input"),
        ("train_sae", {**TRAIN, "hyperparameters": {"lrr": 1}}, "bad_input"),
        ("steer", {"prompt": "The", "interventions": []}, "bad_input"),
        ("set_label", {"feature": "sae/nobody#1", "label": "x"}, "not_found"),
    ],
)
def test_a_wrong_call_says_what_to_do_and_never_in_pydantics_words(
    agent: Agent, name: str, arguments: dict[str, Any], code: str
) -> None:
    answer = agent.call(name, **arguments)
    error = answer.structured_content
    assert answer.is_error
    assert error["code"] == code
    assert error["what"] and error["fix"]
    assert error["next_call"]["tool"] in OFFERED
    text = answer.content[0].text
    for raw in ("pydantic", "validation error", "errors.pydantic.dev", "input_value", "Traceback"):
        assert raw not in text


def test_a_fault_of_ours_is_told_as_one_without_its_particulars(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(operation: Any, *, caller: str) -> Any:
        raise RuntimeError("particulars")

    async def ask() -> Any:
        async with Client(build_server(broken)) as client:
            return await client.call_tool("status", {}, raise_on_error=False)

    answer = loop.run(ask())
    assert answer.is_error
    assert answer.structured_content["code"] == "internal"
    assert "particulars" not in str(answer)
    assert "particulars" in caplog.text


def test_a_job_that_takes_longer_than_the_wait_is_handed_over_and_can_be_cancelled(each_agent: Agent) -> None:
    answer = each_agent.call("train_sae", **ENDLESS)
    job = answer.structured_content
    assert not answer.is_error
    assert job["state"] in ("queued", "running")
    assert job["next_call"] == {"tool": "job", "arguments": {"id": job["id"], "wait_s": 20}}
    waited = each_agent.call("job", id=job["id"], wait_s=0.3).structured_content
    assert waited["state"] in ("queued", "running")
    each_agent.call("job_control", id=job["id"], action="cancel")
    assert each_agent.call("job", id=job["id"], wait_s=20).structured_content["state"] == "cancelled"


def test_a_client_that_asks_is_told_the_progress(each_agent: Agent) -> None:
    told: list[tuple[float, float | None, str | None]] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))

    job = each_agent.call("train_sae", **ENDLESS).structured_content["id"]
    waiting = each_agent.client.call_tool("job", {"id": job, "wait_s": 0.5}, progress_handler=listen)
    each_agent.loop.run(waiting)
    each_agent.call("job_control", id=job, action="cancel")
    assert told
    assert all(total == 1.0 and message for _, total, message in told)


def test_two_calls_with_one_key_start_one_job(agent: Agent) -> None:
    call = {**ENDLESS, "idempotency_key": "one"}
    first, again = (agent.call("train_sae", **call).structured_content["id"] for _ in range(2))
    agent.call("job_control", id=first, action="cancel")
    assert first == again
