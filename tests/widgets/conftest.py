"""A Jupyter server with the extension, and a browser, for the tests of this folder."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

import mistudio_widgets

sys.path.insert(0, str(Path(__file__).parent))  # page.py and stand_in.py: helpers, not tests

JUPYTER_CONFIG = Path(mistudio_widgets.__file__).parent / "jupyter-config"

START_SECONDS = 60


class Jupyter(NamedTuple):
    """A running server and the two ways to be somebody there."""

    url: str
    token: str
    home: Path

    def by_token(self) -> httpx.Client:
        """A program that has the token."""
        headers = {"Authorization": f"token {self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=30)

    @contextmanager
    def by_cookie(self) -> Generator[httpx.Client]:
        """A browser that is logged in; its pages know the XSRF token, which is a cookie."""
        with self.anonymous() as client:
            client.get("login").raise_for_status()
            client.get("login", params={"token": self.token})
            yield client

    def anonymous(self) -> httpx.Client:
        """Anybody."""
        return httpx.Client(base_url=self.url, trust_env=False, timeout=30)


@pytest.fixture(scope="session")
def start_jupyter(tmp_path_factory: pytest.TempPathFactory) -> Generator[Any]:
    """Starts `jupyter server` or `jupyter lab`, apart from whatever the user has; all of them end with the tests."""
    running: list[subprocess.Popen[str]] = []

    def start(module: str, *arguments: str, home: Path, root: Path) -> Jupyter:
        folder = tmp_path_factory.mktemp("jupyter")
        write_settings(folder / "settings")
        port, token = _free_port(), secrets.token_hex(16)
        environment = os.environ | {
            "HOME": str(folder),
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_CONFIG_PATH": str(JUPYTER_CONFIG),
            "JUPYTER_DATA_DIR": str(folder / "data"),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "IPYTHONDIR": str(folder / "ipython"),
            "JUPYTER_PLATFORM_DIRS": "1",
            "MISTUDIO_HOME": str(home),
        }
        process = subprocess.Popen(
            [
                sys.executable, "-m", module, "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
                f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
                f"--ServerApp.root_dir={root}", "--ServerApp.base_url=/user/someone", *arguments,
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        running.append(process)
        _wait_until_it_runs(process)
        url = f"http://127.0.0.1:{port}/user/someone/"
        # It says so a moment before it listens.
        with httpx.Client(transport=httpx.HTTPTransport(retries=6), trust_env=False, timeout=START_SECONDS) as client:
            client.get(f"{url}api").raise_for_status()
        return Jupyter(url, token, home)

    yield start
    for process in running:
        process.terminate()
    for process in running:
        process.wait(30)
        assert process.stderr is not None
        process.stderr.close()


def write_settings(folder: Path) -> None:
    """JupyterLab asks for news in a pop-up that would lie over the notebook."""
    file = folder / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    file.parent.mkdir(parents=True)
    file.write_text('{"fetchNews": "false", "checkForUpdates": false}', "utf-8")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _wait_until_it_runs(process: subprocess.Popen[str]) -> None:
    """Read what the server says until it says that it runs; a thread reads on, so that it can go on saying things."""
    assert process.stderr is not None
    runs, over, said = threading.Event(), threading.Event(), []

    def read(stream: Any) -> None:
        for line in stream:
            said.append(line)
            if "is running at" in line:
                runs.set()
                over.set()
        over.set()

    threading.Thread(target=read, args=(process.stderr,), daemon=True).start()
    over.wait(START_SECONDS)
    assert runs.is_set(), "".join(said)


@pytest.fixture(scope="session")
def jupyter(start_jupyter: Any, tmp_path_factory: pytest.TempPathFactory) -> Jupyter:
    """A Jupyter server with the extension, which looks for an engine but starts none."""
    home = tmp_path_factory.mktemp("home")
    root = tmp_path_factory.mktemp("root")
    return start_jupyter("jupyter_server", "--MistudioLink.start_engine=False", home=home, root=root)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    pytest.skip("there is no Chromium; on Debian: apt-get install chromium")


@pytest.fixture(scope="session")
def browser(chromium: str) -> Generator[Any]:
    """A headless browser for all tests; each opens a context of its own."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; it is in the extra [dev]"
    )
    with playwright.sync_playwright() as running:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = running.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()
