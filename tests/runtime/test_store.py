"""The store keeps what it has acknowledged, lists it stably and never mixes up who may write what."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from mistudio_engine.api.errors import BadInput, Conflict, CorruptFile, DiskFull, NotFound, Unsupported
from mistudio_engine.api.records import DatasetRecord, Job, LabelRecord, ModelRecord, SAERecord
from mistudio_engine.runtime.migrations import MIGRATIONS, migrate
from mistudio_engine.runtime.rows import condition_of
from mistudio_engine.runtime.store import NewEvent, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "home" / "mistudio.db") as store:
        yield store


def model(slug: str, **fields: object) -> ModelRecord:
    return ModelRecord.model_validate({"slug": slug, "source": f"hub/{slug}", **fields})


def label(text: str, author: str, index: int = 7) -> LabelRecord:
    return LabelRecord(sae="l2", index=index, label=text, author=author)


def test_a_record_comes_back_as_it_was_kept(store: Store) -> None:
    kept = store.insert(model("gpt2", n_layers=12))
    assert kept.created_at > 0
    assert store.get(ModelRecord, "gpt2") == kept
    assert kept.ref == "model/gpt2"


def test_a_taken_slug_is_a_conflict_within_its_kind_only(store: Store) -> None:
    store.insert(model("a"))
    store.insert(DatasetRecord(slug="a", source="x"))
    with pytest.raises(Conflict, match="There is a model 'a' already"):
        store.insert(model("a"))


@pytest.mark.parametrize("slug", ["", "a/b", "a#7", ".hidden", "a b", "a.part", "é", "x" * 121, "a\n"])
def test_a_name_that_could_break_a_path_or_a_ref_is_refused(store: Store, slug: str) -> None:
    with pytest.raises(BadInput, match="cannot be the name of a model"):
        store.insert(model(slug))


def test_put_replaces_and_keeps_the_place(store: Store) -> None:
    first = store.put(model("a"))
    store.put(model("b"))
    again = store.put(model("a", n_layers=3))
    assert again.created_at == first.created_at
    assert [record.slug for record in store.all(ModelRecord)] == ["a", "b"]


def test_what_is_missing_is_named_with_what_may_have_been_meant(store: Store) -> None:
    for slug in ("pythia-70m", "gpt2", "stories"):
        store.insert(model(slug))
    with pytest.raises(NotFound, match=r"There is no model 'gtp2'\. Known: gpt2, stories, pythia-70m"):
        store.get(ModelRecord, "gtp2")
    with pytest.raises(NotFound):
        store.update(ModelRecord, "gtp2", n_layers=1)
    with pytest.raises(NotFound):
        store.delete(ModelRecord, "gtp2")


def test_an_update_changes_fields_and_refuses_names_that_are_none(store: Store) -> None:
    store.insert(model("a"))
    assert store.update(ModelRecord, "a", n_layers=4).n_layers == 4
    assert store.get(ModelRecord, "a").source == "hub/a"
    with pytest.raises(TypeError, match="n_layer'"):
        store.update(ModelRecord, "a", n_layer=5)


def test_concurrent_updates_lose_nothing(store: Store) -> None:
    store.insert(model("a"))

    def add() -> None:
        for _ in range(25):
            with store.transaction():
                store.update(ModelRecord, "a", n_layers=store.get(ModelRecord, "a").n_layers + 1)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(add) for _ in range(4)]:
            future.result(30)
    assert store.get(ModelRecord, "a").n_layers == 100


def test_a_transaction_is_all_or_nothing_and_sees_its_own_writes(store: Store) -> None:
    heard: list[str] = []
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.insert(model("a"))
        store.append_events([NewEvent("models/a", "created", {})])
        store.after_commit(lambda: heard.append("committed"))
        assert store.exists(ModelRecord, "a")
        raise ZeroDivisionError
    assert not store.exists(ModelRecord, "a")
    assert store.last_seq() == 0
    assert heard == []
    with store.transaction():
        store.after_commit(lambda: heard.append("committed"))
        assert heard == []
    assert heard == ["committed"]


def test_a_full_disk_is_a_typed_error_and_loses_nothing(store: Store) -> None:
    store.insert(model("a"))
    (n_pages,) = store._writer.execute("PRAGMA page_count").fetchone()
    store._writer.execute(f"PRAGMA max_page_count = {n_pages}")
    with pytest.raises(DiskFull, match="The database needs more than the"):
        store.put_embeddings("minilm", {"text": bytes(1 << 20)})
    assert store.get(ModelRecord, "a").slug == "a"
    store._writer.execute("PRAGMA max_page_count = 1000000")
    store.put_embeddings("minilm", {"text": bytes(1 << 20)})
    assert store.embeddings("minilm", ["text"]) == [bytes(1 << 20)]


def test_readers_wait_for_no_writer_and_see_the_last_commit(store: Store) -> None:
    store.insert(model("a"))
    with store.transaction(), ThreadPoolExecutor(1) as other:
        store.update(ModelRecord, "a", n_layers=9)
        assert other.submit(store.get, ModelRecord, "a").result(10).n_layers == 0
    with store._reading() as connection, ThreadPoolExecutor(1) as other:
        before = connection.execute("SELECT body FROM records").fetchall()
        other.submit(store.update, ModelRecord, "a", n_layers=10).result(10)  # nor does a writer wait for readers
        assert connection.execute("SELECT body FROM records").fetchall() == before
    assert store.get(ModelRecord, "a").n_layers == 10


def test_acknowledged_writes_survive_kill_9(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from mistudio_engine.api.records import ModelRecord
from mistudio_engine.runtime.store import Store
store = Store(Path(sys.argv[1]))
for n in range(20):
    store.insert(ModelRecord(slug=f"m{n}", source="x"))
print("acknowledged", flush=True)
with store.transaction():
    store.insert(ModelRecord(slug="never-acknowledged", source="x"))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "mistudio.db"
    child = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60)
    assert child.stdout == "acknowledged\n", child.stderr
    with Store(path) as store:
        assert [record.slug for record in store.all(ModelRecord)] == [f"m{n}" for n in range(20)]


def test_pages_are_stable_while_records_come_and_go(store: Store) -> None:
    for n in range(10):
        store.insert(model(f"m{n}"))
    first = store.page(ModelRecord, limit=4)
    assert [record.slug for record in first.rows] == ["m9", "m8", "m7", "m6"]
    assert (first.total, first.shown) == (10, 4)
    store.insert(model("newer"))
    store.delete(ModelRecord, "m6")  # the very record that the cursor names
    store.update(ModelRecord, "m5", n_layers=1)
    second = store.page(ModelRecord, limit=4, cursor=first.next_cursor)
    third = store.page(ModelRecord, limit=4, cursor=second.next_cursor)
    assert [record.slug for record in (*second.rows, *third.rows)] == ["m5", "m4", "m3", "m2", "m1", "m0"]
    assert third.next_cursor is None


def test_pages_run_oldest_first_as_well(store: Store) -> None:
    for n in range(3):
        store.insert(model(f"m{n}"))
    first = store.page(ModelRecord, limit=2, newest_first=False)
    rest = store.page(ModelRecord, limit=2, newest_first=False, cursor=first.next_cursor)
    assert [record.slug for record in (*first.rows, *rest.rows)] == ["m0", "m1", "m2"]
    with pytest.raises(BadInput, match="not a cursor of this list"):
        store.page(ModelRecord, cursor=first.next_cursor)


@pytest.mark.parametrize("cursor", ["", "7", "desc--1", "desc-1; DROP TABLE records", "desc-" + "9" * 40])
def test_a_cursor_from_elsewhere_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(BadInput):
        store.page(ModelRecord, cursor=cursor)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("PYTHIA", ["pythia-70m"]),
        ("hub/", ["pythia-70m", "gpt2", "groesse"]),
        ("ÜBERGRÖSSE", ["groesse"]),
        ("100%", ["gpt2"]),
        ("_", []),
        ("%", ["gpt2"]),
        ("\\", []),
        ("' OR 1=1 --", []),
        ("cafe0", []),
    ],
)
def test_a_query_is_found_anywhere_in_any_case_and_means_itself(store: Store, query: str, found: list[str]) -> None:
    store.insert(model("groesse", family="Übergröße", sha256="cafe01"))
    store.insert(model("gpt2", family="100% dense"))
    store.insert(model("pythia-70m"))
    assert [record.slug for record in store.page(ModelRecord, query=query).rows] == found


def test_where_compares_fields_with_a_value_with_none_and_with_any_of_several(store: Store) -> None:
    store.insert(SAERecord(slug="a", model="gpt2", layer=1, d_in=8))
    store.insert(SAERecord(slug="b", model="gpt2", layer=None, d_in=8))
    store.insert(SAERecord(slug="c", model="pythia", layer=2, d_in=16))

    def found(**where: object) -> list[str]:
        return [record.slug for record in store.all(SAERecord, **where)]

    assert found(model="gpt2", layer=1) == ["a"]
    assert found(layer=None) == ["b"]
    assert found(layer=[1, 2]) == ["a", "c"]
    assert found(slug="c") == ["c"]
    assert store.count(SAERecord, d_in=8) == 2
    assert store.count_by(SAERecord, "model") == {"gpt2": 2, "pythia": 1}
    with pytest.raises(TypeError, match="no field 'modle'"):
        found(modle="gpt2")


def test_filters_use_an_index(store: Store) -> None:
    store.insert(Job(slug="j", operation="x"))
    condition, values = condition_of(Job, {"state": "queued"})
    with closing(sqlite3.connect(store.path)) as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN SELECT body FROM records WHERE {condition}", values).fetchall()
    assert "records_by_state" in str(plan)


def test_an_idempotency_key_can_belong_to_one_job_only(store: Store) -> None:
    store.insert(Job(slug="a", operation="x", idempotency_key="k"))
    store.insert(Job(slug="b", operation="x"))
    store.insert(Job(slug="c", operation="x"))
    with pytest.raises(sqlite3.IntegrityError):
        store.insert(Job(slug="d", operation="x", idempotency_key="k"))


def test_new_names_are_free_and_numbers_are_given_out_once(store: Store) -> None:
    assert store.new_slug(ModelRecord, "gpt2") == "gpt2"
    for slug in ("gpt2", "gpt2-2", "gpt2-xl"):
        store.insert(model(slug))
    assert store.new_slug(ModelRecord, "gpt2") == "gpt2-3"
    assert store.new_slug(SAERecord, "gpt2") == "gpt2"
    first = store.numbered_slug(Job, "train-sae")
    store.insert(Job(slug=first, operation="train_sae"))
    store.delete(Job, first)
    assert [first, store.numbered_slug(Job, "train-sae")] == ["train-sae-0001", "train-sae-0002"]


def test_a_job_never_supersedes_what_a_person_or_an_agent_wrote(store: Store) -> None:
    assert store.add_label(label("space", "job:label-0001")) is not None
    assert store.add_label(label("outer space", "job:label-0002")) is not None
    assert store.add_label(label("astronomy", "agent:claude")) is not None
    assert store.add_label(label("space again", "job:label-0003")) is None
    final = store.add_label(label("telescopes", "person"))
    assert final is not None and final.version == 4 and final.created_at > 0
    assert store.label("l2", 7) == final
    history = store.label_history("l2", 7)
    assert [each.label for each in history] == ["telescopes", "astronomy", "outer space", "space"]


def test_labels_are_listed_by_feature_and_go_with_their_sae(store: Store) -> None:
    with store.transaction():
        for index in range(100):
            store.add_label(label(f"old {index}", "job:x", index))
            store.add_label(label(f"new {index}", "job:x", index))
    labels = store.labels("l2")
    assert {index: each.label for index, each in labels.items()} == {n: f"new {n}" for n in range(100)}
    store.delete_labels("l2")
    assert store.labels("l2") == {}
    assert store.label("l2", 7) is None


def test_embeddings_come_back_in_order_with_none_for_unknown_texts(store: Store) -> None:
    texts = [f"text {n}" for n in range(1200)]
    store.put_embeddings("minilm", {text: text.encode() for text in texts[::2]})
    found = store.embeddings("minilm", texts)
    assert found == [text.encode() if n % 2 == 0 else None for n, text in enumerate(texts)]
    assert store.embeddings("other", texts[:1]) == [None]


def test_settings_are_any_json_and_can_be_forgotten(store: Store) -> None:
    assert store.get_setting("embedder", "none") == "none"
    store.put_setting("embedder", {"kind": "ollama", "batch": [1, 2.5, True]})
    assert store.settings() == {"embedder": {"kind": "ollama", "batch": [1, 2.5, True]}}
    store.put_setting("embedder", None)
    assert store.settings() == {}


def test_events_are_numbered_and_read_by_channel_prefix_and_name(store: Store) -> None:
    store.append_events([NewEvent("jobs/a", "queued", {}), NewEvent("jobs/b", "queued", {"loss": float("nan")})])
    store.append_events([NewEvent("jobs", "odd", {}), NewEvent("jobs/a", "running", {"n": 1})])

    def seqs(*args: object, **kwargs: object) -> list[int]:
        return [event.seq for event in store.events_after(*args, **kwargs)]  # type: ignore[arg-type]

    assert seqs(0) == [1, 2, 3, 4]
    assert seqs(1, ["jobs/a"]) == [4]
    assert seqs(0, ["jobs/*"]) == [1, 2, 4]
    assert seqs(0, ["jobs/b", "jobs"]) == [2, 3]
    assert seqs(0, []) == []
    assert seqs(0, None, 2) == [1, 2]
    assert seqs(0, None, 1, names=["queued"], newest_first=True) == [2]
    assert store.events_after(0, ["jobs/b"])[0].data == {"loss": None}
    assert store.last_seq() == 4


def test_an_older_database_is_backed_up_and_migrated(tmp_path: Path) -> None:
    path = tmp_path / "mistudio.db"
    with Store(path) as store:
        store.insert(model("a"))
        epoch = store.epoch()

    def second_schema(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE later (x)")

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        backup = migrate(connection, path, [*MIGRATIONS, second_schema])
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)
    assert backup is not None and backup == tmp_path / f"mistudio.db.v{len(MIGRATIONS)}.backup"
    with Store(backup) as old:
        assert old.get(ModelRecord, "a").slug == "a"
        assert old.epoch() == epoch


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mistudio.db"
    Store(path).close()

    def broken(connection: sqlite3.Connection) -> None:
        connection.execute("DROP TABLE records")
        raise ZeroDivisionError

    with closing(sqlite3.connect(path, isolation_level=None)) as connection, pytest.raises(ZeroDivisionError):
        migrate(connection, path, [*MIGRATIONS, broken])
    with Store(path) as store:
        assert store.backup is None
        store.insert(model("still here"[:5]))


def test_a_newer_database_is_refused_with_both_versions(tmp_path: Path) -> None:
    path = tmp_path / "mistudio.db"
    Store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(Unsupported, match=f"schema version 99; this miStudio knows versions up to {len(MIGRATIONS)}"):
        Store(path)


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mistudio.db"
    path.write_bytes(b"certainly not a database " * 100)
    with pytest.raises(CorruptFile, match="not a usable database"):
        Store(path)
    assert path.read_bytes().startswith(b"certainly")


def test_the_database_is_private(tmp_path: Path) -> None:
    with Store(tmp_path / "mistudio.db") as store:
        store.insert(model("a"))
        modes = {path.name: path.stat().st_mode & 0o077 for path in tmp_path.iterdir()}
    assert modes and set(modes.values()) == {0}


def test_a_closed_store_says_so_even_to_a_reader_that_was_busy(tmp_path: Path) -> None:
    store = Store(tmp_path / "mistudio.db")
    inside, closed = threading.Event(), threading.Event()

    def read() -> None:
        with store._reading() as connection:
            inside.set()
            assert closed.wait(10)
            connection.execute("SELECT 1")

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(read)
        assert inside.wait(10)
        store.close()
        closed.set()
        busy.result(10)
    with pytest.raises(sqlite3.ProgrammingError):
        store.exists(ModelRecord, "a")
    assert not store._idle
