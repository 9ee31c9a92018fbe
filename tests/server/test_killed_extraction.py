"""An extraction in an engine that is killed: it goes on by itself, from where it was, and has the same bits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mistudio_engine.api.client import Studio, connect
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.discovery.extraction import load_extraction
from mistudio_engine.server.serve import stop
from tests.server.processes import bring_in, kill, until
from tests.server.test_training_life import at_its_end, filled, on_a_private_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WIDE: dict[str, Any] = {"model": "tiny", "dataset": "corpus", "hook_name": DEMO_HOOK, "d_sae": 16384, "k": 32}
SHORT: dict[str, Any] = {"n_tokens": 4096, "batch_size": 1024, "buffer_tokens": 4096, "eval_tokens": 0}
CALL: dict[str, Any] = {"sae": "wide", "features": list(range(64))}
"""A long pass, and little to do behind it."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With a wide SAE and the extraction `wide-…k`, which nothing happened to."""
    home = tmp_path_factory.mktemp("extraction") / "home"
    with connect(home) as studio:
        bring_in(studio)
        studio.train_sae(**WIDE, **SHORT, name="wide").wait(60)
        studio.extract(**CALL).wait(100)
    yield home
    stop(home)


def running(studio: Studio, slug: str, n_shares: float) -> None:
    until(lambda: (studio.show_job(job=slug).progress or 0) > n_shares, f"{n_shares:.0%} of {slug}")


def files(home: Path, extraction: str) -> dict[str, str]:
    return load_extraction(home / "extractions" / extraction / "data").info.files


def test_it_goes_on_where_it_was_paused_when_the_engine_is_killed_meanwhile(home: Path) -> None:
    with connect(home) as studio:
        undisturbed = studio.show_sae(sae="wide").extraction
        job = studio.extract(**CALL)
        running(studio, job.slug, 0.1)
        studio.control_job(job=job.slug, action="pause")
        paused = until(lambda: (seen := studio.show_job(job=job.slug)).state == "paused" and seen, "the pause")
        assert paused.checkpoint
        kill(home)
        studio.control_job(job=job.slug, action="resume")
        first = until(lambda: (seen := studio.show_job(job=job.slug)).state == "running" and seen, "it to run")
        assert (first.progress or 0) > 0.09
        ended = at_its_end(studio, job.slug)
        assert ended.state == "completed", ended.error
        assert undisturbed and files(home, ended.result["slug"]) == files(home, undisturbed)


def test_a_killed_engine_takes_it_up_by_itself(home: Path) -> None:
    with connect(home) as studio:
        undisturbed = studio.show_sae(sae="wide").extraction
        job = studio.extract(**CALL)
        for share in (0.05, 0.4):
            running(studio, job.slug, share)
            kill(home)
        ended = at_its_end(studio, job.slug)
        assert ended.state == "completed", ended.error
        assert undisturbed and files(home, ended.result["slug"]) == files(home, undisturbed)
        assert not list((home / "extractions").glob("*/*.part"))


def test_a_cancelled_one_ends_at_once_and_leaves_nothing(home: Path) -> None:
    with connect(home) as studio:
        before = {path.name for path in (home / "extractions").iterdir()}
        job = studio.extract(**CALL)
        running(studio, job.slug, 0.05)
        began = time.monotonic()
        studio.control_job(job=job.slug, action="cancel")
        assert at_its_end(studio, job.slug).state == "cancelled"
        assert time.monotonic() - began < 5
        assert {path.name for path in (home / "extractions").iterdir()} == before
        assert not (home / "jobs" / job.slug).exists()


def test_it_waits_while_the_disk_is_full(tmp_path: Path) -> None:
    with on_a_private_disk(tmp_path, 64) as (studio, home):
        bring_in(studio)
        studio.train_sae(**WIDE | {"d_sae": 1024}, **SHORT, name="small").wait(60)
        wait_out_a_full_disk(studio, home)


def wait_out_a_full_disk(studio: Studio, home: Path) -> None:
    filler = filled(home)  # records find room, an extraction does not
    job = studio.extract(sae="small", features=list(range(256)))
    paused = until(lambda: (seen := studio.show_job(job=job.slug)).state == "paused" and seen, "the pause")
    assert paused.error is not None and paused.error.code == "disk_full"
    assert "make space, then resume it" in paused.message
    assert not list(home.rglob("*.part")) and studio.show_sae(sae="small").extraction is None
    filler.unlink()
    studio.control_job(job=job.slug, action="resume")
    ended = at_its_end(studio, job.slug)
    assert ended.state == "completed", ended.error
    assert load_extraction(home / "extractions" / ended.result["slug"] / "data").info.n_features == 256
