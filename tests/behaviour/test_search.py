"""Searching features through a whole engine: every mode, every filter, neighbours, and an index that can be lost."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from mistudio_engine.api.errors import BadInput, EmptyData, NotFound
from mistudio_engine.api.features import NeighbourPage
from mistudio_engine.api.operations import (
    DeleteExtraction,
    DeleteSAE,
    Extract,
    FeaturesOnText,
    GetFeature,
    Neighbours,
    SetLabel,
    UseExtraction,
)
from mistudio_engine.api.records import SAERecord
from mistudio_engine.handlers.knowledge import Knowledge
from mistudio_engine.handlers.search_index import index_features
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.feature_rows import Where
from mistudio_engine.saes import load_sae
from tests.behaviour.doors import started
from tests.behaviour.searches import search, some_feature
from tests.behaviour.trainings import completed, train


@pytest.fixture(scope="module")
def kept(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of a stopped engine with a labelled SAE, `first`, and one of another hook, `other`."""
    home = tmp_path_factory.mktemp("kept") / "home"
    shutil.copytree(prepared, home)
    engine = started(home)
    completed(engine, train(name="other", hook_name="blocks.0.hook_resid_post"))
    completed(engine, Extract(sae="other", n_tokens=2048))
    engine.stop()
    return home


@pytest.fixture
def engine(kept: Path, tmp_path: Path) -> Iterator[Engine]:
    """An engine of its own for a test that changes things."""
    shutil.copytree(kept, tmp_path / "home")
    engine = started(tmp_path / "home")
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def asked(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for the tests that only read."""
    home = tmp_path_factory.mktemp("asked") / "home"
    shutil.copytree(kept, home)
    engine = started(home)
    yield engine
    engine.stop()


def neighbours(engine: Engine, index: int, **arguments: Any) -> NeighbourPage:
    return engine.call(Neighbours(sae="first", index=index, **arguments))


def directions(engine: Engine) -> np.ndarray:
    """Unit decoder rows, in float64."""
    W_dec = load_sae(engine.home / engine.store.get(SAERecord, "first").folder).W_dec.double()
    return torch.nn.functional.normalize(W_dec, dim=-1).numpy()


WAYS: dict[str, dict[str, Any]] = {
    "list": {},
    "auto": {"query": "words for animals"},
    "meaning": {"query": "words for animals", "mode": "meaning"},
    "text": {"query": "the", "mode": "text"},
    "token": {"query": "the", "mode": "token"},
    "promotes": {"query": "the", "mode": "promotes"},
    "suppresses": {"query": "the and", "mode": "suppresses"},
}


def test_every_mode_finds_something_says_which_it_was_and_ranks_by_falling_score(asked: Engine) -> None:
    for way, arguments in WAYS.items():
        page = search(asked, sae="first", **arguments)
        assert page.rows, way
        assert page.mode == {"auto": "hybrid"}.get(way, way)
        assert page.score_means
        scores = [row.score for row in page.rows]
        assert scores == [None] * len(scores) if way == "list" else scores == sorted(scores, reverse=True)
        assert (page.embedder is not None) == (way in ("auto", "meaning"))


def test_a_mode_without_what_it_needs_says_so(asked: Engine) -> None:
    for mode in ("meaning", "text", "token", "promotes", "suppresses", "decoder"):
        with pytest.raises(EmptyData, match=f"{mode} needs"):
            search(asked, sae="first", mode=mode)
    ref = f"sae/first#{some_feature(asked)}"
    with pytest.raises(BadInput, match="a query, and a feature"):
        search(asked, query="cats", like=ref)
    with pytest.raises(BadInput, match="compared by text"):
        search(asked, like=ref, mode="text")
    with pytest.raises(BadInput, match="not with words"):
        search(asked, query="cats", mode="decoder")
    with pytest.raises(NotFound):
        search(asked, like="sae/first#100000")


def test_what_promotes_a_token_has_it_among_its_strongest_logits(asked: Engine) -> None:
    for mode, end in (("promotes", "promoted"), ("suppresses", "suppressed")):
        page = search(asked, query="the", mode=mode, sae="first", limit=5, include_dense=True)
        effects = []
        for row in page.rows:
            card = asked.call(GetFeature(sae="first", index=row.index))
            shown = {each.token.strip(): abs(each.value) for each in getattr(card, end)}
            effects.append(shown["the"])
        assert effects == sorted(effects, reverse=True)
        assert page.rows[0].score == 1.0
        assert f"{effects[0]:.2f}" in page.rows[0].why


def test_filters_hold_in_every_mode_and_what_is_hidden_is_counted(asked: Engine) -> None:
    everything = {row.index: row for row in search(asked, sae="first", limit=200, include_dense=True).rows}
    frequency = float(np.median([row.activation_frequency for row in everything.values()]))
    like = {"like": {"like": f"sae/first#{some_feature(asked)}"}}
    for way, arguments in (WAYS | like).items():
        whole = search(asked, sae="first", limit=200, include_dense=True, **arguments)
        by_default = search(asked, sae="first", limit=200, **arguments)
        assert by_default.total + by_default.hidden.get("dense", 0) == whole.total, way
        assert all(row.activation_frequency <= 0.1 for row in by_default.rows)
        rare = search(asked, sae="first", limit=200, include_dense=True, max_frequency=frequency, **arguments)
        assert {row.index for row in rare.rows} == {
            row.index for row in whole.rows if row.activation_frequency <= frequency
        }, way
        sure = search(asked, sae="first", limit=200, include_dense=True, min_confidence=0.8, **arguments)
        assert all(row.confidence >= 0.8 for row in sure.rows)
        assert sure.total + sure.hidden.get("badly_scored", 0) == whole.total, way
        nobody = search(asked, sae="first", author="person", include_dense=True, **arguments)
        assert nobody.total == 0, way


def test_tokens_that_a_query_names_and_the_vocabulary_lacks_are_said(asked: Engine) -> None:
    for mode in ("promotes", "suppresses"):
        plain = search(asked, query="the", mode=mode, sae="first")
        page = search(asked, query="the zyzzyva", mode=mode, sae="first")
        assert [(row.index, row.score, row.why) for row in page.rows] == [
            (row.index, row.score, row.why) for row in plain.rows
        ]
        assert "no single token of model/tiny: 'zyzzyva'" in page.note
        assert "token" not in plain.note
    page = search(asked, query="zyzzyva", mode="token", sae="first")
    assert page.rows == []
    assert "no single token of model/tiny: 'zyzzyva'" in page.note


def test_a_hidden_dense_feature_that_matches_best_is_named(engine: Engine) -> None:
    everything = search(engine, sae="first", limit=200, include_dense=True).rows
    ref = next(row.ref for row in everything if row.activation_frequency > 0.1)
    engine.call(SetLabel(feature=ref, label="a zebra crossing"))
    for mode in ("text", "meaning", "auto"):
        page = search(engine, query="a zebra crossing", mode=mode, sae="first")
        assert ref not in [row.ref for row in page.rows]
        assert f": {ref}" in page.note and "include_dense" in page.note, mode
        shown = search(engine, query="a zebra crossing", mode=mode, sae="first", include_dense=True)
        assert (shown.rows[0].ref, shown.note) == (ref, "")
    assert search(engine, sae="first").note == "", "a list compares nothing"


def test_a_person_s_label_is_found_by_its_words_its_author_and_its_category(engine: Engine) -> None:
    index = some_feature(engine)
    engine.call(SetLabel(feature=f"sae/first#{index}", label="a zebra crossing", category="Street > Signs"))
    for arguments in (
        {"query": "zebra", "mode": "text"},
        {"author": "person"},
        {"category": "street"},
        {"label": "ZEBRA"},
        {"query": "striped pedestrian crossing", "mode": "meaning", "author": "person"},
    ):
        page = search(engine, sae="first", **arguments)
        assert [row.index for row in page.rows] == [index], arguments
    assert search(engine, query="zebra").rows[0].index == index


def test_similar_features_are_those_of_a_brute_force(asked: Engine) -> None:
    index = some_feature(asked)
    rows = directions(asked)
    cosines = rows @ rows[index]
    page = search(asked, like=f"sae/first#{index}", mode="decoder", limit=200, include_dense=True, include_dead=True)
    assert index not in [row.index for row in page.rows]
    for row in page.rows:
        assert row.score == pytest.approx(max(0.0, cosines[row.index]), abs=1e-5)
    both = search(asked, like=f"sae/first#{index}", sae="first")
    assert both.mode == "similar"
    assert "decoder direction alike" in both.rows[0].why
    assert "close in meaning" in both.rows[0].why


def test_neighbours_by_decoder_are_the_nearest_and_the_most_opposite(asked: Engine) -> None:
    index = some_feature(asked)
    rows = directions(asked)
    cosines = rows @ rows[index]
    page = neighbours(asked, index, n=5, include_dense=True, include_dead=True)
    order = [at for at in np.argsort(-cosines) if at != index]
    similar = [row for row in page.rows if row.sign == "similar"]
    opposite = [row for row in page.rows if row.sign == "opposite"]
    assert [row.index for row in similar] == order[:5]
    assert [row.index for row in opposite] == order[::-1][:5]
    for row in page.rows:
        assert row.value == pytest.approx(cosines[row.index], abs=1e-5)
    hiding = neighbours(asked, index, n=200)
    assert all(row.activation_frequency is None or 0 < row.activation_frequency <= 0.1 for row in hiding.rows)
    assert hiding.hidden


def test_neighbours_by_label_logits_and_coactivation(asked: Engine) -> None:
    index = some_feature(asked)
    for by in ("label", "logits", "coactivation"):
        page = neighbours(asked, index, by=by, n=5)
        assert page.rows, by
        values = [row.value for row in page.rows if row.sign == "similar"]
        assert values == sorted(values, reverse=True)
        assert all(-1 <= value <= 1 for value in values)
        assert index not in [row.index for row in page.rows]
    assert page.rows[0].count > 0
    assert neighbours(asked, index, by="label").embedder


def test_directions_of_another_hook_are_not_compared(asked: Engine) -> None:
    index = some_feature(asked)
    with pytest.raises(BadInput, match="different models or hooks"):
        neighbours(asked, index, other_sae="other")
    with pytest.raises(BadInput, match="different models or hooks"):
        search(asked, like=f"sae/first#{index}", mode="decoder", sae="other")
    with pytest.raises(NotFound):
        neighbours(asked, 100_000)
    with pytest.raises(BadInput, match="one SAE"):
        neighbours(asked, index, by="coactivation", other_sae="other")


def test_features_on_a_text_are_filtered_like_a_search(asked: Engine) -> None:
    text = "The small dog ran along the river"
    whole = asked.call(FeaturesOnText(sae="first", text=text, k=200, include_dense=True))
    rare = asked.call(FeaturesOnText(sae="first", text=text, k=200, max_frequency=0.02))
    expected = {row.index for row in whole.rows if row.activation_frequency <= 0.02}
    assert {row.index for row in rare.rows} == expected
    assert sum(rare.hidden.values()) == whole.total - len(expected)
    sure = asked.call(FeaturesOnText(sae="first", text=text, k=200, include_dense=True, min_confidence=0.8))
    assert all(row.confidence >= 0.8 for row in sure.rows)
    assert sure.hidden["badly_scored"] == whole.total - len(sure.rows)


def every_answer(engine: Engine) -> list[dict[str, Any]]:
    """All pages of every mode, but for their cursors, which name the version of the index."""
    index = 0
    ways = [*WAYS.values(), {"like": f"sae/first#{index}"}, {"like": f"sae/first#{index}", "mode": "meaning"}]
    found = []
    for arguments in ways:
        cursor = None
        while True:
            page = search(engine, limit=40, include_dense=True, include_dead=True, cursor=cursor, **arguments)
            found.append(page.model_dump(exclude={"next_cursor"}))
            cursor = page.next_cursor
            if cursor is None:
                break
    return found


def test_an_index_that_is_deleted_cut_off_or_garbled_gives_the_same_answers_again(kept: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(kept, home)
    engine = started(home)
    engine.call(SetLabel(feature="sae/first#3", label="a late label"))
    before = every_answer(engine)
    engine.stop()
    sound = home.parent / "sound"
    shutil.copytree(home / "index", sound)
    files = sorted((path for path in sound.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    for harm in ("delete", "truncate", "garble"):
        shutil.rmtree(home / "index")
        if harm != "delete":
            shutil.copytree(sound, home / "index")
            for path in files[:3]:
                content = path.read_bytes()
                spoilt = content[: len(content) // 2] if harm == "truncate" else content[::-1]
                (home / "index" / path.relative_to(sound)).write_bytes(spoilt)
        again = started(home)
        try:
            assert every_answer(again) == before, harm
        finally:
            again.stop()


def test_pages_go_on_while_labels_are_written_and_a_new_extraction_ends_them_clearly(engine: Engine) -> None:
    first = {way: search(engine, sae="first", limit=5, **arguments) for way, arguments in WAYS.items()}
    whole = {way: search(engine, sae="first", limit=200, **arguments) for way, arguments in WAYS.items()}
    stop = threading.Event()

    def write() -> None:
        at = 0
        while not stop.is_set():
            engine.call(SetLabel(feature=f"sae/first#{at % 100}", label=f"the label {at}"))
            at += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for way, arguments in WAYS.items():
            rows, cursor = list(first[way].rows), first[way].next_cursor
            while cursor is not None:
                page = search(engine, sae="first", limit=5, cursor=cursor, **arguments)
                rows, cursor = rows + page.rows, page.next_cursor
            assert [(row.index, row.label, row.score) for row in rows] == [
                (row.index, row.label, row.score) for row in whole[way].rows
            ], way
    finally:
        stop.set()
        writer.join()
    completed(engine, Extract(sae="first", n_tokens=4096))
    with pytest.raises(BadInput, match="another search"):
        search(engine, sae="first", limit=5, cursor=first["token"].next_cursor, **WAYS["token"])
    assert {row.index for row in search(engine, sae="first", mode="token", query="the").rows}


def test_a_label_that_is_written_while_its_feature_is_indexed_stays_in_the_index(engine: Engine) -> None:
    with Knowledge.of(engine, "first") as known:
        steps = index_features(engine, known)
        while (next(steps).fraction or 0.0) == 0.0:
            pass  # until the first rows are made
        engine.call(SetLabel(feature="sae/first#0", label="a zebra crossing"))
        for _ in steps:
            pass
    found = search(engine, query="zebra", mode="text", sae="first", include_dense=True, include_dead=True)
    assert [row.index for row in found.rows] == [0]


def test_of_two_extractions_that_are_indexed_at_once_the_one_chosen_last_is_found(engine: Engine) -> None:
    before = engine.store.get(SAERecord, "first").extraction
    completed(engine, Extract(sae="first", n_tokens=4096))
    with Knowledge.of(engine, "first") as known:
        steps = index_features(engine, known)
        next(steps)
        completed(engine, UseExtraction(extraction=before))
        for _ in steps:
            pass
    page = search(engine, sae="first", include_dense=True, include_dead=True)
    assert (page.total, page.extraction, page.note) == (128, before, "")


def test_an_index_that_lacks_features_of_an_extraction_says_so(engine: Engine) -> None:
    completed(engine, Extract(sae="first", n_tokens=4096))
    with Knowledge.of(engine, "first") as known:
        engine.index.delete_sae("first")
        steps = index_features(engine, known, range(40))
        for _ in steps:
            pass
    page = search(engine, query="the", mode="text", sae="first")
    assert f"Only 40 of the 128 features of extraction/{known.sae.extraction}" in page.note
    assert "Only" not in search(engine, query="the", mode="text", sae="other").note
    completed(engine, UseExtraction(extraction=known.sae.extraction))
    assert "Only" not in search(engine, query="the", mode="text", sae="first").note


def test_an_sae_whose_extraction_is_damaged_does_not_keep_others_from_being_found(kept: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(kept, home)
    shutil.rmtree(home / "index")
    for path in (home / "extractions").glob("other*/data/features.parquet"):
        path.write_bytes(b"nothing that can be read")
    engine = started(home)
    try:
        assert search(engine, query="the", mode="text", sae="first").rows
        assert "Only 0 of the 64 features" in search(engine, query="the", mode="text").note
    finally:
        engine.stop()


HOSTILE = [
    *("'", '"', "' OR '1'='1", "x') OR contains(label, '", "%", "_", "\\", "(", "[a-", "*", "AND OR NOT", "label:the"),
    *("\x00", "\u202e", "\u200b", "🐈", "👩\u200d👩\u200d👧", "\ud800", "東京", "حيوان", "x" * 1000, "the " * 250),
]
"""Queries that some engine of search takes for something else than text."""


def test_any_text_is_a_query_and_a_filter_and_nothing_but_text(asked: Engine) -> None:
    everything = search(asked, sae="first", limit=1, include_dense=True).total
    for query in HOSTILE:
        for mode in ("auto", "meaning", "text", "token", "promotes"):
            with suppress(ValidationError):
                found = search(asked, sae="first", query=query, mode=mode, include_dense=True)
                assert found.total <= everything, (query, mode)
        with suppress(ValidationError):
            labels = [row.label for row in search(asked, sae="first", label=query[:200], limit=200).rows]
            assert all(query[:200].lower() in label.lower() for label in labels), query
            assert search(asked, sae="first", category=query).total == 0, query


def test_a_cursor_that_somebody_made_up_is_refused(asked: Engine) -> None:
    cursor = search(asked, sae="first", limit=5).next_cursor
    said = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    forged = [said[:3], {}, [[[]]], [*said[:1], -1, *said[2:]], [*said[:2], 10**30, said[3]]]
    made_up = [json.dumps(each) for each in forged]
    made_up += [f'["{said[0]}", Infinity, 5, "{said[3]}"]', "[" * 100_000, "null", ""]
    for text in made_up:
        with pytest.raises(BadInput, match="not a cursor"):
            search(asked, sae="first", limit=5, cursor=base64.urlsafe_b64encode(text.encode()).decode() or "!")
    for other in ([said[0], 10**6, *said[2:]], ["0" * 8, *said[1:]]):
        cursor = base64.urlsafe_b64encode(json.dumps(other).encode()).decode()
        with pytest.raises(BadInput, match="is gone"):
            search(asked, sae="first", limit=5, cursor=cursor)
    with pytest.raises(BadInput, match="another search"):
        search(asked, sae="other", limit=5, cursor=search(asked, sae="first", limit=5).next_cursor)


def test_words_of_a_long_query_that_are_not_looked_up_are_said(asked: Engine) -> None:
    words = [f"w{number}" for number in range(17)]
    for mode, said in (("text", "first 16 words"), ("auto", "first 16 words"), ("promotes", "first 16 tokens")):
        assert said in search(asked, sae="first", query=" ".join(words), mode=mode).note
        assert said not in search(asked, sae="first", query=" ".join(words[:16] * 2), mode=mode).note
    assert "first 16" not in search(asked, sae="first", query=" ".join(words), mode="meaning").note


def test_a_feature_without_a_direction_is_still_compared_by_its_meaning(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "home")
    weights = tmp_path / "home" / "saes" / "first" / "sae_weights.safetensors"
    tensors = load_file(weights)
    engine = started(tmp_path / "home")
    try:
        index = some_feature(engine)
        tensors["W_dec"][index] = 0
        save_file(tensors, weights)
        page = search(engine, like=f"sae/first#{index}", sae="first")
        assert page.rows and all(row.why.startswith("close in meaning") for row in page.rows)
        assert f"the decoder row of sae/first#{index} is zero" in page.note
        with pytest.raises(BadInput, match="without a length"):
            search(engine, like=f"sae/first#{index}", mode="decoder")
    finally:
        engine.stop()


def test_features_that_are_written_while_their_sae_is_deleted_do_not_come_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held where it has looked at the records and not written yet."""
    upsert, here, go = engine.index.upsert, threading.Event(), threading.Event()

    def late(*arguments: Any, **keywords: Any) -> int:
        here.set()
        assert go.wait(20)
        return upsert(*arguments, **keywords)

    monkeypatch.setattr(engine.index, "upsert", late)
    extraction = engine.store.get(SAERecord, "other").extraction
    for slug, delete in (("other", DeleteExtraction(extraction=extraction)), ("first", DeleteSAE(sae="first"))):
        here.clear()
        go.clear()
        index = next(iter(Knowledge.of(engine, slug).alive()))
        writing = threading.Thread(target=engine.call, args=(SetLabel(feature=f"sae/{slug}#{index}", label="late"),))
        writing.start()
        assert here.wait(20)
        deleting = threading.Thread(target=engine.call, args=(delete,))
        deleting.start()
        deleting.join(0.5)
        go.set()
        writing.join(20)
        deleting.join(20)
        assert engine.index.count(Where(sae=slug)) == 0
