"""Operations on templates: arguments that are kept under a name, to be used again and passed on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from mistudio_engine.api.operations.base import Operation, WaitSeconds
from mistudio_engine.api.operations.datasets import Deleted, Limit
from mistudio_engine.api.operations.jobs import JobRef
from mistudio_engine.api.records import Data, Job, Page, TemplateRecord
from mistudio_engine.api.refs import Slug, TemplateRef

__all__ = [
    "TEMPLATE_VERSION",
    "CloneTemplate",
    "DeleteTemplate",
    "ExportTemplate",
    "ImportTemplate",
    "ListTemplates",
    "RunTemplate",
    "SaveTemplate",
    "ShowTemplate",
    "TemplateDocument",
    "UpdateTemplate",
]

TEMPLATE_VERSION = 1
"""Of the document that an export writes; one with a higher number is refused."""

Text = Annotated[str, Field(max_length=2000)]


class TemplateDocument(Data):
    """A template as it is passed on: plain JSON without anything of this engine in it."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["mistudio-template"] = "mistudio-template"
    version: int = TEMPLATE_VERSION
    name: Slug
    operation: str
    arguments: dict[str, Any] = {}
    description: Text = ""


class SaveTemplate(Operation[TemplateRecord], route="POST /templates"):
    """Keep arguments of an operation under a name: those given, or those of a job that went well.

    Use it with the operation's argument `template`, or with run_template. Names, keys and secrets are not kept.
    """

    name: Slug
    operation: str | None = None
    """Such as train_sae; with from_job it is the job's."""

    arguments: dict[str, Any] = {}
    """As many as you like; with from_job they take the place of the job's."""

    from_job: JobRef | None = None
    """Take the arguments of this job."""

    description: Text = ""
    favourite: bool = False
    replace: bool = False
    """Write over a template of this name."""

    @model_validator(mode="after")
    def _says_which(self) -> SaveTemplate:
        if (self.operation is None) == (self.from_job is None):
            raise ValueError("give either operation with arguments, or from_job")
        return self


class ListTemplates(Operation[Page[TemplateRecord]], route="GET /templates"):
    """List templates, newest first."""

    query: str | None = None
    """Part of a name, a description or an operation."""

    operation: str | None = None
    favourite: bool | None = None
    limit: Limit = 50
    cursor: str | None = None


class ShowTemplate(Operation[TemplateRecord], route="GET /templates/{template}"):
    """One template."""

    template: TemplateRef


class UpdateTemplate(Operation[TemplateRecord], route="PATCH /templates/{template}", idempotent=True):
    """Change a template: its name, description, arguments, whether it is a favourite or the default. What was started
    with it stays as it was.
    """

    template: TemplateRef
    name: Slug | None = None
    """Another name."""

    description: Text | None = None
    favourite: bool | None = None
    default: bool | None = None
    """Use it for its operation whenever a call names no template, in the place of the one that was the default."""

    arguments: dict[str, Any] | None = None
    """All of them anew; those that it had and that are not among them are gone."""


class CloneTemplate(Operation[TemplateRecord], route="POST /templates/{template}/clone"):
    """Copy a template under another name, to change the copy."""

    template: TemplateRef
    name: Slug | None = None
    """The copy's; by default the first free one of name-2, name-3, …"""


class DeleteTemplate(Operation[Deleted], route="DELETE /templates/{template}"):
    """Delete a template. What was started with it stays."""

    template: TemplateRef


class ExportTemplate(Operation[TemplateDocument], route="GET /templates/{template}/export"):
    """A template as a JSON document, to be passed on and brought in elsewhere with import_template."""

    template: TemplateRef


class ImportTemplate(Operation[TemplateRecord], route="POST /templates/import"):
    """Bring in a template that export_template wrote. One of a newer version is refused and nothing is changed."""

    document: dict[str, Any]
    """What export_template answered."""

    name: Slug | None = None
    """Another name than the document's."""

    replace: bool = False
    """Write over a template of this name."""


class RunTemplate(Operation[Job], route="POST /templates/{template}/run"):
    """Start a template's operation with its arguments and those given here, which count where both have one."""

    template: TemplateRef
    arguments: dict[str, Any] = {}
    dry_run: bool = False
    """Only say what it would cost."""

    idempotency_key: Annotated[str, Field(max_length=200)] | None = None
    """Two calls with one key start one job."""

    wait_s: WaitSeconds = 0.0
    """Wait this long for the end before answering with the job as it stands."""
