"""The client: the engine's operations as calls, sync and async.

`Studio` is for notebooks and scripts, `AsyncStudio` for async programs; the first runs the second on a thread of
its own, so both are the same client. Every operation is a method (`studio.train_sae(...)`) and a value
(`studio.call(TrainSAE(...))`). The client finds the engine through its data directory or starts it, and finds it again
after it restarted. It knows nothing of torch, and nothing of what the engine does with a call.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import httpx
from pydantic import BaseModel, PrivateAttr

from mistudio_engine.api import wire
from mistudio_engine.api.errors import (
    Cancelled,
    EngineMissing,
    ErrorBody,
    Internal,
    JobFailed,
    Unreachable,
    error_from_body,
)
from mistudio_engine.api.events import Event
from mistudio_engine.api.exports import Download
from mistudio_engine.api.home import EngineFile, data_dir, ensure_engine, probe
from mistudio_engine.api.operations import OPERATIONS, ControlJob, JobOperation, Operation, ShowJob, Status
from mistudio_engine.api.records import Job

__all__ = ["AsyncStudio", "JobHandle", "Studio", "connect"]

R = TypeVar("R")
Outcome = TypeVar("Outcome")

WAIT_SLICE_SECONDS = 20.0
"""A wait is asked for in slices of this length, so that no request outlives a proxy's patience."""


class AsyncStudio:
    """A connection to one engine.

    Args:
        home: data directory of the engine; by default MISTUDIO_HOME or the user's data folder.
        autostart: start the engine when none answers.
        caller: who signs labels and jobs: `person` or `agent:<name>`.
    """

    def __init__(self, home: Path | str | None = None, *, autostart: bool = True, caller: str = "person") -> None:
        self.home = data_dir(home)
        self.autostart = autostart
        self.caller = caller
        self._engine: EngineFile | None = None
        # Local traffic must not go through a proxy that the environment names.
        self._http = httpx.AsyncClient(trust_env=False, timeout=httpx.Timeout(60.0, connect=5.0))

    async def __aenter__(self) -> AsyncStudio:
        await self.engine()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; the engine goes on."""
        await self._http.aclose()

    async def engine(self, *, renew: bool = False) -> EngineFile:
        """Where the engine is, found or started.

        Raises:
            EngineMissing: none answers and `autostart` is off, or its packages are not installed.
        """
        if self._engine is None or renew:
            find = ensure_engine if self.autostart else probe
            self._engine = await asyncio.to_thread(find, self.home)
        if self._engine is None:
            raise EngineMissing(
                f"No engine runs on {self.home}.",
                fix="Start it with `mistudio engine start`, or connect() without autostart=False.",
            )
        return self._engine

    async def call(self, operation: Operation[R]) -> R:
        """Carry an operation out and answer its result.

        Raises:
            MistudioError: whatever the engine raised, of the same class.
        """
        response = await self._send(operation)
        if type(operation).result is Download:
            return _download_of(response)  # type: ignore[return-value]
        return wire.result_of(type(operation), response.json())

    async def _send(self, operation: Operation[Any]) -> httpx.Response:
        repeatable = type(operation).idempotent or _has_key(operation)
        for is_last in (False, True):
            # The second time it is looked up anew: it may have restarted, with another port and token.
            engine = await self.engine(renew=is_last)
            try:
                response = await self._request(engine, operation)
            except httpx.TransportError as error:
                was_sent = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                if is_last or (was_sent and not repeatable):
                    self._engine = None
                    raise _broken(error, was_sent and not repeatable) from None
            else:
                if is_last or response.status_code != 401:
                    break
        if response.is_error:
            raise _error_of(response)
        return response

    async def _request(self, engine: EngineFile, operation: Operation[Any]) -> httpx.Response:
        request = wire.request_of(operation)
        sent = self._http.build_request(
            request.method,
            engine.url + request.path,
            params=request.query or None,
            json=request.body,
            headers={"Authorization": f"Bearer {engine.token}", wire.CALLER_HEADER: self.caller},
        )
        # The engine is on this machine: of a file its path is enough, and its bytes, maybe gigabytes, need not travel.
        response = await self._http.send(sent, stream=type(operation).result is Download)
        if response.is_error:
            await response.aread()
        elif not response.is_closed:
            await response.aclose()
        return response

    async def follow(self, channels: Iterable[str] = ("*",), after: int | None = None) -> AsyncIterator[Event]:
        """Events as they come, from just after number `after`; durable ones once each and without a gap.

        It goes on through restarts of the engine.

        Args:
            channels: such as `jobs/train-0007` or `system/cpu`; `*` is all of them.
            after: replay from here; None begins with what comes now.

        Raises:
            BadInput: `after` is not a number of the log.
        """
        import websockets.asyncio.client as sockets
        from websockets.exceptions import ConnectionClosed, InvalidHandshake

        wanted = list(channels)
        while True:
            engine = await self.engine()
            url = "ws" + engine.url.removeprefix("http") + wire.API + "/ws"
            try:
                async with sockets.connect(
                    url, proxy=None, additional_headers={"Authorization": f"Bearer {engine.token}"}, max_size=None
                ) as socket:
                    await socket.send(json.dumps({"subscribe": wanted, "after": after}))
                    async for message in socket:
                        said = json.loads(message)
                        if said["channel"] == "engine":
                            # About the connection, not of the log: its hello says our own number back to us.
                            if said["event"] == "error":
                                raise error_from_body(ErrorBody.model_validate(said["data"]["error"]))
                            continue
                        event = Event.model_validate(said)
                        after = event.seq
                        yield event
            except (ConnectionClosed, InvalidHandshake, OSError):
                pass
            await asyncio.sleep(0.2)
            await self.engine(renew=True)

    async def wait(
        self, job: Job | str, timeout: float | None = None, on_progress: Callable[[Job], None] | None = None
    ) -> Any:
        """Wait for a job's end and answer its outcome.

        Raises:
            MistudioError: the job's own error, `Cancelled`, or `JobFailed` when it was paused or interrupted.
            TimeoutError: it goes on after `timeout` seconds.
        """
        slug = job if isinstance(job, str) else job.slug
        deadline = None if timeout is None else time.monotonic() + timeout
        slice_seconds = 0.5 if on_progress else WAIT_SLICE_SECONDS
        while True:
            left = slice_seconds if deadline is None else min(slice_seconds, deadline - time.monotonic())
            record = await self.call(ShowJob(job=slug, wait_s=max(left, 0.0)))
            if on_progress:
                on_progress(record)
            if record.finished or record.state == "paused":
                return outcome_of(record)
            if record.state == "interrupted":
                if (await self.call(Status())).state not in ("starting", "restarting"):
                    return outcome_of(record)
                await asyncio.sleep(0.2)  # the engine will say at once whether the job goes on
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"job {slug} is still {record.state} after {timeout:g} s; it goes on")

    async def control(self, job: Job | str, action: str) -> Job:
        """Cancel, pause, resume, stop or retry a job."""
        slug = job if isinstance(job, str) else job.slug
        return await self.call(ControlJob(job=slug, action=action))  # type: ignore[arg-type]


def _broken(error: httpx.TransportError, may_have_been_done: bool) -> Unreachable:
    return Unreachable(
        "The connection to the engine broke during a call.",
        why=f"{type(error).__name__}: {error}".rstrip(": "),
        fix="Look whether it was done before calling again, or give it an idempotency_key."
        if may_have_been_done
        else "Call again; `mistudio engine status` says whether it runs, `mistudio engine logs` what it last said.",
    )


def _closed() -> Unreachable:
    return Unreachable("This Studio has been closed.", fix="connect() gives another one.")


def _download_of(response: httpx.Response) -> Download:
    headers = response.headers
    return Download(
        path=headers["x-mistudio-path"],
        filename=headers["x-mistudio-filename"],
        media_type=headers["content-type"],
        n_bytes=int(headers["content-length"]),
        sha256=headers["x-mistudio-sha256"],
    )


def _has_key(operation: Operation[Any]) -> bool:
    return isinstance(operation, JobOperation) and operation.idempotency_key is not None


def _error_of(response: httpx.Response) -> Exception:
    try:
        return error_from_body(ErrorBody.model_validate(response.json()["error"]))
    except (ValueError, KeyError, TypeError):
        return Internal(f"The engine answered {response.status_code} without saying why.", why=response.text[:200])


def outcome_of(job: Job) -> Any:
    """The outcome of a job that has ended, as the model that its operation names.

    Raises:
        MistudioError: why there is none.
    """
    if job.state == "completed":
        kind = OPERATIONS[job.operation]
        assert issubclass(kind, JobOperation)
        return (
            kind.outcome.model_validate(job.result)
            if isinstance(kind.outcome, type) and issubclass(kind.outcome, BaseModel)
            else job.result
        )
    if job.error is not None:
        raise error_from_body(job.error)
    if job.state == "cancelled":
        raise Cancelled(
            f"Job {job.slug} was cancelled.", fix=f"control_job(job={job.slug!r}, action='retry') runs it again."
        )
    raise JobFailed(
        f"Job {job.slug} is {job.state}.",
        why=job.message,
        fix=f"control_job(job={job.slug!r}, action='resume') lets it go on.",
    )


class JobHandle(Job, Generic[Outcome]):
    """A job with its engine at hand: the record as it was, and what can be done with it."""

    _studio: Studio = PrivateAttr()

    @classmethod
    def bind(cls, job: Job, studio: Studio) -> JobHandle[Any]:
        """The handle of a job's record."""
        handle = cls.model_construct(**dict(job))
        handle._studio = studio
        return handle

    @property
    def studio(self) -> Studio:
        """The engine that it is a job of."""
        return self._studio

    def refresh(self) -> JobHandle[Outcome]:
        """The job as it is now."""
        return self.bind(self._studio._run(self._studio.client.call(ShowJob(job=self.slug))), self._studio)

    def wait(self, timeout: float | None = None, *, progress: bool | None = None) -> Outcome:
        """Wait for its end and answer its outcome, with a progress bar in a terminal and a widget in a notebook.

        Raises:
            MistudioError: the job's own error, or `Cancelled`.
            TimeoutError: it goes on after `timeout` seconds.
        """
        from mistudio_engine.api.progress import shown  # rich is imported only when somebody looks

        with shown(self, self._studio, progress) as on_progress:
            return self._studio._run(self._studio.client.wait(self.slug, timeout, on_progress))

    def cancel(self) -> JobHandle[Outcome]:
        """Stop it and throw away what it has."""
        return self._control("cancel")

    def pause(self) -> JobHandle[Outcome]:
        """Write a checkpoint and let others run."""
        return self._control("pause")

    def resume(self) -> JobHandle[Outcome]:
        """Go on from the checkpoint."""
        return self._control("resume")

    def stop(self) -> JobHandle[Outcome]:
        """Finish early and keep what is usable."""
        return self._control("stop")

    def retry(self) -> JobHandle[Outcome]:
        """Run it again."""
        return self._control("retry")

    def _control(self, action: str) -> JobHandle[Outcome]:
        return self.bind(self._studio._run(self._studio.client.control(self.slug, action)), self._studio)


class Studio:
    """The engine for notebooks and scripts; see `connect`."""

    def __init__(self, home: Path | str | None = None, *, autostart: bool = True, caller: str = "person") -> None:
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self.client = AsyncStudio(home, autostart=autostart, caller=caller)
        self._thread = threading.Thread(target=self._serve, name="mistudio-client", daemon=True)
        self._thread.start()
        try:
            self._run(self.client.engine())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        engine = self.client._engine
        return f"Studio({str(self.client.home)!r}, {engine.url if engine else 'not connected'})"

    def close(self) -> None:
        """Close the connection; the engine and its jobs go on. Whoever still waits in another thread is let go."""
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        """The client's thread, from its start to its end."""
        self._loop.run_forever()
        self._loop.run_until_complete(self._let_go())
        self._loop.close()

    async def _let_go(self) -> None:
        await asyncio.sleep(0)  # what was asked for while we were closing begins, so that it can be ended
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await self.client.close()
        await self._loop.shutdown_asyncgens()

    @overload
    def call(self, operation: JobOperation[Outcome]) -> JobHandle[Outcome]: ...
    @overload
    def call(self, operation: Operation[R]) -> R: ...
    def call(self, operation: Operation[Any]) -> Any:
        """Carry an operation out; one that takes long answers a `JobHandle`."""
        result = self._run(self.client.call(operation))
        return JobHandle.bind(result, self) if isinstance(result, Job) else result

    def follow(self, channels: Iterable[str] = ("*",), after: int | None = None) -> Iterator[Event]:
        """Events as they come, as `AsyncStudio.follow`; close the iterator to stop."""
        events = self.client.follow(channels, after)
        try:
            while True:
                yield self._run(anext(events))  # type: ignore[arg-type]
        finally:
            if not self._closed:
                self._run(events.aclose())  # type: ignore[attr-defined]

    def _run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        if self._closed:
            coroutine.close()
            raise _closed()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise _closed() from None
        except BaseException:
            future.cancel()  # a keyboard interrupt ends our waiting only
            raise


def connect(home: Path | str | None = None, *, autostart: bool = True, caller: str = "person") -> Studio:
    """Find the engine of a data directory, or start it, and answer a `Studio`.

    Raises:
        EngineMissing: none runs and none can be started here.
    """
    return Studio(home, autostart=autostart, caller=caller)


def _method(kind: type[Operation[Any]], *, sync: bool) -> Callable[..., Any]:
    if sync:

        def method(self: Studio, /, **arguments: Any) -> Any:
            return self.call(wire.parse_operation(kind, arguments))
    else:

        async def method(self: AsyncStudio, /, **arguments: Any) -> Any:
            return await self.call(wire.parse_operation(kind, arguments))

    method.__name__ = kind.tool
    method.__qualname__ = f"{'Studio' if sync else 'AsyncStudio'}.{kind.tool}"
    method.__doc__ = kind.__doc__
    return method


for _name, _kind in OPERATIONS.items():
    setattr(AsyncStudio, _name, _method(_kind, sync=False))
    setattr(Studio, _name, _method(_kind, sync=True))
