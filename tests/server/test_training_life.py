"""Trainings in an engine that is killed, stopped and starved: what was learnt is there, bit for bit."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mistudio_engine.api.client import Studio, connect
from mistudio_engine.api.home import EngineFile, probe, process_alive
from mistudio_engine.api.records import Job
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.server.serve import stop
from tests.server.processes import bring_in, history, kill, until

ROOT = Path(__file__).parents[2]
IMPORTS_US = os.environ | {"PYTHONPATH": str(ROOT)}

BATCH = 1024
INTERVAL = 24 * BATCH
SAE: dict[str, Any] = {"model": "tiny", "dataset": "corpus", "hook_name": DEMO_HOOK, "d_sae": 768, "k": 8, "seed": 3}
RUN: dict[str, Any] = {
    "n_tokens": 480 * BATCH,
    "batch_size": BATCH,
    "buffer_tokens": 16_384,
    "checkpoint_interval": INTERVAL,
    "eval_tokens": 4096,
    "log_interval": 5,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(360)]


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data directory with the model, its tokens, and `undisturbed`, which nothing happened to."""
    home = tmp_path_factory.mktemp("life") / "home"
    with connect(home) as studio:
        bring_in(studio)
        studio.train_sae(**SAE, **RUN, name="undisturbed").wait(120)
    yield home
    stop(home)


@pytest.fixture
def studio(life: Path) -> Iterator[Studio]:
    """A client, which finds no engine after a kill and starts one; what still runs at the end is cancelled."""
    with connect(life) as made:
        yield made
        for job in made.list_jobs(limit=200).rows:
            if not job.finished:
                made.control_job(job=job.slug, action="cancel")
                at_its_end(made, job.slug)


def at_its_end(studio: Studio, job: str) -> Job:
    return until(lambda: (seen := studio.show_job(job=job, wait_s=10)).finished and seen, "the job's end")


def tensors(home: Path, sae: str) -> dict[str, Tensor]:
    files = sorted((home / "saes" / sae).glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(home: Path, one: str, other: str) -> None:
    ours, theirs = tensors(home, one), tensors(home, other)
    assert ours and ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def whole(home: Path, training: str) -> list[Path]:
    """Its checkpoints, oldest first, without one that was being written."""
    return sorted(path for path in (home / "trainings" / training / "checkpoints").iterdir() if "." not in path.name)


def half_written(home: Path, training: str) -> bool:
    """Is a checkpoint being written, or was one when the engine died?"""
    root = home / "trainings" / training / "checkpoints"
    return root.is_dir() and any(name.endswith(".part") for name in os.listdir(root))


def evaluated(studio: Studio, training: str) -> set[int]:
    """The steps that were evaluated."""
    found: set[int] = set()
    after = 0
    while events := studio.list_events(channels=f"trainings/{training}", after=after, limit=1000).events:
        found |= {event.data["step"] for event in events if event.event == "evaluation"}
        after = events[-1].seq
    return found


def warnings(studio: Studio, job: str) -> list[str]:
    events = studio.list_events(channels=f"jobs/{job}", limit=1000).events
    return [event.data["message"] for event in events if event.event == "warning"]


def repeated(steps: list[int]) -> list[int]:
    """How many tokens were trained on once more, each time that the history goes back."""
    return [one - other for one, other in itertools.pairwise(steps) if other <= one]


def test_a_training_killed_ten_times_ends_bit_identical_and_repeats_an_interval_at_most(
    life: Path, studio: Studio
) -> None:
    chance = random.Random(20261121)
    moments = sorted(chance.uniform(0.02, 0.95) for _ in range(10))
    hit: list[str] = []
    job = studio.train_sae(**SAE, **RUN, name="killed")
    for number, moment in enumerate(moments):
        until(lambda least=moment: (studio.show_job(job=job.slug).progress or 0) >= least, f"{moment:.0%}")
        if number in (2, 6):  # while a checkpoint is being written
            until(lambda: half_written(life, "killed"), "a checkpoint", pause=0.001)
        elif number in (4, 8):
            until(lambda: is_evaluating(studio, job.slug), "an evaluation")
        else:
            threading.Event().wait(chance.uniform(0, 0.3))
        now = studio.show_job(job=job.slug) if number not in (2, 6) else None
        kill(life)
        hit.append("writing" if half_written(life, "killed") else now.stage if now else "")
        assert now is None or not now.finished, "it was to be killed ten times; make it longer"
    ended = at_its_end(studio, job.slug)
    assert (ended.state, ended.attempt, ended.progress) == ("completed", 1, 1.0)
    steps = history(studio, "killed")
    assert sorted(set(steps)) == history(studio, "undisturbed"), "no number is missing"
    assert len(repeated(steps)) <= 10
    assert max(repeated(steps), default=0) < INTERVAL + 5 * BATCH
    assert evaluated(studio, "killed") == evaluated(studio, "undisturbed")
    assert warnings(studio, job.slug) == [], "what was half written was not taken for a checkpoint"
    assert_same_bits(life, "killed", "undisturbed")
    assert "writing" in hit and any(what.startswith("evaluating") for what in hit), hit
    assert not list(life.rglob("*.part"))


def is_evaluating(studio: Studio, job: str) -> bool:
    return (studio.show_job(job=job).stage or "").startswith("evaluating")


def test_damaged_checkpoints_are_passed_over_with_a_warning(life: Path, studio: Studio) -> None:
    damages: dict[str, Callable[[bytes], bytes]] = {
        "cut": lambda content: content[: len(content) // 2],
        "flipped": lambda content: content[:-1000] + bytes([content[-1000] ^ 8]) + content[-999:],
        "empty": lambda content: b"",
    }
    job = studio.train_sae(**SAE, **RUN, name="damaged")
    for moment, (what, damage) in zip((0.2, 0.5, 0.8), damages.items(), strict=True):
        until(lambda least=moment: (studio.show_job(job=job.slug).progress or 0) >= least, f"{moment:.0%}")
        kill(life)
        folder = whole(life, "damaged")[-1]
        path = folder / ("sae/state.safetensors" if what != "empty" else "training/state.json")
        path.write_bytes(damage(path.read_bytes()))
        until(lambda: warnings(studio, job.slug), "a warning")
        said = until(lambda name=folder.name: [w for w in warnings(studio, job.slug) if name in w], "a warning")
        assert "was passed over" in said[0], what
    assert at_its_end(studio, job.slug).state == "completed"
    assert len(warnings(studio, job.slug)) == 3
    steps = history(studio, "damaged")
    assert sorted(set(steps)) == history(studio, "undisturbed")
    assert max(repeated(steps)) < 2 * INTERVAL + 5 * BATCH, "from the one before"
    assert_same_bits(life, "damaged", "undisturbed")


def test_without_any_whole_checkpoint_it_begins_anew_and_ends_alike(life: Path, studio: Studio) -> None:
    job = studio.train_sae(**SAE, **RUN, name="begun-anew")
    until(lambda: (studio.show_job(job=job.slug).progress or 0) >= 0.15, "some progress")
    kill(life)
    folders = whole(life, "begun-anew")
    for folder in folders:
        (folder / "sae" / "state.safetensors").unlink()
    assert at_its_end(studio, job.slug).state == "completed"
    assert len(warnings(studio, job.slug)) == len(folders) >= 1
    assert_same_bits(life, "begun-anew", "undisturbed")


VARIANTS: list[dict[str, Any]] = [
    {"name": "topk"},
    {
        "name": "standard",
        "architecture": "standard",
        "hook_name": "blocks.1.hook_resid_post",
        "hyperparameters": {"resample_interval": 65_536, "dead_feature_window": 16_384},
    },
    {
        "name": "transcoder",
        "architecture": "topk_skip_transcoder",
        "hook_name": "blocks.2.ln2.hook_normalized",
        "hook_name_out": "blocks.2.hook_mlp_out",
    },
]


def test_a_killed_sweep_ends_with_all_its_saes_bit_identical(life: Path, studio: Studio) -> None:
    call = {**SAE, **RUN, "d_sae": 256, "n_tokens": 200 * BATCH, "variants": VARIANTS, "eval_tokens": 1024}
    studio.train_sae(**call, name="three").wait(120)
    job = studio.train_sae(**call, name="three-killed")
    until(lambda: (studio.show_job(job=job.slug).progress or 0) >= 0.6, "some progress")
    kill(life)
    assert at_its_end(studio, job.slug).state == "completed"
    record = studio.show_training(training="three-killed")
    assert record.saes == [f"three-killed-{each['name']}" for each in VARIANTS]
    for each in VARIANTS:
        assert_same_bits(life, f"three-killed-{each['name']}", f"three-{each['name']}")
        measured = studio.eval_sae(sae=f"three-killed-{each['name']}", n_tokens=512).wait(60)
        assert 0 < measured.fvu < 2


def test_an_extension_that_is_killed_ends_bit_identical(life: Path, studio: Studio) -> None:
    call = {**SAE, **RUN, "d_sae": 256, "n_tokens": 72 * BATCH}
    for name in ("longer", "longer-killed"):
        studio.train_sae(**call, name=name).wait(60)
    studio.extend_training(training="longer", n_tokens=200 * BATCH).wait(60)
    job = studio.extend_training(training="longer-killed", n_tokens=200 * BATCH)
    until(lambda: (studio.show_job(job=job.slug).progress or 0) >= 0.6, "some progress")
    kill(life)
    assert at_its_end(studio, job.slug).state == "completed"
    assert studio.show_training(training="longer-killed").saes == ["longer-killed", "longer-killed-2"]
    assert set(history(studio, "longer-killed")) == set(history(studio, "longer"))
    assert_same_bits(life, "longer-killed-2", "longer-2")
    assert_same_bits(life, "longer-killed", "longer")


def test_a_kill_while_activations_are_cached_costs_nothing_but_time(life: Path, studio: Studio) -> None:
    hooks = [f"blocks.{layer}.{site}" for layer in range(4) for site in ("hook_resid_pre", "hook_resid_post")]
    call = {**SAE, **RUN, "d_sae": 64, "n_tokens": 48 * BATCH, "activations": "cached", "eval_tokens": 0}
    job = studio.train_sae(**call, variants=[{"hook_name": hook} for hook in hooks], name="from-disk")
    until(lambda: list((life / "activations").rglob("shard-*")), "a part of the cache")
    kill(life)
    assert at_its_end(studio, job.slug).state == "completed"
    live = {**call, "activations": "live", "hook_name": hooks[5]}
    studio.train_sae(**live, name="live").wait(60)
    assert_same_bits(life, "from-disk-6", "live")
    assert not list(life.rglob("*.part"))


@pytest.mark.parametrize("stage", ["training", "evaluating", "running the model"])
def test_sigterm_writes_a_checkpoint_whatever_it_is_at(life: Path, studio: Studio, stage: str) -> None:
    wide = {"n_tokens": 50_000_000, "eval_tokens": 100_000, "buffer_tokens": 65_536, "checkpoint_interval": 65_536}
    job = studio.train_sae(**{**SAE, **RUN, **wide}, name=f"terminated-{stage[:4]}")
    training = job.subject.partition("/")[2]
    until(lambda: (studio.show_job(job=job.slug).stage or "").startswith(stage), stage)
    began = time.monotonic()
    stop(life)
    assert time.monotonic() - began < 10
    assert probe(life) is None
    folder = whole(life, training)[-1]
    weights = load_file(folder / "sae" / "state.safetensors")
    assert weights["sae.W_dec"].shape == (768, 64) and weights["sae.W_dec"].isfinite().all()
    n_steps = int(folder.name.removeprefix("step-"))
    assert n_steps * BATCH >= max(history(studio, training), default=0), "nothing that was learnt is lost"
    again = until(lambda: (seen := studio.show_job(job=job.slug)).state == "running" and seen, "its going on")
    assert again.checkpoint is not None and again.attempt == 1
    assert studio.control_job(job=job.slug, action="cancel").state in ("running", "cancelled")
    until(lambda: studio.show_job(job=job.slug).finished, "its end")


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[EngineFile]:
    """An engine that is inside a step of a minute."""
    home = tmp_path / "home"
    command = [sys.executable, str(Path(__file__).with_name("stubborn_engine.py")), str(home)]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, cwd=ROOT, env=IMPORTS_US, stderr=log) as process:
        try:
            engine = until(lambda: probe(home), "an engine")
            with httpx.Client(base_url=f"{engine.url}/api/v1", trust_env=False, timeout=60) as http:
                http.headers["Authorization"] = f"Bearer {engine.token}"
                job = http.post("/dawdle", json={}).raise_for_status().json()["slug"]
                until(lambda: http.get(f"/jobs/{job}").json()["stage"] == "dawdling", "the step")
            yield engine
        finally:
            process.kill()


def test_a_second_signal_does_not_wait_for_the_step(stubborn: EngineFile) -> None:
    os.kill(stubborn.pid, signal.SIGTERM)
    threading.Event().wait(1)
    assert process_alive(stubborn.pid), "the first signal waits for a checkpoint"
    os.kill(stubborn.pid, signal.SIGTERM)
    began = time.monotonic()
    until(lambda: not process_alive(stubborn.pid), "its end")
    assert time.monotonic() - began < 1


def test_one_signal_waits_ten_seconds_for_a_step_and_no_longer(stubborn: EngineFile) -> None:
    os.kill(stubborn.pid, signal.SIGTERM)
    began = time.monotonic()
    until(lambda: not process_alive(stubborn.pid), "its end")
    assert time.monotonic() - began < 11


def private_disk(home: Path, n_mib: int) -> list[str]:
    """The command that runs another one where `home` is a file system of this size, which nobody else sees."""
    home.mkdir(parents=True)
    mount = f"mount -t tmpfs -o size={n_mib}m,mode=700 tmpfs {home}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here without being root")
    return command


def filled(disk: Path, left: int = 1 << 20) -> Path:
    """A file that leaves so many bytes free, whatever somebody else writes meanwhile."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb") as file:
        file.write(b"\0" * (shutil.disk_usage(disk).free - left))
    if (missing := left - shutil.disk_usage(disk).free) > 0:
        os.truncate(filler, max(0, filler.stat().st_size - missing))
    return filler


@contextmanager
def on_a_private_disk(folder: Path, n_mib: int) -> Iterator[tuple[Studio, Path]]:
    """A client of an engine that has a disk of this size to itself, and its data directory as it is seen from here."""
    home = folder / "home"
    command = [*private_disk(home, n_mib), sys.executable, "-m", "mistudio_engine.server", "serve", "--home", str(home)]
    with open(folder / "log", "w") as log, subprocess.Popen(command, cwd=ROOT, stderr=log) as process:
        try:
            inside = Path(f"/proc/{process.pid}/root{home}")  # the same file system, from outside
            until(lambda: (inside / "engine.json").exists() and probe(inside), "an engine")
            with connect(inside, autostart=False) as studio:
                yield studio, inside
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def test_a_training_waits_while_the_disk_is_full(tmp_path: Path) -> None:
    with on_a_private_disk(tmp_path, 96) as (studio, home):
        wait_out_a_full_disk(studio, home)


def wait_out_a_full_disk(studio: Studio, home: Path) -> None:
    bring_in(studio)
    call = {**SAE, **RUN, "n_tokens": 240 * BATCH, "d_sae": 2048, "checkpoint_interval": 12 * BATCH, "eval_tokens": 0}
    studio.train_sae(**call, name="with-space").wait(60)
    job = studio.train_sae(**call, name="without")
    until(lambda: studio.show_job(job=job.slug).checkpoint, "a checkpoint")
    filler = filled(home)  # the records still find room, a checkpoint of 3 MiB does not
    paused = until(lambda: (seen := studio.show_job(job=job.slug)).state == "paused" and seen, "the pause")
    assert re.search(r"needs \d[\d.]* MiB of disk and \d[\d.]* [KM]iB is free", paused.message), paused.message
    assert "make space, then resume it" in paused.message
    assert paused.error is not None and paused.error.code == "disk_full"
    assert not list(home.rglob("*.part")), "nothing half written is left"
    load_file(whole(home, "without")[-1] / "sae" / "state.safetensors")
    again = studio.control_job(job=job.slug, action="resume")
    assert until(lambda: (seen := studio.show_job(job=job.slug)).state == "paused" and seen, "the pause").error
    assert again.attempt == 1
    filler.unlink()
    studio.control_job(job=job.slug, action="resume")
    assert at_its_end(studio, job.slug).state == "completed"
    assert set(history(studio, "without")) == set(history(studio, "with-space"))
    assert_same_bits(home, "without", "with-space")
