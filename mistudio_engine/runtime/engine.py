"""The engine: the machine put together, and the one `call` that every door goes through.

It owns the records, the event log, the compute lane with its memory ledger, the job queue, the hub, the monitor and the
search index of one data directory. What an operation does stands in handlers that it is given; it imports no torch and
knows no science.
"""

from __future__ import annotations

import contextvars
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter

from mistudio_engine.api.errors import EngineBusy, Internal, MistudioError
from mistudio_engine.api.home import make_data_dir
from mistudio_engine.api.operations.base import JobOperation, Operation
from mistudio_engine.api.records import Job
from mistudio_engine.runtime.bus import Bus
from mistudio_engine.runtime.compute import ComputeLane
from mistudio_engine.runtime.faults import first_line
from mistudio_engine.runtime.files import sweep_parts
from mistudio_engine.runtime.hub import Hub
from mistudio_engine.runtime.jobs import JobContext, Jobs, Runner
from mistudio_engine.runtime.memory import MemoryLedger
from mistudio_engine.runtime.monitor import Monitor
from mistudio_engine.runtime.secrets import Secrets
from mistudio_engine.runtime.store import Store

if TYPE_CHECKING:
    from mistudio_engine.runtime.index import FeatureIndex  # LanceDB takes a second to import: the handlers open it

__all__ = ["Engine", "Registry", "caller"]

log = logging.getLogger(__name__)

R = TypeVar("R")

FOLDERS = ("models", "datasets", "saes", "trainings", "extractions", "exports", "jobs")

START_WAIT_SECONDS = 60.0
"""How long a call waits for the handlers to be loaded; importing torch takes 2 to 10 seconds."""

CALL_THREADS = 32
"""Calls that may be inside a handler at once; waiting for a job does not hold one."""

_caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="person")


def caller() -> str:
    """Who made the call that is being handled: `person` or `agent:<name>`."""
    return _caller.get()


class Registry(NamedTuple):
    """The handlers, as `mistudio_engine.handlers` gives them."""

    handlers: Mapping[type[Operation[Any]], Callable[..., Any]]
    plans: Mapping[type[Operation[Any]], Callable[..., Any]]
    runs: Mapping[type[Operation[Any]], Any]
    at_once: Collection[type[Operation[Any]]]
    """What is answered while the engine is still starting; everything else waits until `load` is done."""

    load: Callable[[Engine], None]
    """Imports the rest of them, the part that needs torch, and opens the index; called on the compute thread."""

    complete: Callable[[JobOperation[Any], Engine], JobOperation[Any]]
    """Fills in what a call leaves to a template; what it answers is planned, queued and kept."""

    submitted: Callable[[JobOperation[Any], Engine], None]
    """Is told of each new job, within the transaction that queues it."""


class Engine:
    """The engine of one data directory.

    Args:
        home: the data directory; made if it is missing.
        registry: what carries operations out.
        token: what callers must show; a fresh one by default.
    """

    def __init__(self, home: Path | str | None, registry: Registry, *, token: str | None = None) -> None:
        self.home = make_data_dir(home)
        self.registry = registry
        self.token = token or secrets.token_urlsafe(32)
        self.epoch = secrets.token_hex(8)
        self.state = "starting"
        self.started_at = time.time()
        self.offline = os.environ.get("MISTUDIO_OFFLINE") == "1"
        self.device = ""
        """Where models run, such as `cpu` or `cuda:0`; set by the handlers."""
        self.embedder: Any = None
        """The text embedder, set by the handlers once it is known; None compares words only."""
        for folder in FOLDERS:
            (self.home / folder).mkdir(exist_ok=True)
        sweep_parts(self.home)
        self.store = Store(self.home / "mistudio.db")
        self.bus = Bus(self.store)
        self.compute = ComputeLane()
        self.memory = MemoryLedger(self.compute)
        self.hub = Hub(self.home, token=partial(Secrets(self.home).get, "hf_token"))
        self.monitor = Monitor(self.bus)
        self.index: FeatureIndex | None = None
        self.on_stop: list[Callable[[], None]] = []
        """What closes whatever the handlers have opened beside these; none of it may wait."""
        self._runners: dict[str, Runner] = {}
        # Offline nothing passes by itself: a retry would only wait.
        backoff = {"backoff_seconds": ()} if self.offline else {}
        self.jobs = Jobs(self.store, self.bus, self.compute, self.home, self._runners, **backoff)
        self.jobs.on_device_lost(self._device_lost)
        self.restart: Callable[[], object] | None = None
        """Ends this process at once, for another to go on after the device was lost; set by who can start another."""
        self._ready = threading.Event()
        self._start_error: BaseException | None = None
        self._submitting = threading.Lock()
        self._limiter: CapacityLimiter | None = None

    def start(self) -> None:
        """Start the threads; the handlers are loaded on the compute thread while the socket listens already."""
        self.compute.start()
        self.monitor.start()
        threading.Thread(target=self._load, name="mistudio-start", daemon=True).start()

    def _load(self) -> None:
        try:
            self.compute.run(partial(self.registry.load, self))
            for kind, run in self.registry.runs.items():
                self._runners[kind.tool] = Runner(partial(self._run, run.function), run.lane, run.resumes)
            self.jobs.recover()
            self.state = "ready"
        except BaseException as error:
            log.exception("the engine could not start")
            self._start_error = error
        finally:
            self._ready.set()

    def _run(self, function: Callable[..., Any], operation: Operation[Any], context: JobContext) -> Any:
        return function(operation, self, context)

    def _device_lost(self, why: str) -> None:
        """Nothing may run here any more: the jobs are interrupted, and the process ends."""
        log.critical("the device was lost: %s; this engine ends and its jobs go on in the next one", why)
        self.state = "restarting" if self.restart else "stopping"
        self.compute.close()
        self.store.after_commit(partial(self._leave, why))

    def _leave(self, why: str) -> None:
        self.jobs.abandon(why)
        if self.restart:
            self.restart()

    def stop(self, seconds: float = 10.0) -> None:
        """Let running jobs write a checkpoint, then stop every thread and close every file.

        A step that has not ended after `seconds` is left behind, with its thread.
        """
        ends_at = time.monotonic() + seconds
        self.state = "stopping"
        for close in self.on_stop:
            close()
        self.jobs.shutdown(seconds)
        self.monitor.stop()
        self.compute.stop(max(0.0, ends_at - time.monotonic()))
        self.memory.clear()
        if self.index is not None:
            self.index.close()
        self.store.close()

    def wait_ready(self, seconds: float = START_WAIT_SECONDS) -> None:
        """Wait until the handlers are loaded.

        Raises:
            EngineBusy: it takes longer.
            Internal: they could not be loaded.
        """
        if not self._ready.wait(seconds):
            raise EngineBusy(
                "The engine is still starting.", fix="Call again in a few seconds.", next_call=("status", {})
            )
        if self._start_error is not None:
            raise Internal(
                f"The engine could not start: {self._start_error}.", fix="`mistudio doctor` checks the installation."
            )

    def call(self, operation: Operation[R], *, caller: str = "person") -> R:
        """Carry an operation out, from any thread but the compute thread.

        A `JobOperation` answers its job, after waiting at most its `wait_s` for the end.
        """
        result = self._dispatch(operation, caller)
        if isinstance(result, Job) and (seconds := _seconds_to_wait(operation, result)):
            return self.jobs.wait(result.slug, seconds)  # type: ignore[return-value]
        return result

    async def acall(self, operation: Operation[R], *, caller: str = "person") -> R:
        """`call` for an event loop, which it never blocks; a wait for a job holds no thread."""
        if self._limiter is None:
            self._limiter = CapacityLimiter(CALL_THREADS)
        result = await anyio.to_thread.run_sync(self._dispatch, operation, caller, limiter=self._limiter)
        if isinstance(result, Job) and (seconds := _seconds_to_wait(operation, result)):
            return await self.jobs.wait_async(result.slug, seconds)  # type: ignore[return-value]
        return result

    def _dispatch(self, operation: Operation[R], who: str) -> R:
        token = _caller.set(who)
        try:
            kind = type(operation)
            if kind not in self.registry.at_once:
                self.wait_ready()
            if isinstance(operation, JobOperation):
                return self._submit(operation, who)  # type: ignore[return-value]
            return self.registry.handlers[kind](operation, self)
        except MistudioError:
            raise
        except Exception as error:
            judged = self._judged(error, type(operation).tool)
            if judged is error:
                raise
            raise judged from error
        finally:
            _caller.reset(token)

    def _judged(self, error: Exception, what: str) -> Exception:
        """What an error that is none of ours means for the caller, and for the engine."""
        if self.jobs.faults.is_device_lost(error):
            why = first_line(error)
            self._device_lost(why)
            return Internal(f"The device was lost: {why}.", fix="The engine starts again; call again then.")
        return self.jobs.faults.in_our_words(error, what) or error

    def _submit(self, operation: JobOperation[Any], who: str) -> Job:
        kind = type(operation)
        if operation.dry_run:  # without the lock: a plan may ask the hub, for which nobody else should wait
            operation = self.registry.complete(operation, self)
            planned = self.registry.plans[kind](operation, self)
            return Job(
                slug="dry-run",
                operation=kind.tool,
                arguments=operation.model_dump(mode="json", exclude_defaults=True),
                plan=planned.plan,
                settled=dict(planned.settled),
                subject=planned.subject,
                message="This is only the plan: nothing was started. Call again without dry_run to start it.",
            )
        with self._submitting:  # between looking for the key and writing it nobody else may come
            existing = self.jobs.with_key(operation)
            if existing is not None:
                return existing
            operation = self.registry.complete(operation, self)
            planned = self.registry.plans[kind](operation, self)
            with self.store.transaction():  # the job and the record that it works on, or neither
                if planned.open is not None:
                    planned.open()
                self.registry.submitted(operation, self)
                return self.jobs.submit(
                    operation,
                    plan=planned.plan,
                    settled=planned.settled,
                    subject=planned.subject,
                    author=who,
                    priority=planned.priority,
                )


def _seconds_to_wait(operation: Operation[Any], job: Job) -> float:
    """How long a call waits for its job; a plan was never started."""
    if job.finished or getattr(operation, "dry_run", False):
        return 0.0
    return getattr(operation, "wait_s", 0.0)
