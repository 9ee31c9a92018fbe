"""Handlers of api/operations/reproduce.py: a finished training's job is started once more and its tensors compared.

The repetition is a job of its own, queued like any other; ours only waits for it, on the I/O lane. It knows the records
of trainings, and of the operation no more than that it has a name and a seed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from mistudio_engine.api.errors import Cancelled, Conflict, JobFailed, NotFound, Unsupported, error_from_body
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.api.operations import OPERATIONS, JobOperation
from mistudio_engine.api.operations.reproduce import Change, Reproduce, Reproduction
from mistudio_engine.api.records import (
    DatasetRecord,
    Job,
    JobState,
    ModelRecord,
    SAERecord,
    TokensRecord,
    TrainingRecord,
)
from mistudio_engine.handlers.datasets import hashed
from mistudio_engine.handlers.registry import Planned, plans, runs
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.job_states import ACTIVE_STATES
from mistudio_engine.runtime.jobs import JobContext

WAIT_SECONDS = 0.5
"""Between two looks at how far the repetition is."""


class Source(NamedTuple):
    """What is to be made again."""

    training: TrainingRecord
    job: Job
    saes: list[int]
    """Which of the training's SAEs are compared."""


@plans(Reproduce)
def plan_reproduce(operation: Reproduce, engine: Engine) -> Planned:
    source = _source(operation.ref, engine)
    again = _again(source, _name(operation, source, engine))
    planned = engine.registry.plans[type(again)](again, engine)
    plan = planned.plan.model_copy(update={"summary": f"Make {operation.ref} again. {planned.plan.summary}"})
    return Planned(plan)


def _source(ref: str, engine: Engine) -> Source:
    """The training that a ref leads to, with the job that made it.

    Raises:
        NotFound: one of them is not here any more.
        Conflict: it has not come to its end.
        Unsupported: what is recorded does not suffice to make it again.
    """
    kind, _, slug = ref.partition("/")
    sae = engine.store.get(SAERecord, slug) if kind == "sae" else None
    if sae is not None:
        slug = sae.training or ""
    if kind == "job":
        slug = (engine.jobs.get(slug).subject or "").removeprefix("training/")
    if not engine.store.exists(TrainingRecord, slug):
        raise NotFound(
            f"The training behind {ref} is not here.",
            why="It was brought in from elsewhere, or its training has been deleted.",
            fix="Only what was trained here, and whose training is still listed, can be made again.",
            next_call=("find", {"kind": "training"}),
        )
    training = engine.store.get(TrainingRecord, slug)
    if not training.jobs:
        raise Conflict(f"{training.ref} was never started.", fix="Start it, or name another.")
    job = engine.jobs.get(training.jobs[-1])
    _check(training, job, engine)
    return Source(training, job, [training.saes.index(sae.slug)] if sae else list(range(len(training.saes))))


def _check(training: TrainingRecord, job: Job, engine: Engine) -> None:
    if job.state != JobState.COMPLETED:
        raise Conflict(
            f"{training.ref} is {training.status}.",
            fix="Wait until it is completed: there is nothing to compare with before.",
            next_call=("job", {"id": job.slug}),
        )
    asked = engine.store.events_after(0, [f"jobs/{job.slug}"], names=["asked"])
    if any(event.data.get("action") == "stop" for event in asked):
        raise Unsupported(
            f"{training.ref} was ended early by hand.",
            why="Run to its end it would become another SAE.",
            fix="Train it again with as many n_tokens as it had seen, which its metrics say.",
        )
    kind = OPERATIONS.get(job.operation)
    if kind is None or not {"name", "seed"} <= kind.model_fields.keys():
        raise Unsupported(
            f"{job.ref} cannot be made again.",
            why=f"{job.operation} has no name and seed of its own.",
            fix="Name a training or an SAE that was trained here.",
        )
    missing = [slug for slug in training.saes if not engine.store.exists(SAERecord, slug)]
    if missing or not training.saes:
        raise NotFound(
            f"{training.ref} has nothing left to compare with.",
            why=f"Deleted: {', '.join(missing)}." if missing else "It made no SAE.",
            fix="Start the same training anew with train_sae.",
        )


def _name(operation: Reproduce, source: Source, engine: Engine) -> str:
    stem = f"{source.training.slug}-again"[:110]
    return operation.name or next(slug for slug in _numbered(stem) if not _is_taken(slug, engine))


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def _is_taken(slug: str, engine: Engine) -> bool:
    return engine.store.exists(TrainingRecord, slug) or engine.store.exists(SAERecord, slug)


def _again(source: Source, name: str, key: str | None = None) -> JobOperation[Any]:
    """The same call under another name, on the very tokens that were used then."""
    arguments = {**source.job.arguments, "name": name, "idempotency_key": key}
    arguments.pop("template", None)  # what it gave is among the arguments
    if source.training.tokens:
        arguments["dataset"] = f"tokens/{source.training.tokens}"
    return OPERATIONS[source.job.operation].model_validate(arguments)  # type: ignore[return-value]


@runs(Reproduce, lane="io", resumes="start")
def run_reproduce(
    operation: Reproduce, engine: Engine, context: JobContext
) -> Generator[Progress, Signal, Reproduction]:
    source = _source(operation.ref, engine)
    key = f"{context.job.ref}#{context.attempt}"  # after a restart the repetition is found again
    job = next(iter(engine.store.all(Job, idempotency_key=key)), None)
    if job is None:
        job = engine.call(_again(source, _name(operation, source, engine), key), caller=context.job.author)
    job = yield from _end_of(job, engine, context)
    if job.error is not None:
        raise error_from_body(job.error)
    if job.state != JobState.COMPLETED:
        raise Cancelled(f"{job.ref}, the repetition, was cancelled.", fix="Retry this job to begin another.")
    made = engine.store.get(TrainingRecord, (job.subject or "").partition("/")[2])
    changes = list(_changes(_recorded(source.training), _recorded(made)))
    changes += yield from _touched(source.training, engine)
    return _compared(operation.ref, source, made, changes, engine)


def _recorded(training: TrainingRecord) -> dict[str, Any]:
    """How it was made: a call that leaves settings open may mean others today."""
    members = {each.name: {"config": each.config, "hyperparameters": each.hyperparameters} for each in training.members}
    return training.provenance | {"members": members}


def _touched(training: TrainingRecord, engine: Engine) -> Generator[Progress, Signal, list[Change]]:
    """The files behind a training that are no longer what their records say, whoever touched them."""
    tokens = engine.store.get(TokensRecord, training.tokens)
    dataset = engine.store.get(DatasetRecord, tokens.dataset)
    model = engine.store.get(ModelRecord, training.model)
    text = engine.home / dataset.folder if dataset.folder else Path(dataset.source)
    files = {
        "dataset": (dataset.sha256, [text]),
        "model": (model.sha256, sorted((engine.home / model.folder).glob("*.safetensors"))),
        "tokens": (tokens.sha256, [engine.home / tokens.folder / "tokens.safetensors"]),
    }
    found = []
    for name, (then, paths) in files.items():
        digests = []
        for path in paths:
            digests.append((yield from hashed(path)) if path.exists() else "missing")
        if (now := ",".join(digests)) != then:
            found.append(Change(what=f"files.{name}", then=then, now=now))
    return found


def _end_of(job: Job, engine: Engine, context: JobContext) -> Generator[Progress, Signal, Job]:
    """The repetition once it has ended; it is paused and cancelled together with ours."""
    if job.state in (JobState.PAUSED, JobState.INTERRUPTED):
        engine.jobs.control(job.slug, "resume")
    try:
        while not (job := engine.jobs.get(job.slug)).finished:
            said = job.model_dump(include={"rate", "unit", "eta_seconds"})
            yield Progress(stage=f"{job.ref}: {job.stage or job.state}", fraction=job.progress, **said)
            if job.state in ACTIVE_STATES:
                engine.jobs.wait(job.slug, WAIT_SECONDS)
            else:
                time.sleep(WAIT_SECONDS)  # somebody has paused it
    except GeneratorExit:
        if engine.state == "ready":  # else it goes on when the engine starts again, as ours does
            action = "pause" if engine.jobs.get(context.job.slug).state == JobState.PAUSING else "cancel"
            with suppress(Conflict):
                engine.jobs.control(job.slug, action)
        raise
    return job


def _compared(ref: str, source: Source, made: TrainingRecord, changes: list[Change], engine: Engine) -> Reproduction:
    if len(made.saes) != len(source.training.saes):
        raise JobFailed(
            f"{made.ref} made {len(made.saes)} SAEs and {source.training.ref} {len(source.training.saes)}.",
            fix="Compare their records with describe.",
        )
    hashes = []
    for training in (source.training, made):
        records = [engine.store.get(SAERecord, training.saes[number]) for number in source.saes]
        hashes.append(
            {
                f"{number}:{name}" if len(records) > 1 else name: digest
                for number, record in enumerate(records)
                for name, digest in tensor_hashes(engine.home / record.folder).items()
            }
        )
    then, now = hashes
    differing = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    return Reproduction(
        ref=ref,
        made=made.ref,
        identical=not differing,
        n_tensors=len(then),
        differing=differing,
        changes=changes,
        summary=_summary(ref, made.ref, len(then), differing, changes),
    )


def tensor_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor's type, shape and bits in the safetensors files of a folder, by file and name.

    Not of the files: their headers, and the configuration beside them, carry names.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dict
                tensor = file.get_tensor(name)
                digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
                found[f"{path.stem}/{name}"] = digest.hexdigest()
    return found


def _changes(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[Change]:
    """What differs between two records of how something was made, by its path in them."""
    for name in sorted(then.keys() | now.keys()):
        one, other = then.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changes(one, other, f"{prefix}{name}.")
        elif one != other:
            yield Change(what=f"{prefix}{name}", then=one, now=other)


def _summary(ref: str, made: str, n_tensors: int, differing: list[str], changes: list[Change]) -> str:
    if not differing:
        said = f"{ref} was made again as {made}: all {n_tensors} tensors are identical"
    else:
        shown = ", ".join(differing[:5]) + (", …" if len(differing) > 5 else "")
        said = f"{ref} was made again as {made}: {len(differing)} of {n_tensors} tensors differ ({shown})"
    if changes:
        return f"{said}; {', '.join(f'{each.what} was {each.then!r} and is {each.now!r}' for each in changes)}."
    return f"{said}; nothing that is recorded has changed." if differing else f"{said}."
