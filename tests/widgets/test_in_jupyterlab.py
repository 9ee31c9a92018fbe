"""The widget in a real JupyterLab, with a real kernel, a real engine and a training that really runs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed; it is in the extra [dev]")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed; it is in the extra [lab]")

from jupyter_process import Jupyter, running_jupyter
from playwright.sync_api import Locator, Page, expect

from mistudio_engine.api.client import Studio
from mistudio_engine.api.home import ensure_engine, read_engine_file
from mistudio_engine.api.records import Job
from mistudio_engine.demo.embedded import DEMO_HOOK
from mistudio_engine.server.serve import stop

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

SHOWN_MS = 60_000

SCREENSHOTS = os.environ.get("MISTUDIO_SCREENSHOTS")
"""A folder for pictures of what the tests saw, for a person to look at."""


class Lab:
    """A JupyterLab and the engine that its notebooks and its extension find."""

    def __init__(self, jupyter: Jupyter, studio: Studio, root: Path) -> None:
        self.jupyter, self.studio, self.root = jupyter, studio, root

    def training(self) -> Job:
        """A training that would take half an hour."""
        return self.studio.train_sae(  # type: ignore[attr-defined]
            model="tiny", dataset="corpus", hook_name=DEMO_HOOK, d_sae=128, k=16, n_tokens=20_000_000
        )


@pytest.fixture(scope="module")
def lab(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Generator[Lab]:
    home, root, folder = (tmp_path_factory.mktemp(name) for name in ("home", "notebooks", "lab"))
    ensure_engine(home, wait_seconds=60)
    flags = ["--LabApp.extension_manager=readonly", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    try:
        with Studio(home) as studio:
            studio.get_model(source="embedded", name="tiny").wait(60, progress=False)  # type: ignore[attr-defined]
            studio.get_dataset(  # type: ignore[attr-defined]
                source="embedded", name="corpus", model="tiny", n_tokens=40_000
            ).wait(60, progress=False)
            with running_jupyter("jupyterlab", *flags, home=home, root=root, folder=folder) as jupyter:
                yield Lab(jupyter, studio, root)
    finally:
        stop(home)


@pytest.fixture
def job(lab: Lab) -> Generator[Job]:
    job = lab.training()
    yield job
    if not job.refresh().finished:  # type: ignore[attr-defined]
        job.cancel()  # type: ignore[attr-defined]


@pytest.fixture
def page(browser: Any) -> Generator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(SHOWN_MS)
    expect.set_options(timeout=SHOWN_MS)
    yield context.new_page()
    expect.set_options(timeout=5_000)
    context.close()


def run_notebook(page: Page, lab: Lab, cell: str) -> None:
    """Write a notebook with this cell, open it and run it."""
    code = {"cell_type": "code", "id": "one", "source": cell, "metadata": {}, "outputs": [], "execution_count": None}
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        "cells": [code],
    }
    (lab.root / "follow.ipynb").write_text(json.dumps(notebook), "utf-8")
    page.goto(f"{lab.jupyter.url}lab/tree/follow.ipynb?reset&token={lab.jupyter.token}")
    # Without a kernel, running would open a dialog that asks for one.
    page.get_by_role("button", name="Python 3 (ipykernel) | Idle").wait_for()
    choose(page, "Run", "Run All Cells")


def choose(page: Page, menu: str, item: str) -> None:
    page.locator(".lm-MenuBar-itemLabel").get_by_text(menu, exact=True).click()
    page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()


def follow(page: Page, lab: Lab, job: Job, then: str) -> Locator:
    """Run a cell that makes the widget, and what comes then; answers the widget once it moves."""
    lines = [
        "from mistudio_engine import connect",
        "from mistudio_widgets import JobProgress",
        "studio = connect()",
        f"progress = JobProgress({job.slug!r}, studio)",
        then,
    ]
    run_notebook(page, lab, "\n".join(lines))
    widget = page.get_by_role("region", name=f"Job {job.slug}", exact=True)
    expect(widget).to_contain_text("Running")
    expect(widget).to_contain_text("Live through the kernel")
    moves(widget)
    return widget


def moves(widget: Locator) -> None:
    """Wait until more is done than now."""
    share = widget.locator(".ms-job-share")
    expect(share).to_contain_text("%")
    expect(share).not_to_have_text(share.inner_text())


def state(widget: Locator) -> Locator:
    return widget.locator(".ms-job-state")


def test_a_notebook_follows_a_job_and_cancels_it(page: Page, lab: Lab, job: Any) -> None:
    widget = follow(page, lab, job, "progress")
    widget.get_by_role("term").first.wait_for()
    for name in widget.get_by_role("term").all():  # JupyterLab's own rules for lists must not reach it
        assert name.evaluate("e => e.scrollWidth <= e.clientWidth"), name.inner_text()
    if SCREENSHOTS:
        for theme in ("JupyterLab Light", "JupyterLab Dark"):
            choose_theme(page, theme)
            for width in (800, 1200):
                page.set_viewport_size({"width": width, "height": 700})
                page.screenshot(path=f"{SCREENSHOTS}/{theme.replace(' ', '-')}-{width}.png")
    widget.get_by_role("button", name="Cancel").click()
    expect(state(widget)).to_have_text("Cancelled")
    assert job.refresh().state == "cancelled"
    expect(widget.get_by_role("button", name="Retry")).to_be_visible()


def choose_theme(page: Page, name: str) -> None:
    page.locator(".lm-MenuBar-itemLabel").get_by_text("Settings", exact=True).click()
    page.locator(".lm-Menu-itemLabel").get_by_text("Theme", exact=True).hover()
    page.locator(".lm-Menu-itemLabel").get_by_text(name, exact=True).click()
    expect(page.locator("body")).to_have_attribute("data-jp-theme-name", name)


def test_pausing_and_resuming_are_seen_by_everybody(page: Page, lab: Lab, job: Any) -> None:
    widget = follow(page, lab, job, "progress")
    widget.get_by_role("button", name="Pause").click()
    expect(state(widget)).to_have_text("Paused")
    assert job.refresh().state == "paused"
    job.resume()  # as an agent might
    expect(state(widget)).to_have_text("Running")
    moves(widget)


def test_a_busy_kernel_stops_neither_the_widget_nor_its_buttons(page: Page, lab: Lab, job: Any) -> None:
    waiting = "\n".join(
        [
            "from mistudio_engine.api.errors import Cancelled",
            "try:",
            f"    studio.show_job(job={job.slug!r}).wait()  # shows the widget by itself",
            "except Cancelled:",
            "    print('it was cancelled')",
        ]
    )
    widget = follow(page, lab, job, waiting)
    widget.get_by_role("button", name="Cancel").click()
    expect(state(widget)).to_have_text("Cancelled")
    expect(page.locator(".jp-OutputArea").first).to_contain_text("it was cancelled")


def test_after_a_kernel_restart_the_widget_goes_on_through_the_jupyter_server(page: Page, lab: Lab, job: Any) -> None:
    widget = follow(page, lab, job, "progress")
    choose(page, "Kernel", "Restart Kernel…")
    page.locator(".jp-Dialog").get_by_role("button", name="Confirm Kernel Restart").click()
    expect(widget).to_contain_text("Live through the Jupyter server (the kernel is silent)")
    moves(widget)
    widget.get_by_role("button", name="Cancel").click()
    expect(state(widget)).to_have_text("Cancelled")
    assert job.refresh().state == "cancelled"


def test_an_engine_that_is_killed_comes_back_and_the_widget_goes_on(page: Page, lab: Lab, job: Any) -> None:
    widget = follow(page, lab, job, "progress")
    killed = read_engine_file(lab.jupyter.home)
    assert killed is not None
    os.kill(killed.pid, signal.SIGKILL)
    # Whoever is first starts it again: the kernel's client, which wants to know of the job, or this line.
    engine = ensure_engine(lab.jupyter.home, wait_seconds=60)
    assert engine.epoch != killed.epoch
    moves(widget)
    expect(state(widget)).to_have_text("Running")
    expect(widget).to_contain_text("Live through the kernel")
