"""The search index: what it finds, why, and that it can be lost without loss."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mistudio_engine.api.errors import BadInput, EmptyData, WrongShape
from mistudio_engine.runtime.index import FeatureHits, FeatureIndex, FeatureRow, OtherEmbedder, Where
from mistudio_engine.runtime.ranking import Scores, likeness, listed
from mistudio_engine.runtime.ranking import given as by_numbers
from mistudio_engine.runtime.snapshot import Snapshot

DIMENSION = 8

CONCEPTS = {
    "city": ("Paris, London and other cities", "Place > City", "Paris London", "she moved to Paris in May"),
    "animal": ("running animals", "Nature > Animal", "dog horse", "the dog runs after the ball"),
    "love": ("love", "Emotion > Positive > Love", "love heart", "my heart is yours"),
    "emotional": ("emotional speech", "Emotional", "cried sobbed", "he cried aloud"),
    "unequal": ("the operator != in code", "Code", "!= ==", "if a != b: return"),
    "tokyo": ("東京タワー", "Place > City", "東京", "東京タワーに行く"),
    "quote": ("it's 'quoted' \\ 100% _odd_", "", "' \"", "don't say ';--"),
}


def direction(concept: str, away: float = 0.0) -> np.ndarray:
    """A unit vector of its own for each concept, turned away from it by some angle in radians."""
    at = list(CONCEPTS).index(concept)
    vector = np.zeros(DIMENSION, np.float32)
    vector[at], vector[DIMENSION - 1] = np.cos(away), np.sin(away)
    return vector


def feature(concept: str, index: int, sae: str = "a", **changes: object) -> FeatureRow:
    label, category, text, example_text = CONCEPTS[concept]
    row = FeatureRow(
        id=f"{sae}#{index}",
        sae=sae,
        index=index,
        extraction="one",
        label=label,
        category=category,
        author="job:labels",
        confidence=None,
        text=text,
        example_text=example_text,
        frequency=0.01 * (index + 1),
        max_activation=float(index),
        dense=index % 5 == 4,
        label_vector=direction(concept, 0.2),
        example_vector=direction(concept),
    )
    row.update(changes)  # type: ignore[typeddict-item]
    return row


class Records:
    """The truth that an index is a copy of."""

    def __init__(self, rows: list[FeatureRow]) -> None:
        self.rows = {row["id"]: row for row in rows}
        self.n_read = 0

    def put(self, *rows: FeatureRow) -> list[FeatureRow]:
        self.rows |= {row["id"]: row for row in rows}
        return list(rows)

    def __call__(self) -> Iterator[FeatureRow]:
        self.n_read += 1
        yield from self.rows.values()


@pytest.fixture
def records() -> Records:
    return Records([feature(concept, at) for at, concept in enumerate(CONCEPTS)])


@pytest.fixture
def index(tmp_path: Path, records: Records) -> Iterator[FeatureIndex]:
    index = FeatureIndex(tmp_path / "index", records, embedder="test/eight", dimension=DIMENSION)
    yield index
    index.close()


def reopened(index: FeatureIndex) -> FeatureIndex:
    return FeatureIndex(index.folder, index._rows, embedder=index.embedder, dimension=index.dimension)


def labels(hits: FeatureHits) -> list[str]:
    return [hit.label for hit in hits.rows]


SCORES = {"a": Scores(np.array([2, 0, 5]), np.array([0.5, 1.0, 0.25]), lambda at: f"number {at}")}


def _place(snapshot: Snapshot, index: int) -> int:
    return int(snapshot.places_of("a", np.array([index]))[0])


def answers(index: FeatureIndex) -> list[FeatureHits]:
    """What the index says in every mode, without the cursor, which names the version."""
    vector = direction("love", 0.4)
    found = [
        index.search("heart !=", limit=50),
        index.search(mode="meaning", vector=vector, limit=50),
        index.search("the", mode="hybrid", vector=vector, where=Where(dense=False, max_frequency=0.5), limit=50),
        index.search("東京", where=Where(category="place", sae="a"), limit=50),
        index.rank(listed, mode="list", asked="", where=Where(dead=False), limit=50),
        index.rank(lambda snapshot: likeness(snapshot, _place(snapshot, 2)), mode="similar", asked="2", limit=50),
        index.rank(lambda snapshot: by_numbers(snapshot, SCORES), mode="promotes", asked="x", limit=50),
    ]
    return [hits.model_copy(update={"next_cursor": None}) for hits in found]


class TestWords:
    def test_a_word_of_the_label_counts_most_and_the_answer_says_where_it_stands(self, index: FeatureIndex) -> None:
        hits = index.search("Paris")
        assert labels(hits) == [CONCEPTS["city"][0]]
        assert hits.rows[0].score == 1.0
        assert hits.rows[0].why == "label has “Paris”; top tokens have “Paris”; examples have “Paris”"
        assert index.search("moved").rows[0].score == 0.2
        assert index.search("code").rows[0].why.startswith("label has “code”; category has “code”")

    def test_a_query_that_a_feature_carries_in_part_scores_in_part(self, index: FeatureIndex) -> None:
        (hit,) = index.search("love airplanes").rows
        assert 0 < hit.score < 0.5, "the word nobody has is the rarer one"
        assert hit.why.startswith("label has “love”")

    def test_words_are_found_in_any_case_form_and_accent(self, index: FeatureIndex) -> None:
        assert labels(index.search("CITY")) == labels(index.search("Cities"))
        assert labels(index.search("animal run"))[0] == "running animals"

    def test_common_words_are_features_too(self, index: FeatureIndex) -> None:
        assert {hit.label for hit in index.search("the").rows} == {"running animals", CONCEPTS["unequal"][0]}

    @pytest.mark.parametrize("query", ["!=", "東京タ", "unning", "100%", "_odd_", "\\", "';--"])
    def test_what_full_text_drops_is_found_as_it_stands(self, index: FeatureIndex, query: str) -> None:
        expected = {row["label"] for row in index._rows() if any(query in str(value) for value in row.values())}
        assert expected
        assert {hit.label for hit in index.search(query).rows} == expected

    def test_an_empty_query_is_refused(self, index: FeatureIndex) -> None:
        with pytest.raises(EmptyData):
            index.search("  ")

    def test_a_word_that_nobody_has_finds_nothing(self, index: FeatureIndex) -> None:
        hits = index.search("zeppelin")
        assert (hits.rows, hits.total, hits.next_cursor) == ([], 0, None)


class TestMeaning:
    def test_label_and_examples_count_together_and_the_answer_says_how_close_each_is(self, index: FeatureIndex) -> None:
        hits = index.search(mode="meaning", vector=direction("animal"))
        assert hits.rows[0].label == "running animals"
        assert hits.rows[0].score == pytest.approx(0.65 * np.cos(0.2) + 0.35, abs=1e-3)
        assert hits.rows[0].why == "close in meaning (cosine: label 0.98, top tokens 1.00)"
        assert hits.embedder == "test/eight"

    def test_a_feature_that_has_only_one_of_both_is_measured_by_that_one(
        self, index: FeatureIndex, records: Records
    ) -> None:
        index.upsert(records.put(feature("love", 90, label_vector=None), feature("love", 91, example_vector=None)))
        hits = {hit.id: hit.score for hit in index.search(mode="meaning", vector=direction("love"), limit=100).rows}
        assert hits["a#90"] == pytest.approx(1.0, abs=1e-3)
        assert hits["a#91"] == pytest.approx(np.cos(0.2), abs=1e-3)

    def test_a_cosine_is_near_the_exact_one_and_the_same_wherever_the_row_stands(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        vectors = rng.standard_normal((300, 384)).astype(np.float32)
        query = rng.standard_normal(384).astype(np.float32)
        rows = [feature("love", at, label_vector=None, example_vector=vectors[at]) for at in range(300)]
        found = []
        for order in (rows, rows[::-1]):
            index = FeatureIndex(tmp_path / str(len(found)), lambda o=order: iter(o), embedder="x", dimension=384)
            hits = index.search(mode="meaning", vector=query, limit=300).rows
            found.append([(hit.index, hit.score) for hit in hits])
            index.close()
        exact = vectors.astype(float) @ query / np.linalg.norm(vectors.astype(float), axis=1) / np.linalg.norm(query)
        assert found[0] == found[1]
        assert [score for _, score in found[0]] == pytest.approx([max(0.0, exact[at]) for at, _ in found[0]], abs=2e-3)

    def test_the_length_of_a_vector_does_not_matter(self, index: FeatureIndex) -> None:
        short = index.search(mode="meaning", vector=direction("love"))
        assert index.search(mode="meaning", vector=direction("love") * 1e-20) == short

    def test_a_feature_without_vectors_is_not_found_by_meaning(self, index: FeatureIndex, records: Records) -> None:
        index.upsert(records.put(feature("love", 90, label_vector=None, example_vector=np.zeros(DIMENSION))))
        index.upsert(records.put(feature("love", 91, label_vector=None, example_vector=direction("love").tobytes())))
        hits = index.search(mode="meaning", vector=direction("love"), limit=100)
        assert {hit.id for hit in hits.rows} == set(records.rows) - {"a#90"}
        assert hits.total == len(records.rows) - 1

    def test_scores_stay_between_0_and_1_where_the_cosine_is_negative(self, index: FeatureIndex) -> None:
        hits = index.search(mode="meaning", vector=-direction("love"), limit=100)
        assert all(0 <= hit.score <= 1 for hit in hits.rows)

    def test_a_vector_of_another_embedder_is_refused(self, index: FeatureIndex, records: Records) -> None:
        with pytest.raises(WrongShape, match=r"\(3,\)"):
            index.search(mode="meaning", vector=[1, 0, 0])
        with pytest.raises(WrongShape, match="label_vector of a#0"):
            index.upsert([feature("city", 0, label_vector=[1.0, 0.0])])
        with pytest.raises(EmptyData):
            index.search(mode="meaning")
        assert labels(index.search("Paris")) == [CONCEPTS["city"][0]]

    def test_an_index_of_words_says_that_it_has_no_meaning(self, tmp_path: Path, records: Records) -> None:
        index = FeatureIndex(tmp_path / "words", records)
        assert index.search("Paris").embedder is None
        with pytest.raises(EmptyData, match="words only"):
            index.search("Paris", mode="hybrid", vector=direction("city"))

    def test_many_equally_near_features_are_all_found_in_one_order(self, tmp_path: Path) -> None:
        twins = Records([feature("love" if at % 2 else "city", at) for at in range(9000)])
        index = FeatureIndex(tmp_path / "index", twins, embedder="test/eight", dimension=DIMENSION)
        first = index.search(mode="meaning", vector=direction("love"), limit=30)
        assert [hit.index for hit in first.rows] == list(range(1, 61, 2))
        assert first.total == 9000


class TestHybrid:
    def test_meaning_and_words_are_weighed_and_a_row_without_the_words_counts_less(self, index: FeatureIndex) -> None:
        both = index.search("love", mode="hybrid", vector=direction("love"))
        assert both.rows[0].label == "love"
        assert both.rows[0].score == pytest.approx(
            (0.7 * 0.987 + 0.3) * 0.975, abs=2e-3
        )  # half believed, as nobody asked
        assert "label has “love”" in both.rows[0].why
        assert "close in meaning" in both.rows[0].why
        only_meaning = index.search("zeppelin", mode="hybrid", vector=direction("love"))
        assert only_meaning.rows[0].label == "love"
        assert only_meaning.rows[0].score == pytest.approx(0.7 * 0.987 * 0.975, abs=2e-3)

    def test_a_word_that_all_examples_hold_does_not_outrank_a_label_that_means_it(self, tmp_path: Path) -> None:
        """Windows of text hold every common word; ranks that forget distances put those features first."""
        rows = [feature("emotional", at, example_text="they and the love of the game") for at in range(40)]
        rows.append(feature("love", 99, label="affection", category="", text="dear", example_text="", author="person"))
        index = FeatureIndex(tmp_path / "index", lambda: iter(rows), embedder="test/eight", dimension=DIMENSION)
        hits = index.search("the love", mode="hybrid", vector=direction("love"))
        assert hits.rows[0].label == "affection"
        index.close()

    def test_of_two_alike_the_label_that_was_found_to_hold_comes_first(
        self, index: FeatureIndex, records: Records
    ) -> None:
        index.upsert(records.put(feature("love", 90, confidence=0.55), feature("love", 91, confidence=0.95)))
        hits = index.search("love", mode="hybrid", vector=direction("love"), where=Where(min_confidence=0.5))
        assert [hit.index for hit in hits.rows] == [91, 90]


class TestFilters:
    def test_a_category_has_its_subcategories_in_it_and_not_its_namesakes(self, index: FeatureIndex) -> None:
        vector = direction("love")

        def found(category: str) -> set[str]:
            hits = index.search(mode="meaning", vector=vector, where=Where(category=category), limit=50)
            assert hits.total == len(hits.rows)
            return {hit.label for hit in hits.rows}

        assert found("emotion") == found("Emotion>Positive") == {"love"}
        assert found("Emotional") == {"emotional speech"}
        assert found("Place > City") == {CONCEPTS["city"][0], CONCEPTS["tokyo"][0]}
        assert found("%") == set()

    def test_statistics_and_saes_restrict_every_mode(self, index: FeatureIndex, records: Records) -> None:
        index.upsert(records.put(feature("love", 1, sae="b"), feature("love", 2, sae="b", label="", frequency=0.9)))
        index.upsert(records.put(feature("love", 3, sae="c", author="person", confidence=0.9, id="b#3")))
        index.upsert(
            records.put(feature("love", 4, sae="c", author="agent:ann", confidence=0.5, id="b#4", dense=False))
        )
        index.upsert(records.put(feature("love", 5, sae="c", frequency=0.0, id="b#5")))
        vector = direction("love")
        for where, expected in [
            (Where(sae="b"), {"b#1", "b#2"}),
            (Where(sae="b", labelled=False), {"b#2"}),
            (Where(sae="b", labelled=True), {"b#1"}),
            (Where(min_frequency=0.5), {"b#2"}),
            (Where(sae="a", max_frequency=0.03), {"a#2"}),
            (Where(sae="a", min_activation=2.0), {"a#2"}),
            (Where(dense=True), set()),
            (Where(sae="b", max_activation=1.0), {"b#1"}),
            (Where(sae="b", label="LOV"), {"b#1"}),
            (Where(author="person"), {"b#3"}),
            (Where(author="agent"), {"b#4"}),
            (Where(min_confidence=0.8), {"b#3"}),
            (Where(dead=True), {"b#5"}),
        ]:
            assert {hit.id for hit in index.search("heart", where=where).rows} == expected
            by_meaning = index.search(mode="meaning", vector=vector, where=where, limit=50)
            assert all(hit.sae == (where.sae or hit.sae) for hit in by_meaning.rows)
            assert expected <= {hit.id for hit in by_meaning.rows}
            both = index.search("heart", mode="hybrid", vector=vector, where=where, limit=50)
            assert {hit.id for hit in both.rows} == {hit.id for hit in by_meaning.rows}
        assert index.count() == len(records.rows)
        assert index.count(Where(sae="b")) == 2

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(text=st.text(max_size=30), odd=st.sampled_from(["'", '"', "\\", "%", ";--", "\0", "\ud800", " OR 1=1", "("]))
    def test_no_text_breaks_a_query_or_a_filter(self, index: FeatureIndex, text: str, odd: str) -> None:
        before = index._marker["generation"] if index._marker else None
        for query in (text, text + odd, odd + text):
            where = Where(sae=query, category=query)
            assert index.count(where) == 0
            if query.strip():
                assert index.search(query, where=where).rows == []
                index.search(query)
            index.delete_sae(query)
        assert before is None or index._marker["generation"] == before, "it was taken for damage"

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(sae=st.text(min_size=1, max_size=20), label=st.text(max_size=40))
    def test_any_name_and_any_label_can_be_stored_and_filtered(
        self, index: FeatureIndex, records: Records, sae: str, label: str
    ) -> None:
        n_before = index.count(Where(sae=sae))
        index.upsert(records.put(feature("love", 1000 + n_before, sae=sae, label=label)))
        hits = index.search("heart", where=Where(sae=sae))
        assert label in {hit.label for hit in hits.rows}


class TestWriting:
    def test_a_feature_that_is_written_again_is_replaced(self, index: FeatureIndex, records: Records) -> None:
        assert index.upsert(records.put(feature("city", 0, label="capitals"), feature("city", 0, label="towns"))) == 1
        assert labels(index.search("towns")) == ["towns"]
        assert index.search("capitals").rows == []
        assert index.count() == len(CONCEPTS)

    def test_deleting_an_sae_leaves_the_others(self, index: FeatureIndex, records: Records) -> None:
        index.upsert(records.put(*(feature("love", at, sae="b") for at in range(3))))
        index.delete_sae("b")
        index.delete_sae("b")  # twice does no harm
        assert index.count() == len(CONCEPTS)

    def test_small_writes_are_merged_into_the_indices_after_a_while(
        self, index: FeatureIndex, records: Records
    ) -> None:
        for at in range(60):
            index.upsert(records.put(feature("love", 100 + at, label=f"edit {at}")))
        fragments = index._open().stats()["fragment_stats"]["num_fragments"]
        assert fragments < 20
        assert index.search("edit", limit=100).total == 60


class TestPages:
    def test_pages_are_a_union_without_duplicates_in_every_mode(self, index: FeatureIndex, records: Records) -> None:
        index.upsert(records.put(*(feature("love", 100 + at) for at in range(25))))
        for mode in ("text", "meaning", "hybrid"):
            vector = None if mode == "text" else direction("love")
            asked = {"query": "" if mode == "meaning" else "heart", "mode": mode, "vector": vector}
            whole = index.search(**asked, limit=200)
            ids, cursor = [], None
            while True:
                page = index.search(**asked, limit=7, cursor=cursor)
                assert page.total == whole.total
                ids += [hit.id for hit in page.rows]
                cursor = page.next_cursor
                if cursor is None:
                    break
            assert ids == [hit.id for hit in whole.rows]

    def test_writes_between_two_pages_do_not_show_in_the_second(self, index: FeatureIndex, records: Records) -> None:
        index.upsert(records.put(*(feature("love", 100 + at) for at in range(20))))
        whole = [hit.id for hit in index.search("heart", limit=100).rows]
        first = index.search("heart", limit=8)
        index.upsert(records.put(*(feature("love", at, label="heart") for at in range(50, 60))))
        index.delete_sae("nobody")
        index.upsert(records.put(feature("city", 110)))
        index.optimize()
        second = index.search("heart", limit=100, cursor=first.next_cursor)
        assert [hit.id for hit in first.rows + second.rows] == whole
        assert index.search("heart", limit=100).total == len(whole) + 9

    def test_pages_of_every_ranking_stay_as_they_were_while_somebody_writes(
        self, index: FeatureIndex, records: Records
    ) -> None:
        index.upsert(records.put(*(feature("love", 100 + at) for at in range(60))))
        shown = Where(dense=False)
        scores = {"a": Scores(np.arange(100, 160), np.linspace(1, 0.1, 60), lambda at: f"number {at}")}
        ways = {
            "hybrid": lambda **page: index.search(
                "heart", mode="hybrid", vector=direction("love"), where=shown, **page
            ),
            "meaning": lambda **page: index.search(mode="meaning", vector=direction("love"), where=shown, **page),
            "text": lambda **page: index.search("heart", where=shown, **page),
            "list": lambda **page: index.rank(listed, mode="list", asked="", where=shown, **page),
            "token": lambda **page: index.rank(
                lambda snapshot: by_numbers(snapshot, scores), mode="token", asked="x", where=shown, **page
            ),
        }
        whole = {way: [hit.model_dump() for hit in ask(limit=500).rows] for way, ask in ways.items()}
        first = {way: ask(limit=10) for way, ask in ways.items()}
        stop = threading.Event()

        def write() -> None:
            at = 0
            while not stop.is_set():
                at += 1
                index.upsert(records.put(feature("love", 100 + at % 60, label=f"heart {at}", dense=at % 2 == 0)))
                index.upsert(records.put(feature("animal", 500 + at)))

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for way, ask in ways.items():
                rows, cursor = list(first[way].rows), first[way].next_cursor
                while cursor is not None:
                    page = ask(limit=10, cursor=cursor)
                    rows, cursor = rows + page.rows, page.next_cursor
                assert [hit.model_dump() for hit in rows] == whole[way], way
        finally:
            stop.set()
            writer.join()

    def test_a_cursor_of_another_search_or_of_nothing_is_refused(self, index: FeatureIndex) -> None:
        cursor = index.search(mode="meaning", vector=direction("love"), limit=1).next_cursor
        with pytest.raises(BadInput, match="another search"):
            index.search(mode="meaning", vector=direction("city"), cursor=cursor)
        with pytest.raises(BadInput, match="another search"):
            index.search("love", cursor=cursor)
        for nonsense in ("", "x", "bnVsbA", "🦀", "WzEsMl0"):
            if nonsense:
                with pytest.raises(BadInput, match="is not a cursor"):
                    index.search("love", cursor=nonsense)

    def test_a_cursor_from_before_a_rebuild_says_that_its_version_is_gone(self, index: FeatureIndex) -> None:
        cursor = index.search(mode="meaning", vector=direction("love"), limit=1).next_cursor
        index.rebuild()
        with pytest.raises(BadInput, match="is gone"):
            index.search(mode="meaning", vector=direction("love"), limit=1, cursor=cursor)

    def test_searches_go_on_while_others_write_and_rebuild(self, index: FeatureIndex, records: Records) -> None:
        expected = labels(index.search("Paris"))
        done = threading.Event()

        def write() -> None:
            for at in range(6):
                index.upsert(records.put(feature("animal", 200 + at)))
                index.rebuild()
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        n_searches = 0
        while not done.is_set():
            assert labels(index.search("Paris")) == expected
            n_searches += 1
        writer.join()
        assert n_searches > 0

    def test_whoever_writes_does_not_wait_for_a_rebuild_and_nothing_is_lost(self, tmp_path: Path) -> None:
        """The rows may be made by the very thread that writes: the compute thread embeds, and indexes an extraction."""
        reading, go_on = threading.Event(), threading.Event()

        def rows() -> Iterator[FeatureRow]:
            yield feature("city", 0)
            yield feature("animal", 1, sae="gone")
            reading.set()
            assert go_on.wait(60)
            yield feature("quote", 2)

        index = FeatureIndex(tmp_path / "index", rows, embedder="test/eight", dimension=DIMENSION)
        searcher = threading.Thread(target=index.search, args=("love",))
        searcher.start()
        assert reading.wait(60)
        index.upsert([feature("love", 3)])  # would wait for ever if it waited
        index.delete_sae("gone")
        go_on.set()
        searcher.join()
        assert {hit.id for hit in index.search(mode="meaning", vector=direction("love")).rows} == {"a#0", "a#2", "a#3"}
        index.close()


class TestLoss:
    def test_a_deleted_folder_is_rebuilt_with_the_same_answers(self, index: FeatureIndex, records: Records) -> None:
        index.upsert(records.put(*(feature("love", 100 + at, label=f"love {at}") for at in range(30))))
        index.upsert(records.put(feature("love", 100, label="hate")))
        before = answers(index)
        shutil.rmtree(index.folder)  # under a running engine
        assert answers(index) == before
        assert labels(index.search("aloud")) == [CONCEPTS["emotional"][0]], "a word that was not looked up before"
        assert answers(index) == before
        index.close()
        shutil.rmtree(index.folder, ignore_errors=True)  # between two runs
        again = reopened(index)
        assert answers(again) == before
        again.close()

    def test_any_file_cut_off_or_missing_is_noticed_and_the_answers_are_the_same(
        self, index: FeatureIndex, records: Records, tmp_path: Path
    ) -> None:
        index.upsert(records.put(feature("love", 100, label="late love"), feature("city", 3)))
        before = answers(index)
        index.close()
        sound = tmp_path / "sound"
        shutil.copytree(index.folder, sound)
        files = [
            path.relative_to(sound) for path in sorted(sound.rglob("*")) if path.is_file() and path.suffix != ".txn"
        ]
        assert len(files) > 20
        for at, file in enumerate(files):
            shutil.rmtree(index.folder)
            shutil.copytree(sound, index.folder)
            path = index.folder / file
            if at % 2:
                path.unlink()
            else:
                os.truncate(path, path.stat().st_size // 2)
            again = reopened(index)
            assert answers(again) == before, file
            again.close()

    def test_an_index_that_is_whole_is_opened_and_not_rebuilt(self, index: FeatureIndex, records: Records) -> None:
        before = answers(index)
        index.close()
        n_read = records.n_read
        again = reopened(index)
        assert answers(again) == before
        again.close()
        assert records.n_read == n_read

    def test_an_index_that_was_not_closed_may_lack_something_and_is_rebuilt(
        self, index: FeatureIndex, records: Records
    ) -> None:
        index.search("love")
        records.put(feature("love", 100, label="written to the records, then the engine was killed"))
        again = reopened(index)
        assert again.search("killed").total == 1
        again.close()

    def test_an_index_that_is_closed_while_it_is_made_anew_is_not_taken_for_whole(
        self, index: FeatureIndex, records: Records
    ) -> None:
        index.upsert([feature("love", 0, label_vector=None)])
        index.lacks_vectors = True
        reading, go_on = threading.Event(), threading.Event()

        def rows() -> Iterator[FeatureRow]:
            reading.set()
            assert go_on.wait(60)
            yield from ()

        index._rows = rows
        rebuild = threading.Thread(target=index.rebuild)
        rebuild.start()
        assert reading.wait(60)
        index.upsert(records.put(feature("love", 100, label="written meanwhile")))
        index.close()
        again = FeatureIndex(index.folder, records, embedder="test/eight", dimension=DIMENSION)
        assert again.search("meanwhile").total == 1
        again.close()
        go_on.set()
        rebuild.join()

    def test_an_index_that_is_closed_before_owed_rows_were_written_is_made_anew(
        self, index: FeatureIndex, records: Records
    ) -> None:
        index.search("love")
        with index.owing():
            records.put(feature("love", 100, label="too late"))
            index.close()
        again = reopened(index)
        assert again.search("late").total == 1
        again.close()

    def test_an_index_for_which_owed_rows_could_not_be_made_is_made_anew(
        self, index: FeatureIndex, records: Records
    ) -> None:
        index.search("love")
        with pytest.raises(EmptyData), index.owing():
            records.put(feature("love", 100, label="never written"))
            raise EmptyData("No vectors.")
        index.close()
        again = reopened(index)
        assert again.search("never").total == 1
        again.close()

    def test_after_owed_rows_were_written_nothing_is_made_anew(self, index: FeatureIndex, records: Records) -> None:
        with index.owing():
            index.upsert(records.put(feature("love", 100)))
        index.close()
        n_read = records.n_read
        again = reopened(index)
        again.search("love")
        again.close()
        assert records.n_read == n_read

    def test_another_embedder_makes_another_index(self, index: FeatureIndex, records: Records) -> None:
        index.search("love")
        index.close()
        for row in records.rows.values():
            row["label_vector"] = row["example_vector"] = np.ones(3)
        other = FeatureIndex(index.folder, records, embedder="test/three", dimension=3)
        assert other.search(mode="meaning", vector=np.ones(3)).embedder == "test/three"
        other.close()
        assert len(list(index.folder.glob("*.lance"))) == 1


class TestSwitch:
    def test_while_the_index_is_made_for_another_embedder_words_are_found_and_writes_are_kept(
        self, index: FeatureIndex, records: Records
    ) -> None:
        assert index.search("Paris").total == 1
        reading, go_on = threading.Event(), threading.Event()

        def rows() -> Iterator[FeatureRow]:
            reading.set()
            assert go_on.wait(60)
            for row in list(records.rows.values()):
                yield row | {"label_vector": np.ones(3), "example_vector": None}  # type: ignore[misc]

        index._rows = rows
        switch = threading.Thread(target=index.switch, args=("test/three", 3))
        switch.start()
        assert reading.wait(60)
        assert (index.embedder, index.target) == ("test/eight", ("test/three", 3))
        assert index.search("Paris").total == 1
        with pytest.raises(OtherEmbedder):
            index.upsert([feature("love", 200)], embedder="test/eight")
        late = feature("love", 201, label_vector=[1.0, 1.0, 1.0], example_vector=None)
        index.upsert([late], embedder="test/three")
        go_on.set()
        switch.join()
        hits = index.search(mode="meaning", vector=[1, 1, 1], limit=50)
        assert hits.embedder == "test/three"
        assert hits.total == len(records.rows) + 1
        assert [hit.index for hit in index.search("love", where=Where(sae="a")).rows] == [2, 201]

    def test_a_switch_that_fails_leaves_the_index_as_it_was(self, index: FeatureIndex, records: Records) -> None:
        before = answers(index)
        index._rows = lambda: iter([feature("love", 7)])  # of eight numbers
        with pytest.raises(WrongShape):
            index.switch("test/three", 3)
        assert answers(index) == before
        assert index.target == ("test/eight", DIMENSION)
        assert len(list(index.folder.glob("*.lance"))) == 1

    def test_a_rebuild_that_fails_loses_neither_what_was_written_meanwhile_nor_that_vectors_lack(
        self, index: FeatureIndex, records: Records
    ) -> None:
        index.search("love")
        index.lacks_vectors = True

        def rows() -> Iterator[FeatureRow]:
            index.upsert(records.put(feature("love", 100, label="written meanwhile")))
            raise EmptyData("The server does not answer.")
            yield

        index._rows = rows
        with pytest.raises(EmptyData):
            index.rebuild()
        assert index.lacks_vectors
        index.close()
        again = FeatureIndex(index.folder, records, embedder="test/eight", dimension=DIMENSION)
        assert again.search("meanwhile").total == 1
        again.close()

    def test_the_folder_says_what_it_was_made_with(self, index: FeatureIndex, tmp_path: Path) -> None:
        index.search("love")
        assert FeatureIndex.stored(index.folder) == ("test/eight", DIMENSION)
        assert FeatureIndex.stored(tmp_path / "nowhere") == (None, None)


class TestSnapshot:
    def test_after_any_writes_it_is_what_a_fresh_reader_sees(self, index: FeatureIndex, records: Records) -> None:
        rng = np.random.default_rng(0)
        for turn in range(12):
            some = [feature("love", int(at), label=f"turn {turn}") for at in rng.integers(0, 40, 5)]
            for row in some:
                row["label_vector"] = rng.standard_normal(DIMENSION).astype(np.float32) if turn % 3 else None
            index.upsert(records.put(*some))
            if turn == 5:
                index.optimize()
            if turn == 8:
                index.delete_sae("a", but="one")
            kept = answers(index)
            index._snapshots.clear()
            assert answers(index) == kept, turn

    def test_deleting_keeps_the_features_of_the_extraction_that_is_named(
        self, index: FeatureIndex, records: Records
    ) -> None:
        index.upsert(records.put(feature("love", 200, extraction="two"), feature("love", 201, extraction="two")))
        index.delete_sae("a", but="two")
        assert {hit.index for hit in index.search("heart").rows} == {200, 201}

    def test_what_is_hidden_is_counted_once_each(self, index: FeatureIndex, records: Records) -> None:
        index.upsert(
            records.put(
                feature("love", 100, dense=True),
                feature("love", 101, dense=True, frequency=0.0),
                feature("love", 102, dense=False, confidence=0.4),
                feature("love", 103, dense=False, confidence=0.9),
            )
        )
        hits = index.search("heart", where=Where(dense=False, dead=False, min_confidence=0.6))
        assert [hit.index for hit in hits.rows] == [103]
        assert hits.hidden == {"dead": 1, "dense": 1, "badly_scored": 2}
        assert index.search("zeppelin", where=Where(dense=False)).hidden == {}

    def test_hidden_dense_features_among_the_best_matches_are_named(
        self, index: FeatureIndex, records: Records
    ) -> None:
        index.upsert(records.put(*(feature("love", 100 + at, dense=True, label="love" * (1 + at)) for at in range(5))))
        index.upsert(records.put(feature("love", 2, label_vector=direction("love", 0.9), dense=False)))
        shown = Where(dense=False)
        page = index.search(mode="meaning", vector=direction("love"), where=shown, limit=3)
        assert page.rows[0].index == 2
        assert [hit.index for hit in page.dense_best] == [100, 101, 102]
        assert page.dense_best[0].score > page.rows[0].score
        assert not index.search(mode="meaning", vector=direction("love"), limit=3).dense_best
        following = index.search(mode="meaning", vector=direction("love"), where=shown, cursor=page.next_cursor)
        assert not following.dense_best
        second = [feature("love", at, label_vector=direction("love")) for at in (5, 6)]
        index.upsert(records.put(*second, feature("love", 100, label_vector=direction("love", 0.1), dense=True)))
        page = index.search(mode="meaning", vector=direction("love"), where=shown, limit=2)
        assert [hit.index for hit in page.rows] == [5, 6]
        assert [hit.index for hit in page.dense_best] == [100], "the third best"
        assert not index.search("Paris", where=shown).dense_best
        assert not index.rank(listed, mode="list", asked="", where=shown).dense_best
