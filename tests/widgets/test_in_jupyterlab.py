"""The widget in a real JupyterLab, with a real kernel, a real engine and a job that really runs."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from conftest import Jupyter

pytest.importorskip("playwright", reason="playwright is not installed; it is in the extra [dev]")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed; it is in the extra [lab]")

from playwright.sync_api import Page, expect  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SHOWN_MS = 60_000


class Work:
    slug = "train-0001"
    def __init__(self, home):
        self.home = home
    @property
    def job(self):
        from mistudio_engine.api.client import Studio
        from mistudio_engine.api.operations.jobs import ShowJob
        with Studio(self.home, autostart=False) as s:
            return s.call(ShowJob(job=self.slug))


@pytest.fixture
def work(tmp_path: Path):
    import subprocess, sys
    home = tmp_path / "home"
    p = subprocess.Popen([sys.executable, "/tmp/w/jobs_engine.py", str(home)])
    import time
    while not (home / "engine.json").exists():
        time.sleep(.05)
    yield Work(home)
    p.kill()
    p.wait()


@pytest.fixture
def lab(start_jupyter: Any, work: Any, tmp_path: Path) -> Jupyter:
    root = tmp_path / "notebooks"
    root.mkdir()
    return start_jupyter(
        "jupyterlab",
        "--LabApp.extension_manager=readonly",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        home=work.home,
        root=root,
    )


@pytest.fixture
def page(browser: Any) -> Generator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(SHOWN_MS)
    expect.set_options(timeout=SHOWN_MS)
    yield context.new_page()
    context.close()


def open_notebook(page: Page, lab: Jupyter, root: Path, *cells: str) -> None:
    """Write a notebook of these cells, open it and run them all."""
    notebook = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        "cells": [
            {"cell_type": "code", "id": f"c{n}", "source": cell, "metadata": {}, "outputs": [], "execution_count": None}
            for n, cell in enumerate(cells)
        ],
    }
    (root / "follow.ipynb").write_text(json.dumps(notebook), "utf-8")
    page.goto(f"{lab.url}lab/tree/follow.ipynb?token={lab.token}")
    # Without a kernel, running would open a dialog that asks for one.
    page.get_by_role("button", name="Python 3 (ipykernel) | Idle").wait_for()
    menu(page, "Run", "Run All Cells")


def menu(page: Page, name: str, item: str) -> None:
    page.locator(".lm-MenuBar-itemLabel").get_by_text(name, exact=True).click()
    page.locator(".lm-Menu-itemLabel").get_by_text(item, exact=True).click()


FOLLOW = """
from mistudio_engine import connect
from mistudio_widgets import JobProgress

studio = connect()
progress = JobProgress("{slug}", studio)
progress
"""


def test_a_notebook_follows_a_job_and_cancels_it(page: Page, lab: Jupyter, work: Any, tmp_path: Path) -> None:
    open_notebook(page, lab, tmp_path / "notebooks", FOLLOW.format(slug=work.slug))
    widget = page.get_by_role("region", name=f"Job {work.slug}")
    expect(widget).to_contain_text("Running")
    expect(widget).to_contain_text("Live through the kernel")
    first = widget.get_by_role("progressbar").get_attribute("aria-valuenow")
    expect(widget.get_by_role("progressbar")).not_to_have_attribute("aria-valuenow", first or "")
    if folder := os.environ.get("MISTUDIO_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/lab-light.png")
    widget.get_by_role("button", name="Cancel").click()
    expect(widget.locator(".ms-job-state")).to_have_text("Cancelled")
    assert work.job.state == "cancelled"


def test_a_busy_kernel_neither_stops_the_widget_nor_its_buttons(page, lab, work, tmp_path) -> None:
    wait = FOLLOW.format(slug=work.slug).replace("\nprogress\n", """
from IPython.display import display
display(progress)
import time
while not progress.job or progress.job.state == "running": time.sleep(0.05)
print("waited until it was", progress.job.state)
""")
    open_notebook(page, lab, tmp_path / "notebooks", wait)
    widget = page.get_by_role("region", name=f"Job {work.slug}")
    expect(widget).to_contain_text("Live through the kernel")
    first = widget.get_by_role("progressbar").get_attribute("aria-valuenow")
    expect(widget.get_by_role("progressbar")).not_to_have_attribute("aria-valuenow", first or "")
    widget.get_by_role("button", name="Cancel").click()
    expect(widget.locator(".ms-job-state")).to_have_text("Cancelled")
    expect(page.locator(".jp-OutputArea")).to_contain_text("waited until it was cancelled")


def test_after_a_kernel_restart_the_widget_goes_on_through_the_jupyter_server(page, lab, work, tmp_path) -> None:
    open_notebook(page, lab, tmp_path / "notebooks", FOLLOW.format(slug=work.slug))
    widget = page.get_by_role("region", name=f"Job {work.slug}")
    expect(widget).to_contain_text("Live through the kernel")
    menu(page, "Kernel", "Restart Kernel…")
    page.locator(".jp-Dialog").get_by_role("button", name="Restart").click()
    expect(widget).to_contain_text("Live through the Jupyter server (the kernel is silent)")
    first = widget.get_by_role("progressbar").get_attribute("aria-valuenow")
    expect(widget.get_by_role("progressbar")).not_to_have_attribute("aria-valuenow", first or "")
    widget.get_by_role("button", name="Cancel").click()
    expect(widget.locator(".ms-job-state")).to_have_text("Cancelled")
    assert work.job.state == "cancelled"
