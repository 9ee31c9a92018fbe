"""The client: found or started engine, operations as methods, jobs that can be waited for, events without a gap."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from mistudio_engine.api.client import AsyncStudio, JobHandle, Studio, connect
from mistudio_engine.api.errors import BadInput, Cancelled, EmptyData, NotFound, Unreachable
from mistudio_engine.api.events import Event
from mistudio_engine.api.home import EngineFile, probe, process_alive, write_engine_file
from mistudio_engine.api.operations import OPERATIONS, GetDataset, ListModels, Status
from mistudio_engine.api.records import DatasetRecord
from mistudio_engine.api.sae_config import StandardConfig
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.saes import new_sae, save_sae
from mistudio_engine.server.serve import stop
from tests.behaviour.doors import Served, served

ENDLESS: dict[str, Any] = {
    "model": "tiny",
    "dataset": "corpus",
    "hook_name": DEMO_HOOK,
    "d_sae": 64,
    "k": 8,
    "hyperparameters": {"n_tokens": 50_000_000, "batch_size": 512, "buffer_tokens": 4096},
}
WAIT_SECONDS = 60.0


def found_by_its_file(bare: Served) -> Path:
    """Writes `engine.json`, as the engine's process does, so that clients find the engine that runs here."""
    engine = EngineFile(
        url=bare.url, token=bare.engine.token, pid=os.getpid(), version="", epoch=bare.engine.epoch, started_at=0
    )
    write_engine_file(bare.engine.home, engine)
    return bare.engine.home


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real engine behind a real server, with a model and a dataset."""
    with served(tmp_path_factory.mktemp("home")) as made:
        with connect(found_by_its_file(made), autostart=False) as studio:
            studio.get_model(source="embedded", name="tiny").wait(WAIT_SECONDS)
            studio.get_dataset(source="embedded", name="corpus", model="tiny", n_tokens=20_000).wait(WAIT_SECONDS)
        yield made


@pytest.fixture
def studio(here: Served) -> Iterator[Studio]:
    with connect(here.engine.home, autostart=False) as made:
        yield made


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The cat saw a dog .\n" * 40)
    return path


@pytest.mark.parametrize("client", [Studio, AsyncStudio])
def test_every_operation_is_a_method(client: type) -> None:
    for name, kind in OPERATIONS.items():
        method = getattr(client, name)
        assert method.__doc__ == kind.__doc__
        assert inspect.iscoroutinefunction(method) == (client is AsyncStudio)


def test_a_call_is_a_method_or_a_value(studio: Studio) -> None:
    assert studio.list_models() == studio.call(ListModels())
    assert studio.status().state == "ready"
    with pytest.raises(BadInput, match="colour is not an argument of list_models"):
        studio.list_models(colour="red")  # type: ignore[call-arg]


def test_the_async_client_answers_the_same(here: Served, studio: Studio) -> None:
    async def ask() -> Any:
        async with AsyncStudio(here.engine.home, autostart=False) as client:
            with pytest.raises(NotFound):
                await client.show_sae(sae="nobody")
            many = await asyncio.gather(*(client.list_models() for _ in range(20)))
            job = await client.get_dataset(source="embedded", name="other")
            return many, await client.wait(job, timeout=WAIT_SECONDS)

    many, dataset = asyncio.run(ask())
    assert many == [studio.list_models()] * 20
    assert isinstance(dataset, DatasetRecord)


def test_a_job_is_waited_for_and_answers_the_model_that_its_operation_names(studio: Studio, text: Path) -> None:
    job = studio.call(GetDataset(source=str(text), name="cats"))
    assert isinstance(job, JobHandle)
    assert job.studio is studio
    dataset = job.wait(WAIT_SECONDS)
    assert isinstance(dataset, DatasetRecord)
    assert dataset.ref == "dataset/cats"
    assert job.state != "completed" and job.refresh().state == "completed", "a handle is the record as it was"


def test_a_failed_job_raises_the_engines_own_error(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(EmptyData) as failed:
        studio.get_dataset(source=str(tmp_path / "empty.txt")).wait(WAIT_SECONDS)
    assert failed.value.fix


def test_a_cancelled_job_raises_cancelled_and_a_wait_that_ends_leaves_it_running(studio: Studio) -> None:
    job = studio.train_sae(**ENDLESS)
    with pytest.raises(TimeoutError, match="it goes on"):
        job.wait(0.2)
    assert job.refresh().state in ("queued", "running")
    job.cancel()
    with pytest.raises(Cancelled):
        job.wait(WAIT_SECONDS)


def test_the_progress_bar_tells_each_state(studio: Studio, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    studio.get_dataset(source=str(text), name="shown").wait(WAIT_SECONDS, progress=True)
    assert "100%" in capsys.readouterr().err


def test_a_download_says_where_the_file_is_and_what_is_in_it(studio: Studio, tmp_path: Path) -> None:
    (model,) = studio.list_models(query="tiny").rows
    cfg = StandardConfig(d_in=model.d_model, d_sae=16, hook_name=DEMO_HOOK, model_name="tiny")
    sae = new_sae(cfg, {name: torch.rand(shape) for name, shape in cfg.tensor_shapes().items()})
    studio.get_sae(source=str(save_sae(sae, tmp_path / "small")), model="tiny", name="small").wait(WAIT_SECONDS)
    made = studio.export(sae="small", feature_selection="custom", indices=[0, 1]).wait(WAIT_SECONDS)
    download = studio.download_export(export=made.slug)
    content = Path(download.path).read_bytes()
    assert download.n_bytes == len(content) == made.file_size_bytes
    assert download.sha256 == hashlib.sha256(content).hexdigest() == made.sha256
    assert download.filename.endswith(".zip") and download.media_type == "application/zip"
    with pytest.raises(NotFound):
        studio.download_export(export="nothing")


def test_events_are_replayed_from_a_number_and_then_followed(studio: Studio, here: Served) -> None:
    bus = here.engine.bus
    first = bus.publish("jobs/story", "metrics", {"n": 1})
    bus.publish("jobs/other", "metrics", {"n": 0})
    bus.publish("jobs/story", "metrics", {"n": 2})
    events = studio.follow(["jobs/story"], after=first.seq - 1)
    seen = [next(events).data["n"], next(events).data["n"]]
    bus.publish("jobs/story", "metrics", {"n": 3})
    seen.append(next(events).data["n"])
    events.close()
    assert seen == [1, 2, 3], "and nothing about the connection itself"


def test_following_from_no_number_that_the_log_has_is_refused(studio: Studio) -> None:
    with pytest.raises(BadInput):
        next(iter(studio.follow(after=-1)))


def test_it_works_inside_a_running_event_loop(here: Served) -> None:
    async def cell() -> str:
        with connect(here.engine.home, autostart=False) as studio:
            return studio.status().state

    assert asyncio.run(cell()) == "ready"


def test_closing_twice_is_fine_and_calling_afterwards_is_refused(here: Served) -> None:
    studio = connect(here.engine.home, autostart=False)
    studio.close()
    studio.close()
    with pytest.raises(Unreachable, match="closed"):
        studio.status()

    async def twice() -> None:
        client = AsyncStudio(here.engine.home, autostart=False)
        await client.status()
        await client.close()
        await client.close()

    asyncio.run(twice())


def test_closing_lets_go_of_whoever_still_waits(here: Served) -> None:
    studio = connect(here.engine.home, autostart=False)
    ended = threading.Event()

    def follow() -> None:
        try:
            next(iter(studio.follow(["jobs/nothing"])))
        except Unreachable:
            ended.set()

    threading.Thread(target=follow, daemon=True).start()
    deadline = time.monotonic() + WAIT_SECONDS
    while not here.engine.bus.n_subscribers and time.monotonic() < deadline:
        studio.status()
    studio.close()
    assert ended.wait(10)


def test_a_client_leaves_nothing_open(here: Served) -> None:
    code = (
        "import gc; from mistudio_engine import connect\n"
        f"studio = connect({str(here.engine.home)!r}, autostart=False)\n"
        "studio.status(); events = studio.follow(after=0); next(events); events.close(); studio.close()\n"
        "del studio, events; gc.collect()"
    )
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stderr) == (0, "")


def test_an_engine_out_of_reach_is_an_error_of_ours(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"

    async def ask() -> None:
        client = AsyncStudio(tmp_path)
        client.engine = lambda renew=False: gone()  # type: ignore[method-assign, assignment]
        try:
            await client.call(Status())
        finally:
            await client.close()

    async def gone() -> EngineFile:
        return EngineFile(url=url, token="", pid=1, version="", epoch="", started_at=0)

    with pytest.raises(Unreachable, match="engine status") as broken:
        asyncio.run(ask())
    assert not isinstance(broken.value, httpx.HTTPError)


@pytest.mark.slow
def test_following_goes_on_after_the_engine_was_killed_without_a_double(tmp_path: Path) -> None:
    home = tmp_path / "home"
    try:
        with connect(home) as studio:
            studio.get_model(source="embedded", name="before").wait(WAIT_SECONDS)
            follower = studio.follow(["jobs/*"], after=0)
            seen: list[Event] = [next(follower)]
            engine = probe(home)
            assert engine is not None
            os.kill(engine.pid, signal.SIGKILL)
            deadline = time.monotonic() + WAIT_SECONDS
            while process_alive(engine.pid) and time.monotonic() < deadline:
                threading.Event().wait(0.01)
            again = studio.get_model(source="embedded", name="after")
            again.wait(WAIT_SECONDS)
            while not (seen[-1].channel == f"jobs/{again.slug}" and seen[-1].event == "completed"):
                seen.append(next(follower))
            follower.close()
            log = [event for event in studio.list_events(limit=1000).events if event.channel.startswith("jobs/")]
        logged, heard = ([event.seq for event in each if not event.transient] for each in (log, seen))
        assert heard == logged[: len(heard)], "each once, in order, none left out"
        assert len({event.channel for event in seen}) == 2
    finally:
        stop(home)
