"""Handlers of api/operations/templates.py, and what becomes of a call that names a template.

A call's own arguments are laid over the template's before anything else looks at it, so the job that is queued has them
all: it does not change when the template does. It knows no operation by name.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mistudio_engine.api.errors import BadInput, Conflict, NextCall, Unsupported
from mistudio_engine.api.operations import OPERATIONS, JobOperation, Operation
from mistudio_engine.api.operations.datasets import Deleted
from mistudio_engine.api.operations.templates import (
    TEMPLATE_VERSION,
    CloneTemplate,
    DeleteTemplate,
    ExportTemplate,
    ImportTemplate,
    ListTemplates,
    RunTemplate,
    SaveTemplate,
    ShowTemplate,
    TemplateDocument,
    UpdateTemplate,
)
from mistudio_engine.api.partial import checked, merged, secrets_in
from mistudio_engine.api.records import Job, Page, TemplateRecord
from mistudio_engine.api.wire import parse_operation, problems_in
from mistudio_engine.handlers.registry import handles
from mistudio_engine.runtime.engine import Engine, caller
from mistudio_engine.runtime.job_book import NOT_ARGUMENTS, rebuilt

__all__ = ["apply_template", "count_use", "next_calls"]

OF_ONE_CALL = NOT_ARGUMENTS | {"name", "template", "base_url"}
"""Arguments that a template does not have: they concern one call, are a name that can be given once, or say where
prompts are sent, which somebody could slip to others in a template."""


def apply_template(operation: JobOperation[Any], engine: Engine) -> JobOperation[Any]:
    """The operation with its template's arguments below its own; as it is when there is none.

    A call that names no template gets the default one; one that says null gets none.

    Raises:
        NotFound: there is no such template.
        BadInput: the template is another operation's, or the two together make no sense.
    """
    record = _template_of(operation, engine)
    if record is None:
        return operation
    if record.operation != operation.tool:
        raise BadInput(
            f"{record.ref} is a template for {record.operation}, not for {operation.tool}.",
            fix=f"Use one for {operation.tool}, or none.",
            next_call=("find", {"kind": "template", "query": operation.tool}),
        )
    own = operation.model_dump(mode="json", exclude_unset=True) | {"template": record.slug}
    try:
        return type(operation).model_validate(merged(record.arguments, own))
    except ValidationError as error:
        raise BadInput(
            f"{operation.tool} cannot be called like this: {'; '.join(problems_in(error, operation.tool))}.",
            why=f"{record.ref} gives {_listed(record.arguments)}.",
            fix="An argument of the call takes the place of the template's; null takes one away.",
        ) from None


def _template_of(operation: JobOperation[Any], engine: Engine) -> TemplateRecord | None:
    """The template that a call names, else the default of its operation, unless it says that it wants none."""
    name = getattr(operation, "template", None)
    if name is not None:
        return engine.store.get(TemplateRecord, name)
    if "template" not in type(operation).model_fields or "template" in operation.model_fields_set:
        return None
    return next(iter(engine.store.all(TemplateRecord, operation=operation.tool, default=True)), None)


def count_use(operation: JobOperation[Any], engine: Engine) -> None:
    """Note that a job was started with a template; within the transaction that queues it."""
    name = getattr(operation, "template", None)
    if name is not None:
        _count(engine, name)


def _count(engine: Engine, name: str) -> None:
    with engine.store.transaction():
        if engine.store.exists(TemplateRecord, name):
            n_used = engine.store.get(TemplateRecord, name).n_used + 1
            engine.store.update(TemplateRecord, name, n_used=n_used, last_used_at=time.time())


def _listed(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())[:500] or "nothing"


def _kind(tool: str) -> type[Operation[Any]]:
    """The operation that a template is for."""
    kind = OPERATIONS.get(tool)
    if kind is None:
        likely = difflib.get_close_matches(tool, OPERATIONS, 3)
        raise BadInput(
            f"There is no operation {tool[:80]!r}.",
            why=f"Did you mean {' or '.join(likely)}?" if likely else "",
            fix="Name one as the command line and the tools have it, such as train_sae or extract.",
        )
    if not kind.model_fields.keys() - OF_ONE_CALL:
        raise BadInput(f"{tool} takes no arguments that a template could keep.", fix="Call it as it is.")
    return kind


def _arguments(kind: type[Operation[Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What somebody gave for a template, in the operation's own names.

    Raises:
        BadInput: an argument that is unknown, impossible, a secret, or of one call only.
    """
    found = checked(kind, arguments)
    if only := sorted(found.keys() & OF_ONE_CALL):
        raise BadInput(
            f"{', '.join(only)} cannot be kept in a template.",
            why="It concerns one call.",
            fix="Leave it out here and give it with the call.",
        )
    if secrets := secrets_in(kind, found):
        raise BadInput(
            f"{', '.join(secrets)} cannot be kept in a template.",
            why="It is, or holds, a secret, and templates are shown and passed on.",
            fix="Leave it out here and give it with the call.",
        )
    return found


def _keep(engine: Engine, record: TemplateRecord, *, replace: bool) -> TemplateRecord:
    record = record.model_copy(update={"updated_at": time.time()})
    with engine.store.transaction():
        if engine.store.exists(TemplateRecord, record.slug):
            if not replace:
                raise Conflict(
                    f"There is a template {record.slug!r} already.",
                    fix="Give another name, or replace=true to write over it.",
                    next_call=("describe", {"ref": record.ref}),
                )
            earlier = engine.store.get(TemplateRecord, record.slug)
            if earlier.default and earlier.operation == record.operation:
                record = record.model_copy(update={"default": True})
        if record.default:
            _make_default(engine, record)
        return engine.store.put(record)


@handles(SaveTemplate)
def save_template(operation: SaveTemplate, engine: Engine) -> TemplateRecord:
    if operation.from_job is not None:
        tool, arguments = _of_job(engine.store.get(Job, operation.from_job))
    else:
        assert operation.operation is not None
        tool, arguments = operation.operation, {}
    kind = _kind(tool)
    record = TemplateRecord(
        slug=operation.name,
        operation=tool,
        arguments=merged(arguments, _arguments(kind, operation.arguments)),
        description=operation.description,
        favourite=operation.favourite,
        version=TEMPLATE_VERSION,
    )
    return _keep(engine, record, replace=operation.replace)


def _of_job(job: Job) -> tuple[str, dict[str, Any]]:
    """The operation of a job and what of its arguments is not default, without what is its own or secret."""
    arguments = rebuilt(job).model_dump(mode="json", exclude_defaults=True, exclude=set(OF_ONE_CALL))
    for name in secrets_in(OPERATIONS[job.operation], arguments):
        del arguments[name]
    return job.operation, arguments


@handles(ListTemplates)
def list_templates(operation: ListTemplates, engine: Engine) -> Page[TemplateRecord]:
    where = {name: value for name in ("operation", "favourite") if (value := getattr(operation, name)) is not None}
    return engine.store.page(
        TemplateRecord, query=operation.query, where=where, limit=operation.limit, cursor=operation.cursor
    )


@handles(ShowTemplate)
def show_template(operation: ShowTemplate, engine: Engine) -> TemplateRecord:
    return engine.store.get(TemplateRecord, operation.template)


@handles(UpdateTemplate)
def update_template(operation: UpdateTemplate, engine: Engine) -> TemplateRecord:
    with engine.store.transaction():
        record = engine.store.get(TemplateRecord, operation.template)
        given = {name: getattr(operation, name) for name in ("description", "favourite", "default")}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if operation.default:
            _make_default(engine, record)
        if operation.arguments is not None:
            changes["arguments"] = _arguments(_kind(record.operation), operation.arguments)
        if operation.name in (None, record.slug):
            return engine.store.update(TemplateRecord, record.slug, **changes, updated_at=time.time())
        renamed = record.model_copy(update={**changes, "slug": operation.name})
        renamed = _keep(engine, renamed, replace=False)
        engine.store.delete(TemplateRecord, record.slug)
        return renamed


def _make_default(engine: Engine, record: TemplateRecord) -> None:
    """Make room for a default: the one that the operation had is none any more.

    Raises:
        BadInput: the operation takes no template.
    """
    if "template" not in _kind(record.operation).model_fields:
        raise BadInput(
            f"{record.ref} cannot be a default: {record.operation} takes no template.",
            fix="Start it with run_template.",
        )
    for other in engine.store.all(TemplateRecord, operation=record.operation, default=True):
        if other.slug != record.slug:
            engine.store.update(TemplateRecord, other.slug, default=False)


@handles(CloneTemplate)
def clone_template(operation: CloneTemplate, engine: Engine) -> TemplateRecord:
    with engine.store.transaction():
        record = engine.store.get(TemplateRecord, operation.template)
        copy = TemplateRecord(
            slug=operation.name or engine.store.new_slug(TemplateRecord, record.slug),
            operation=record.operation,
            arguments=record.arguments,
            description=record.description,
            version=record.version,
        )
        return _keep(engine, copy, replace=False)


@handles(DeleteTemplate)
def delete_template(operation: DeleteTemplate, engine: Engine) -> Deleted:
    engine.store.delete(TemplateRecord, operation.template)
    return Deleted(ref=f"template/{operation.template}")


@handles(ExportTemplate)
def export_template(operation: ExportTemplate, engine: Engine) -> TemplateDocument:
    record = engine.store.get(TemplateRecord, operation.template)
    return TemplateDocument(
        name=record.slug, operation=record.operation, arguments=record.arguments, description=record.description
    )


@handles(ImportTemplate)
def import_template(operation: ImportTemplate, engine: Engine) -> TemplateRecord:
    document = _read(operation.document)
    record = TemplateRecord(
        slug=operation.name or document.name,
        operation=document.operation,
        arguments=_arguments(_kind(document.operation), document.arguments),
        description=document.description,
        version=TEMPLATE_VERSION,
    )
    return _keep(engine, record, replace=operation.replace)


def _read(document: Mapping[str, Any]) -> TemplateDocument:
    """A document as it is.

    Raises:
        Unsupported: a newer miStudio wrote it.
        BadInput: it is no template.
    """
    version = document.get("version")
    if document.get("format") != "mistudio-template" or not isinstance(version, int) or version < 1:
        raise BadInput(
            "This document is not a template.",
            why=f"Its format is {document.get('format')!r:.80} and its version {version!r:.80}.",
            fix='Give what export_template wrote: {"format": "mistudio-template", "version": 1, …}.',
        )
    if version > TEMPLATE_VERSION:
        raise Unsupported(
            f"This template has version {version}, and this miStudio reads up to version {TEMPLATE_VERSION}.",
            why="A newer miStudio wrote it.",
            fix="Upgrade miStudio (pip install -U mistudio); nothing was changed.",
        )
    try:
        return TemplateDocument.model_validate(document)
    except ValidationError as error:
        raise BadInput(
            f"This template cannot be read: {'; '.join(problems_in(error, 'a template'))}.",
            fix="Give what export_template wrote, unchanged.",
        ) from None


@handles(RunTemplate)
def run_template(operation: RunTemplate, engine: Engine) -> Job:
    record = engine.store.get(TemplateRecord, operation.template)
    kind = _kind(record.operation)
    if not issubclass(kind, JobOperation):
        raise Unsupported(
            f"{record.operation} starts no job.",
            fix="Call it with the template's arguments yourself.",
            next_call=(record.operation, record.arguments),
        )
    own = checked(kind, operation.arguments)
    call = {"dry_run": operation.dry_run, "idempotency_key": operation.idempotency_key}
    names_it = "template" in kind.model_fields
    arguments = {**merged(record.arguments, own), **call, **({"template": record.slug} if names_it else {})}
    asked = parse_operation(kind, arguments)
    assert isinstance(asked, JobOperation)
    is_new = engine.jobs.with_key(asked) is None
    job = engine.call(asked, caller=caller())
    if is_new and not names_it and not operation.dry_run:
        _count(engine, record.slug)
    return job


def next_calls(record: TemplateRecord) -> list[NextCall]:
    """Calls that use a template; none while it lacks arguments that only the caller can give."""
    kind = OPERATIONS.get(record.operation)
    if kind is None:
        return []
    try:
        kind.model_validate(record.arguments)
    except ValidationError:
        return []
    dry = {"dry_run": True} if issubclass(kind, JobOperation) else {}
    if "template" not in kind.model_fields:
        return [NextCall(tool=record.operation, arguments={**record.arguments, **dry})]
    needed = {name: record.arguments[name] for name, info in kind.model_fields.items() if info.is_required()}
    return [NextCall(tool=record.operation, arguments={**needed, "template": record.slug, **dry})]
