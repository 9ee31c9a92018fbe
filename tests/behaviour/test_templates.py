"""Templates: arguments kept under a name, used below a call's own, passed on, and never mistaken for the job's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mistudio_engine.api.errors import BadInput, Conflict, MistudioError, NotFound, Unsupported
from mistudio_engine.api.operations import (
    OPERATIONS,
    ControlJob,
    DeleteTemplate,
    Describe,
    ExportTemplate,
    Extract,
    Find,
    ImportTemplate,
    LabelFeatures,
    ListTemplates,
    RunTemplate,
    SaveTemplate,
    SearchFeatures,
    ShowJob,
    ShowTemplate,
    Steer,
    TrainSAE,
    UpdateTemplate,
)
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.runtime.files import slugify
from tests.behaviour.doors import DOORS, Door, Loop, Served
from tests.behaviour.test_doors import finished

TRAIN: dict[str, Any] = {"model": "tiny", "dataset": "corpus", "hook_name": DEMO_HOOK}


@pytest.fixture(params=["in process", "REST"])
def direct(request: pytest.FixtureRequest, studio: Served, loop: Loop) -> Iterator[Door]:
    """The doors that offer every operation; agents are offered templates only where they use them."""
    yield from DOORS[request.param](studio, loop)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test has."""
    return slugify(request.node.name)


def plain(answer: Any) -> Any:
    """An answer as plain data again."""
    if isinstance(answer, list):
        return [plain(each) for each in answer]
    return {key: plain(each) for key, each in vars(answer).items()} if hasattr(answer, "__dict__") else answer


def arguments(call: Door, job: Any) -> dict[str, Any]:
    return plain(call(ShowJob(job=job.slug)).arguments)


def test_a_template_is_saved_shown_listed_changed_and_deleted(direct: Door, name: str) -> None:
    saved = direct(
        SaveTemplate(name=name, operation="extract", arguments={"n_tokens": 4096}, description="a quick look")
    )
    assert (saved.ref, saved.n_used, saved.favourite, saved.version) == (f"template/{name}", 0, False, 1)
    assert plain(direct(ShowTemplate(template=f"template/{name}")).arguments) == {"n_tokens": 4096}
    assert name in [row.slug for row in direct(ListTemplates(query="quick LOOK")).rows]
    assert name not in [row.slug for row in direct(ListTemplates(operation="steer")).rows]
    changed = direct(UpdateTemplate(template=name, favourite=True, arguments={"n_examples": 5}))
    assert changed.favourite and changed.description == "a quick look"
    assert plain(changed.arguments) == {"n_examples": 5}
    assert changed.updated_at >= saved.updated_at
    assert name in [row.slug for row in direct(ListTemplates(favourite=True)).rows]
    assert name not in [row.slug for row in direct(ListTemplates(favourite=False)).rows]
    renamed = direct(UpdateTemplate(template=name, name=f"{name}-2"))
    assert renamed.favourite and renamed.created_at == saved.created_at
    with pytest.raises(NotFound):
        direct(ShowTemplate(template=name))
    assert direct(DeleteTemplate(template=f"{name}-2")).ref == f"template/{name}-2"
    assert not direct(ListTemplates(query=name)).rows


def test_a_name_is_given_once_unless_it_is_meant(direct: Door, name: str) -> None:
    first = SaveTemplate(name=name, operation="extract", arguments={"n_tokens": 4096})
    second = first.model_copy(update={"arguments": {"n_tokens": 512}})
    direct(first)
    with pytest.raises(Conflict, match="replace"):
        direct(second)
    assert direct(ShowTemplate(template=name)).arguments.n_tokens == 4096
    direct(second.model_copy(update={"replace": True}))
    assert direct(ShowTemplate(template=name)).arguments.n_tokens == 512
    other = direct(SaveTemplate(name=f"{name}-other", operation="extract"))
    with pytest.raises(Conflict):
        direct(UpdateTemplate(template=other.slug, name=name))
    assert direct(ShowTemplate(template=other.slug)).slug == f"{name}-other"


@pytest.mark.parametrize(
    ("operation", "arguments", "says"),
    [
        ("train_sea", {}, "train_sae"),
        ("status", {}, "no arguments"),
        ("extract", {"n_token": 5}, "n_tokens"),
        ("extract", {"n_tokens": 5}, "n_tokens = 5"),
        ("train_sae", {"learning_rat": 0.1}, "learning_rate"),
        ("train_sae", {"hyperparameters": {"lr": 7}}, "hyperparameters.lr = 7"),
        ("train_sae", {"d_sae": 8, "latent_dim": 8}, "the same argument"),
        ("steer", {"interventions": [{"strength": 2}]}, "interventions.0.feature is missing"),
        ("extract", {"dry_run": True}, "dry_run cannot be kept"),
        ("train_sae", {"name": "mine"}, "name cannot be kept"),
        ("extract", {"template": "other"}, "template cannot be kept"),
        ("get_model", {"source": "https://me:hunter2@example.com/x"}, "source cannot be kept"),
        ("steer", {"prompt": "hf_" + "a" * 30}, "prompt cannot be kept"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_no_call_could_use_is_not_kept(
    direct: Door, name: str, operation: str, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput) as refused:
        direct(SaveTemplate(name=name, operation=operation, arguments=arguments))
    assert says in str(refused.value) and refused.value.fix
    with pytest.raises(NotFound):
        direct(ShowTemplate(template=name))


def test_the_documents_names_become_ours(direct: Door, name: str) -> None:
    given = {"latent_dim": 64, "top_k_sparsity": 8, "learning_rate": 0.01, "batch_size": 100, "num_steps": 50}
    saved = direct(SaveTemplate(name=name, operation="train_sae", arguments=given))
    hyperparameters = {"lr": 0.01, "batch_size": 100, "n_tokens": 5000}
    assert plain(saved.arguments) == {"d_sae": 64, "k": 8, "hyperparameters": hyperparameters}


def test_a_call_counts_where_both_have_something(call: Door, direct: Door, studio: Served, name: str) -> None:
    studio.engine.call(SaveTemplate(name=name, operation="extract", arguments={"n_tokens": 2048, "n_examples": 7}))
    job = call(Extract(sae="first", template=name, n_examples=20))
    try:
        assert arguments(direct, job) | {"template": name} == {
            **Extract(sae="first").model_dump(exclude={"dry_run", "idempotency_key", "wait_s"}),
            "template": name,
            "n_tokens": 2048,
            "n_examples": 20,  # which is the default, and was asked for
        }
    finally:
        studio.engine.jobs.control(job.slug, "cancel")


def test_a_use_is_counted_when_a_job_starts_and_not_by_a_plan(
    call: Door, direct: Door, studio: Served, name: str
) -> None:
    studio.engine.call(SaveTemplate(name=name, operation="label_features", arguments={"features": [1, 2]}))
    plan = call(LabelFeatures(sae="first", template=name, dry_run=True))
    assert plan.plan
    assert direct(ShowTemplate(template=name)).n_used == 0
    jobs = [call(LabelFeatures(sae="first", template=name, idempotency_key=name)) for _ in range(2)]
    assert jobs[0].slug == jobs[1].slug
    used = direct(ShowTemplate(template=name))
    assert used.n_used == 1 and used.last_used_at
    assert finished(call, jobs[0]).state == "completed"


def test_a_started_job_does_not_change_with_its_template(direct: Door, studio: Served, name: str) -> None:
    direct(SaveTemplate(name=name, operation="extract", arguments={"n_tokens": 2048}))
    started = Extract(sae="first", template=name, idempotency_key=name)
    job = direct(started)
    direct(ControlJob(job=job.slug, action="cancel"))
    direct(UpdateTemplate(template=name, arguments={"n_tokens": 512}))
    assert direct(started).slug == job.slug, "the same call is the same job, whatever became of the template"
    finished(direct, direct(ShowJob(job=job.slug)))
    retried = direct(ControlJob(job=job.slug, action="retry"))
    assert retried.arguments.n_tokens == 2048
    direct(DeleteTemplate(template=name))
    assert finished(direct, retried).state == "completed"
    assert finished(direct, retried).result.n_tokens > 1024
    assert direct(started).slug == job.slug
    with pytest.raises(Conflict):
        direct(started.model_copy(update={"n_examples": 3}))
    with pytest.raises(NotFound):
        direct(Extract(sae="first", template=name))


def test_a_template_of_another_operation_is_refused(call: Door, studio: Served, name: str) -> None:
    studio.engine.call(SaveTemplate(name=name, operation="label_features"))
    with pytest.raises(BadInput, match="for label_features, not for extract"):
        call(Extract(sae="first", template=name))


def test_what_makes_no_sense_together_names_the_template(direct: Door, name: str) -> None:
    direct(SaveTemplate(name=name, operation="train_sae", arguments={"k": 8}))
    call = RunTemplate(template=name, arguments={**TRAIN, "architecture": "standard"}, dry_run=True)
    with pytest.raises(BadInput, match="k belongs to topk"):
        direct(call)
    plan = direct(call.model_copy(update={"arguments": {**call.arguments, "k": None}}))
    assert plan.plan


def test_a_template_runs_with_what_it_lacks_and_settings_merge_one_by_one(direct: Door, name: str) -> None:
    kept = {"model": "tiny", "hook_name": DEMO_HOOK, "d_sae": 64, "lr": 0.002, "batch_size": 512}
    direct(SaveTemplate(name=name, operation="train_sae", arguments=kept))
    with pytest.raises(BadInput, match="dataset is missing"):
        direct(RunTemplate(template=name))
    plan = direct(RunTemplate(template=name, arguments={"dataset": "corpus", "n_tokens": 5120}, dry_run=True))
    assert plan.plan.details.n_steps == 10
    hyperparameters = plain(plan.arguments.hyperparameters)
    assert hyperparameters == {"lr": 0.002, "batch_size": 512, "n_tokens": 5120}
    with pytest.raises(BadInput, match="did you mean dataset"):
        direct(RunTemplate(template=name, arguments={"datset": "corpus"}))
    assert direct(ShowTemplate(template=name)).n_used == 0


def test_running_a_template_twice_with_one_key_is_one_job_and_one_use(direct: Door, name: str) -> None:
    direct(SaveTemplate(name=name, operation="eval_sae", arguments={"sae": "first", "n_tokens": 256}))
    jobs = [direct(RunTemplate(template=name, idempotency_key=name, wait_s=20)) for _ in range(2)]
    assert jobs[0].slug == jobs[1].slug
    assert jobs[1].result.n_tokens > 0
    assert direct(ShowTemplate(template=name)).n_used == 1
    direct(SaveTemplate(name=f"{name}-2", operation="label_features", arguments={"sae": "first", "features": [3]}))
    assert finished(direct, direct(RunTemplate(template=f"{name}-2"))).state == "completed"
    assert direct(ShowTemplate(template=f"{name}-2")).n_used == 1


def test_only_what_starts_a_job_can_be_run(direct: Door, name: str) -> None:
    direct(SaveTemplate(name=name, operation="search_features", arguments={"query": "cats", "limit": 5}))
    with pytest.raises(Unsupported) as refused:
        direct(RunTemplate(template=name))
    assert refused.value.next_call is not None
    assert direct(OPERATIONS[refused.value.next_call.tool](**refused.value.next_call.arguments)).shown <= 5


def test_the_arguments_of_a_job_become_a_template(direct: Door, name: str) -> None:
    feature = direct(SearchFeatures(sae="first", limit=1)).rows[0].ref
    steered = Steer(interventions=[{"feature": feature, "strength": 0.5}], prompt="The", max_new_tokens=4)  # type: ignore[list-item]
    job = finished(direct, direct(steered))
    saved = direct(SaveTemplate(name=name, from_job=f"job/{job.slug}", arguments={"prompt": "A"}))
    kept = plain(saved.arguments)
    assert saved.operation == "steer"
    assert kept["prompt"] == "A" and kept["max_new_tokens"] == 4
    assert kept["interventions"][0]["feature"] == feature
    assert not kept.keys() & {"dry_run", "idempotency_key", "wait_s", "template", "temperature"}
    again = finished(direct, direct(RunTemplate(template=name)))
    assert again.result.prompt == "A"
    with pytest.raises(NotFound):
        direct(SaveTemplate(name=f"{name}-2", from_job="steer-9999"))


def test_a_job_is_kept_without_its_name(direct: Door, name: str) -> None:
    training = TrainSAE(**TRAIN, d_sae=32, name=name, hyperparameters={"n_tokens": 1024, "batch_size": 512})  # type: ignore[arg-type]
    job = finished(direct, direct(training))
    kept = plain(direct(SaveTemplate(name=name, from_job=job.slug)).arguments)
    assert kept == {**TRAIN, "d_sae": 32, "hyperparameters": {"n_tokens": 1024, "batch_size": 512}}


def test_what_was_exported_is_imported_as_it_was(direct: Door, name: str) -> None:
    saved = direct(
        SaveTemplate(name=name, operation="extract", arguments={"n_tokens": 512}, description="d", favourite=True)
    )
    document = plain(direct(ExportTemplate(template=name)))
    assert document == {
        "format": "mistudio-template",
        "version": 1,
        "name": name,
        "operation": "extract",
        "arguments": {"n_tokens": 512},
        "description": "d",
    }
    with pytest.raises(Conflict):
        direct(ImportTemplate(document=document))
    copy = direct(ImportTemplate(document=document, name=f"{name}-copy"))
    assert plain(copy.arguments) == plain(saved.arguments) and copy.description == "d"
    direct(DeleteTemplate(template=name))
    assert direct(ImportTemplate(document=document)).slug == name
    assert direct(ImportTemplate(document=document, replace=True)).slug == name


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"version": 2}, Unsupported, "version 2, and this miStudio reads up to version 1"),
        ({"version": 2, "blend": []}, Unsupported, "version 2"),
        ({"version": 0}, BadInput, "not a template"),
        ({"version": "1"}, BadInput, "not a template"),
        ({"format": "mistudio-sae"}, BadInput, "not a template"),
        ({"name": "../up"}, BadInput, "name"),
        ({"operation": "rm"}, BadInput, "no operation"),
        ({"arguments": {"n_tokens": -1}}, BadInput, "n_tokens = -1"),
        ({"arguments": {"colour": "red"}}, BadInput, "colour"),
        ({"arguments": [1]}, BadInput, "arguments"),
        ({"color": "red"}, BadInput, "color"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_document_that_does_not_fit_changes_nothing(
    direct: Door, name: str, change: dict[str, Any], error: type[MistudioError], says: str
) -> None:
    document = {"format": "mistudio-template", "version": 1, "name": name, "operation": "extract", "arguments": {}}
    before = direct(ListTemplates(limit=200)).total
    with pytest.raises(error) as refused:
        direct(ImportTemplate(document=document | change, replace=True))
    assert type(refused.value) is error
    assert says in str(refused.value) and refused.value.fix
    assert direct(ListTemplates(limit=200)).total == before


def test_find_and_describe_know_templates(call: Door, studio: Served, name: str) -> None:
    complete = {"sae": "first", "n_tokens": 2048}
    studio.engine.call(SaveTemplate(name=name, operation="extract", arguments=complete, favourite=True))
    row = call(Find(kind="template", query=name)).rows[0]
    assert row.ref == f"template/{name}"
    assert "extract" in row.line and "favourite" in row.line
    described = call(Describe(kind="template", slug=name))
    assert described.record.arguments.n_tokens == 2048
    (following,) = described.next_calls
    plan = call(OPERATIONS[following.tool](**plain(following.arguments)))
    assert plan.plan.details.n_tokens == 2048
    studio.engine.call(UpdateTemplate(template=name, arguments={"n_tokens": 512}))
    assert not call(Describe(kind="template", slug=name)).next_calls, "only the caller knows which SAE"
