"""Prompts as templates: checked when they are kept, cloned, and used by default where a call names none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mistudio_engine.api.errors import BadInput, Conflict, NotFound
from mistudio_engine.api.operations import (
    CloneTemplate,
    DeleteTemplate,
    ExportTemplate,
    Extract,
    ImportTemplate,
    LabelFeatures,
    ListTemplates,
    SaveTemplate,
    SearchFeatures,
    SetSetting,
    ShowTemplate,
    UpdateTemplate,
)
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.files import slugify
from tests.behaviour.doors import DOORS, Door, Loop, Served
from tests.behaviour.trainings import completed
from tests.llm_server import LLMServer, serve_llm

GOOD = {"reasoning": "Yes.", "label": "words of a kind", "category": "Words"}
LABELLING = {"provider": "compatible", "model": "m", "user_prompt": "Look: {examples}", "n_examples": 3}


@pytest.fixture(params=["in process", "REST"])
def direct(request: pytest.FixtureRequest, studio: Served, loop: Loop) -> Iterator[Door]:
    """The doors that offer templates."""
    yield from DOORS[request.param](studio, loop)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test has."""
    return slugify(request.node.name)


@pytest.fixture
def engine(studio: Served) -> Iterator[Engine]:
    """The engine; at the end it has no default templates."""
    yield studio.engine
    for row in studio.engine.call(ListTemplates(limit=200)).rows:
        if row.default:
            studio.engine.call(UpdateTemplate(template=row.slug, default=False))


@pytest.fixture
def llm(engine: Engine) -> Iterator[LLMServer]:
    """A language model server that the engine is set to."""
    with serve_llm(lambda request: GOOD) as server:
        engine.call(SetSetting(key="labelling_base_url", value=server.openai_url))
        yield server
        engine.call(SetSetting(key="labelling_base_url", value=None))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"user_prompt": "Label it."}, "{examples} is missing"),
        ({"user_prompt": "{examples} {colour}"}, "{colour} is not a variable"),
        ({"user_prompt": "{examples} {token}"}, "did you mean {tokens}?"),
        ({"user_prompt": "{examples.__class__}"}, "is not a variable"),
        ({"system_message": "{"}, "write {{ or }}"),
        ({"system_message": "{nothing}"}, "the variables are {examples}, {negatives}"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_prompt_that_cannot_be_filled_in_is_not_kept(
    direct: Door, name: str, arguments: dict[str, Any], says: str
) -> None:
    document = {"format": "mistudio-template", "version": 1, "name": name, "operation": "label_features"}
    for call in (
        SaveTemplate(name=name, operation="label_features", arguments=arguments),
        ImportTemplate(document={**document, "arguments": arguments}),
    ):
        with pytest.raises(BadInput) as refused:
            direct(call)
        assert says in str(refused.value)
    with pytest.raises(NotFound):
        direct(ShowTemplate(template=name))
    with pytest.raises((BadInput, ValueError)) as refused:  # in a call of one's own, too
        direct(LabelFeatures(sae="first", **arguments, dry_run=True))
    assert says in str(refused.value)


def test_a_prompt_is_kept_passed_on_and_used(engine: Engine, llm: LLMServer, name: str) -> None:
    engine.call(SaveTemplate(name=name, operation="label_features", arguments=LABELLING))
    document = engine.call(ExportTemplate(template=name)).model_dump(mode="json")
    engine.call(ImportTemplate(document=document, name=f"{name}-2"))
    completed(engine, LabelFeatures(sae="first", features=[1], template=f"{name}-2"))
    assert llm.requests[0].user.startswith("Look: <data ")
    assert llm.requests[0].user.count("activations:") == 3
    assert engine.call(ShowTemplate(template=f"{name}-2")).n_used == 1


def test_an_address_is_not_kept_in_a_template(direct: Door, name: str) -> None:
    """Somebody could slip it to others, with their prompts and key."""
    arguments = {**LABELLING, "base_url": "http://evil.example.com/v1"}
    with pytest.raises(BadInput, match="base_url cannot be kept"):
        direct(SaveTemplate(name=name, operation="label_features", arguments=arguments))
    direct(SaveTemplate(name=name, operation="label_features", arguments=LABELLING))
    with pytest.raises(BadInput, match="base_url cannot be kept"):
        direct(UpdateTemplate(template=name, arguments=arguments))


def test_the_address_of_a_job_does_not_become_a_templates(engine: Engine, llm: LLMServer, name: str) -> None:
    job = completed(
        engine, LabelFeatures(sae="first", features=[1], provider="compatible", model="m", base_url=llm.openai_url)
    )
    kept = engine.call(SaveTemplate(name=name, from_job=job.slug))
    assert kept.arguments == {"sae": "first", "features": [1], "provider": "compatible", "model": "m"}


def test_a_clone_is_a_copy_to_be_changed(direct: Door, name: str) -> None:
    direct(
        SaveTemplate(name=name, operation="extract", arguments={"n_tokens": 512}, description="quick", favourite=True)
    )
    copy = direct(CloneTemplate(template=f"template/{name}"))
    assert (copy.slug, copy.description, copy.favourite, copy.default, copy.n_used) == (
        f"{name}-2",
        "quick",
        False,
        False,
        0,
    )
    assert direct(CloneTemplate(template=name)).slug == f"{name}-3"
    assert direct(CloneTemplate(template=name, name=f"{name}-mine")).slug == f"{name}-mine"
    direct(UpdateTemplate(template=f"{name}-2", arguments={"n_tokens": 1024}))
    assert direct(ShowTemplate(template=name)).arguments.n_tokens == 512
    with pytest.raises(Conflict):
        direct(CloneTemplate(template=name, name=f"{name}-mine"))
    with pytest.raises(NotFound):
        direct(CloneTemplate(template=f"{name}-none"))


def test_the_default_counts_where_a_call_names_no_template(engine: Engine, direct: Door, name: str) -> None:
    direct(SaveTemplate(name=name, operation="extract", arguments={"n_tokens": 512, "n_examples": 7}))
    assert direct(UpdateTemplate(template=name, default=True)).default

    def plan(**arguments: Any) -> Any:
        return direct(Extract(sae="first", dry_run=True, **arguments))

    def asked(**arguments: Any) -> tuple[Any, Any]:
        job = plan(**arguments)
        return job.arguments.n_tokens, job.arguments.template

    assert asked() == (512, name)
    assert asked(n_tokens=1024) == (1024, name), "the call's own counts"
    direct(SaveTemplate(name=f"{name}-other", operation="extract", arguments={"n_tokens": 2048}))
    assert asked(template=f"{name}-other") == (2048, f"{name}-other"), "and so does its own template"
    assert asked(template=None) == (None, None), "null is none"
    direct(UpdateTemplate(template=name, default=False))
    assert asked() == (None, None)


def test_an_operation_has_one_default_at_most(engine: Engine, direct: Door, name: str) -> None:
    def defaults(operation: str) -> list[str]:
        return [row.slug for row in direct(ListTemplates(operation=operation, limit=200)).rows if row.default]

    for operation in ("extract", "label_features"):
        for part in ("a", "b"):
            direct(SaveTemplate(name=f"{name}-{operation}-{part}", operation=operation))
            direct(UpdateTemplate(template=f"{name}-{operation}-{part}", default=True))
    assert defaults("extract") == [f"{name}-extract-b"]
    assert defaults("label_features") == [f"{name}-label_features-b"]
    renamed = direct(UpdateTemplate(template=f"{name}-extract-b", name=f"{name}-c"))
    assert renamed.default and defaults("extract") == [f"{name}-c"]
    direct(SaveTemplate(name=f"{name}-c", operation="extract", arguments={"n_tokens": 512}, replace=True))
    assert defaults("extract") == [f"{name}-c"], "other arguments leave it what it was"
    direct(DeleteTemplate(template=f"{name}-c"))
    assert defaults("extract") == []


def test_a_default_is_counted_and_kept_with_the_job(engine: Engine, llm: LLMServer, name: str) -> None:
    engine.call(SaveTemplate(name=name, operation="label_features", arguments=LABELLING))
    engine.call(UpdateTemplate(template=name, default=True))
    job = completed(engine, LabelFeatures(sae="first", features=[2]))
    assert job.arguments["template"] == name and job.arguments["user_prompt"] == LABELLING["user_prompt"]
    assert len(llm.requests) == 1 and engine.call(ShowTemplate(template=name)).n_used == 1


def test_only_what_takes_a_template_has_a_default(direct: Door, name: str) -> None:
    direct(SaveTemplate(name=name, operation=SearchFeatures.tool, arguments={"limit": 5}))
    with pytest.raises(BadInput, match="takes no template"):
        direct(UpdateTemplate(template=name, default=True))
    assert not direct(ShowTemplate(template=name)).default
