"""An engine behind its server, with nothing in it, and a directory for engines that are processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mistudio_engine.server.serve import stop
from tests.behaviour.doors import Loop, Served, served


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    """An event loop on a thread."""
    made = Loop()
    yield made
    made.close()


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real engine behind a real server."""
    with served(tmp_path_factory.mktemp("bare")) as made:
        yield made


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A data directory; whatever engine runs on it is stopped at the end."""
    yield tmp_path / "home"
    stop(tmp_path / "home")
