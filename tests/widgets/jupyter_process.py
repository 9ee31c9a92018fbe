"""A Jupyter server of our own, with the extension and apart from whatever the user of this machine has."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

import mistudio_widgets

JUPYTER_CONFIG = Path(mistudio_widgets.__file__).parent / "jupyter-config"
"""What `pip install` puts into etc/jupyter; named by an environment variable it does the same."""

START_SECONDS = 60


class Jupyter(NamedTuple):
    """A running server and the ways to be somebody there."""

    url: str
    token: str
    home: Path

    @property
    def origin(self) -> str:
        """What a browser says of its pages."""
        return self.url[: self.url.index("/user")]

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


@contextmanager
def running_jupyter(module: str, *arguments: str, home: Path, root: Path, folder: Path) -> Generator[Jupyter]:
    """Run `jupyter_server` or `jupyterlab` on notebooks in `root`, with its own files in `folder`."""
    _write_settings(folder / "settings")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", module, "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={root}", "--ServerApp.base_url=/user/someone", *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(folder, home),
    )
    try:
        reader = _wait_until_it_runs(process)
        url = f"http://127.0.0.1:{port}/user/someone/"
        # It says that it runs a moment before it listens.
        with httpx.Client(transport=httpx.HTTPTransport(retries=6), trust_env=False, timeout=START_SECONDS) as client:
            client.get(f"{url}api").raise_for_status()
        yield Jupyter(url, token, home)
    finally:
        process.terminate()
        process.wait(30)
        assert process.stderr is not None
        reader.join(30)
        process.stderr.close()


def _environment(folder: Path, home: Path) -> dict[str, str]:
    return os.environ | {
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


def _write_settings(folder: Path) -> None:
    """JupyterLab asks for news in a pop-up that would lie over the notebook."""
    file = folder / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    file.parent.mkdir(parents=True)
    file.write_text('{"fetchNews": "false", "checkForUpdates": false}', "utf-8")


def _wait_until_it_runs(process: subprocess.Popen[str]) -> threading.Thread:
    """Read what the server says until it says that it runs; a thread reads on, so that it can go on saying things."""
    runs, over, said = threading.Event(), threading.Event(), []

    def read(stream: Any) -> None:
        for line in stream:
            said.append(line)
            if "is running at" in line:
                runs.set()
                over.set()
        over.set()

    reader = threading.Thread(target=read, args=(process.stderr,), daemon=True)
    reader.start()
    over.wait(START_SECONDS)
    assert runs.is_set(), "".join(said)
    return reader
