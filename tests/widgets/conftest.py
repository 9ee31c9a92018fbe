"""A Jupyter server with the extension, and a browser, for the tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Generator[Any]:
    """A Jupyter server with the extension, which looks for an engine but starts none."""
    pytest.importorskip("jupyter_server", reason="Jupyter Server is not installed; it is in the extra [lab]")
    from jupyter_process import running_jupyter

    home, root, folder = (tmp_path_factory.mktemp(name) for name in ("home", "root", "jupyter"))
    flag = "--MistudioLink.start_engine=False"
    with running_jupyter("jupyter_server", flag, home=home, root=root, folder=folder) as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Generator[Any]:
    """A headless browser for all tests; each opens a context of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it is in [dev]")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as running:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = running.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()
