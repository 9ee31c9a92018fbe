"""An engine behind its server, with nothing in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
