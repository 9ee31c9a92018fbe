"""Documents come out of every format whole and in order, whatever bytes are in them, and their statistics are right."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistudio_engine.api.errors import BadInput, CorruptFile, EmptyData, NotFound, Unsupported
from mistudio_engine.models import readers
from mistudio_engine.models.datasets import (
    find_text_field,
    hashing,
    n_documents,
    read_documents,
    sample,
    stamp,
    statistics,
)
from mistudio_engine.models.tokens import load_tokens, pack

STORIES = ["One day.", "Second\nstory, with a line.", "Dritte Geschichte: äöü 世界 🙂"]


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, delimiter: str) -> Path:
    quoted = (text.replace('"', '""') for text in STORIES)
    path.write_text(f"id{delimiter}text\n" + "".join(f'{i}{delimiter}"{t}"\n' for i, t in enumerate(quoted)), "utf-8")
    return path


def write_compressed(path: Path, codec: str) -> Path:
    """In two streams one after the other, as tools that compress in parallel write them."""
    lines = [(json.dumps({"text": text}) + "\n").encode() for text in STORIES]
    path.write_bytes(b"".join(compressed(part, codec) for part in (lines[0], b"".join(lines[1:]))))
    return path


def compressed(data: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def write_parquet(path: Path, columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def write_saved(path: Path, splits) -> Path:
    from datasets import Dataset, DatasetDict
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    sets = {name: Dataset.from_dict(columns) for name, columns in splits.items()}
    (DatasetDict(sets) if len(sets) > 1 else next(iter(sets.values()))).save_to_disk(str(path))
    enable_progress_bar()
    return path


def write_hub(path: Path) -> Path:
    (path / "data").mkdir(parents=True)
    write_parquet(path / "data" / "train-00000-of-00002.parquet", {"id": [1], "text": STORIES[:1]})
    write_parquet(path / "data" / "train-00001-of-00002.parquet", {"id": [2, 3], "text": STORIES[1:]})
    write_parquet(path / "data" / "test-00000-of-00001.parquet", {"id": [4], "text": ["held out"]})
    return path


FORMATS = {
    "txt": lambda d: (d / "a.txt", (d / "a.txt").write_text("<|endoftext|>".join(STORIES), "utf-8"))[0],
    "jsonl": lambda d: write_jsonl(d / "a.jsonl", [{"id": i, "text": t} for i, t in enumerate(STORIES)]),
    "jsonl of strings": lambda d: write_jsonl(d / "a.jsonl", STORIES),
    "jsonl called json": lambda d: write_jsonl(d / "a.json", [{"text": t} for t in STORIES]),
    "jsonl.gz": lambda d: write_compressed(d / "a.jsonl.gz", "gzip"),
    "jsonl.zst": lambda d: write_compressed(d / "a.jsonl.zst", "zstd"),
    "jsonl.bz2": lambda d: write_compressed(d / "a.jsonl.bz2", "bz2"),
    "json list": lambda d: (d / "a.json", (d / "a.json").write_text(json.dumps([{"text": t} for t in STORIES])))[0],
    "json data": lambda d: (
        d / "a.json",
        (d / "a.json").write_text(json.dumps({"v": "1", "data": [{"text": t} for t in STORIES]})),
    )[0],
    "csv": lambda d: write_csv(d / "a.csv", ","),
    "tsv": lambda d: write_csv(d / "a.tsv", "\t"),
    "parquet": lambda d: write_parquet(d / "a.parquet", {"id": [0, 1, 2], "text": STORIES}),
    "saved": lambda d: write_saved(d / "a", {"train": {"text": STORIES, "id": [0, 1, 2]}}),
    "saved splits": lambda d: write_saved(d / "a", {"test": {"text": ["no"]}, "train": {"text": STORIES}}),
    "hub folder": lambda d: write_hub(d / "a"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_documents_in_order(tmp_path, form):
    source = FORMATS[form](tmp_path)
    documents = read_documents(source)
    assert list(documents) == STORIES
    assert (documents.n_documents, documents.n_repaired, documents.n_empty) == (3, 0, 0)
    assert n_documents(source) == 3
    assert find_text_field(source) == "text"


def test_a_split_is_train_unless_chosen_and_an_unknown_one_names_those_there_are(tmp_path):
    for source in (
        write_hub(tmp_path / "hub"),
        write_saved(tmp_path / "s", {"train": {"a": ["x"]}, "test": {"a": ["y"]}}),
    ):
        assert len(list(read_documents(source, split="test"))) == 1
        with pytest.raises(BadInput, match=r"no split 'dev'.*train, test"):
            read_documents(source, split="dev")


def test_a_plain_text_is_cut_into_pages_of_whole_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * 60 for i in range(40)]
    source = tmp_path / "book.txt"
    source.write_text("\n\n\n".join(paragraphs))
    pages = list(read_documents(source))
    assert len(pages) > 3
    assert all(readers.DOCUMENT_CHARACTERS <= len(page) < readers.DOCUMENT_CHARACTERS + 500 for page in pages[:-1])
    assert [p for page in pages for p in page.split("\n") if p] == [p.strip("\n") for p in paragraphs]


@given(text=st.text(alphabet="ab \n\r\0é�<|", max_size=200), seed=st.integers(1, 50))
def test_a_plain_text_loses_nothing_but_white_space(tmp_path_factory, text, seed):
    source = tmp_path_factory.mktemp("text") / "a.txt"
    source.write_bytes((text * seed * 10).encode())
    try:
        read = "".join(read_documents(source))
    except EmptyData:
        read = ""
    assert "".join(read.split()) == "".join((text * seed * 10).split())


def test_a_text_without_any_line_end_is_cut_at_spaces(tmp_path):
    source = tmp_path / "text8.txt"
    source.write_text("word " * 20_000)
    pages = list(read_documents(source))
    assert max(map(len, pages)) <= readers.MOST_CHARACTERS
    assert "".join(pages).strip() == ("word " * 20_000).strip()


def test_bytes_that_are_no_utf8_are_replaced_and_counted_in_every_format(tmp_path):
    bad = b"caf\xe9 \xff!"
    (tmp_path / "a.txt").write_bytes(b"good\n<|endoftext|>" + bad)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "' + bad + b'"}\n')
    (tmp_path / "a.csv").write_bytes(b"text\ngood\n" + bad + b"\n")
    write_parquet(tmp_path / "a.parquet", {"text": pa.array([b"good", bad], pa.binary())})
    unchecked = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", bad], pa.binary()).buffers())
    write_parquet(tmp_path / "b.parquet", {"text": unchecked})
    for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet", "b.parquet"):
        documents = read_documents(tmp_path / name)
        assert list(documents) == ["good", "caf\ufffd \ufffd!"], name
        assert documents.n_repaired == 1, name


def test_lone_surrogates_in_json_are_repaired(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d of a smile"}\n')
    documents = read_documents(tmp_path / "a.jsonl")
    assert list(documents) == ["half \ufffd of a smile"]
    assert documents.n_repaired == 1


def test_nul_marks_and_utf16_are_read(tmp_path):
    (tmp_path / "nul.jsonl").write_text(json.dumps({"text": "a\0b"}) + "\n")
    (tmp_path / "nul.csv").write_bytes(b"text\na\0b\n")
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbftext\nhi\n")
    (tmp_path / "wide.txt").write_bytes("hällo".encode("utf-16"))
    assert list(read_documents(tmp_path / "nul.jsonl")) == ["a\0b"]
    assert list(read_documents(tmp_path / "nul.csv")) == ["a\0b"]
    assert list(read_documents(tmp_path / "bom.csv")) == ["hi"]
    assert list(read_documents(tmp_path / "wide.txt")) == ["hällo"]


def test_rows_without_text_are_passed_over_and_counted(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {"text": " \n"}, {}, {"text": "b"}]
    documents = read_documents(write_jsonl(tmp_path / "a.jsonl", rows))
    assert list(documents) == ["a", "b"]
    assert documents.n_empty == 3


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"id": "x" * 99, "content": "short"}, "content"),
        ({"Text": "t", "content": "longer"}, "Text"),
        ({"title": "t", "essay": "a longer one"}, "essay"),
        ({"n": 3, "words": ["a"], "review": "r"}, "review"),
    ],
)
def test_the_text_column_is_found_by_name_or_by_length(tmp_path, row, field):
    source = write_jsonl(tmp_path / "a.jsonl", [row] * 3)
    assert find_text_field(source) == field
    assert list(read_documents(source)) == [row[field]] * 3


def test_a_chosen_column_is_read_and_an_unknown_one_names_those_there_are(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "t", "title": "other", "n": 1}])
    assert list(read_documents(source, text_field="title")) == ["other"]
    with pytest.raises(BadInput, match=r"no column 'body'.*text, title, n"):
        read_documents(source, text_field="body")
    with pytest.raises(BadInput, match=r"'n'.*holds int values, not text.*text, title"):
        read_documents(source, text_field="n")


def test_data_without_any_text_column_names_its_columns(tmp_path):
    with pytest.raises(BadInput, match=r"no column of text.*n, m"):
        read_documents(write_jsonl(tmp_path / "a.jsonl", [{"n": 1, "m": 2}]))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_text_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EmptyData):
        read_documents(tmp_path / name)


def test_a_folder_without_data_is_an_error(tmp_path):
    with pytest.raises(EmptyData):
        read_documents(tmp_path)


def test_a_source_that_is_not_there_or_in_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(NotFound):
        read_documents(tmp_path / "nowhere.txt")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04")
    with pytest.raises(Unsupported, match=r"a\.pkl.*not in a format"):
        read_documents(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "pattern", ["../secret.txt", "/etc/hostname", "http://127.0.0.1:9/x.txt", "a/../../secret.txt"]
)
def test_a_readme_cannot_lead_out_of_the_dataset(tmp_path, pattern):
    (tmp_path / "secret.txt").write_text("secret")
    source = write_hub(tmp_path / "hub")
    header = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: [{pattern!r}]\n---\n"
    (source / "README.md").write_text(header)
    with pytest.raises(BadInput, match="outside the dataset"):
        read_documents(source)


def test_a_saved_folder_cannot_lead_out_of_itself(tmp_path):
    write_saved(tmp_path / "other", {"train": {"text": ["secret"]}})
    source = write_saved(tmp_path / "s", {"train": {"text": ["mine"]}})
    state = json.loads((source / "state.json").read_text())
    state["_data_files"] = [{"filename": "../other/data-00000-of-00001.arrow"}]
    (source / "state.json").write_text(json.dumps(state))
    with pytest.raises(BadInput, match="outside the dataset"):
        read_documents(source)


def test_a_readme_chooses_the_files_and_a_broken_one_is_named(tmp_path):
    source = write_hub(tmp_path / "hub")
    configs = "configs:\n- config_name: default\n  data_files: data/test-*\n"
    (source / "README.md").write_text(f"---\n{configs}---\n")
    assert list(read_documents(source)) == ["held out"]
    (source / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(CorruptFile, match=r"README\.md"):
        read_documents(source)


def test_a_torn_file_is_refused_where_it_is_torn(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}] * 200)
    source.write_text(source.read_text()[:-8])
    documents = read_documents(source)
    with pytest.raises(CorruptFile, match="Line 200"):
        list(documents)
    assert documents.n_documents == 199
    whole = write_parquet(tmp_path / "a.parquet", {"text": STORIES}).read_bytes()
    for n_bytes in (0, 4, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.parquet").write_bytes(whole[:n_bytes])
        with pytest.raises(CorruptFile, match=r"a\.parquet"):
            read_documents(tmp_path / "a.parquet")


@pytest.mark.parametrize(("suffix", "codec"), [(".gz", "gzip"), (".zst", "zstd"), (".bz2", "bz2")])
def test_a_torn_archive_is_refused_and_never_read_as_a_shorter_one(tmp_path, suffix, codec):
    lines = "".join(json.dumps({"text": f"{n} {hashlib.sha256(bytes(n)).hexdigest()}"}) + "\n" for n in range(2000))
    whole = compressed(lines.encode(), codec)
    source = tmp_path / f"a.jsonl{suffix}"
    source.write_bytes(whole)
    assert len(list(read_documents(source))) == 2000
    for torn in (whole[: len(whole) // 2], whole[:-3], b"no archive at all"):
        source.write_bytes(torn)
        with pytest.raises(CorruptFile, match=f"torn or is no {codec}"):
            list(read_documents(source))


def test_a_sample_has_pages_and_an_end(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(5)])
    first, second, last = (sample(source, offset, 2) for offset in (0, 2, 4))
    assert (first.documents, first.next_offset) == (["0", "1"], 2)
    assert (second.documents, second.next_offset) == (["2", "3"], 4)
    assert (last.documents, last.next_offset) == (["4"], None)
    assert sample(source, 10, 2) == ([], 10, None, "text")
    with pytest.raises(BadInput):
        sample(source, -1, 2)


def hash_of(path):
    """What `hashing` returns at its end, the share that is done growing to 1."""
    steps, shares = hashing(path), [0.0]
    while True:
        try:
            shares.append(next(steps))
        except StopIteration as end:
            assert shares == sorted(shares) and shares[-1] == 1
            return end.value


def test_the_hash_follows_the_content_and_not_the_place(tmp_path):
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.txt").write_text(text)
    assert hash_of(tmp_path / "a") == hash_of(tmp_path / "b") != hash_of(tmp_path / "c")
    assert hash_of(tmp_path / "a" / "t.txt") == hashlib.sha256(b"x").hexdigest() != hash_of(tmp_path / "c" / "t.txt")
    with pytest.raises(NotFound):
        hash_of(tmp_path / "d")


def test_text_that_is_read_through_a_link_to_a_folder_is_hashed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "data").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "linked")  # which leads nowhere new
    (tmp_path / "linked" / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: data/*.jsonl\n---\n")
    hashes = set()
    for text in ("one", "two"):
        write_jsonl(tmp_path / "real" / "a.jsonl", [{"text": text}])
        assert list(read_documents(tmp_path / "linked")) == [text]
        assert sorted(path.name for path, _, _ in stamp(tmp_path / "linked")) == ["README.md", "a.jsonl"]
        hashes.add(hash_of(tmp_path / "linked"))
    assert len(hashes) == 2


def packed(tmp_path, documents, tokenizer, **options):
    list(pack(documents, tokenizer, tmp_path / "t", **options))
    return load_tokens(tmp_path / "t")


def test_statistics_count_tokens_and_document_lengths(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    tokens = packed(tmp_path, ["aaab", "a", "bb", "é"], tokenizer, context_size=6)
    found = statistics(tokens, tokenizer, n_top=3, n_bins=2)
    assert (found["n_tokens"], found["n_documents"], found["n_special_tokens"]) == (15, 4, 6)
    assert found["vocabulary"]["top"][:2] == [
        {"token_id": 97, "token": "a", "count": 4, "share": 4 / 9},
        {"token_id": 98, "token": "b", "count": 3, "share": 3 / 9},
    ]
    assert (found["vocabulary"]["n_distinct"], found["vocabulary"]["d_vocab"]) == (4, 260)
    assert found["vocabulary"]["coverage"] == {"10": 1.0, "100": 1.0, "1000": 1.0}
    assert found["document_lengths"] == {
        "min": 1,
        "mean": 2.25,
        "median": 2.0,
        "max": 4,
        "histogram": {"edges": [1.0, 2.5, 4.0], "counts": [3, 1]},
    }
    assert json.loads(json.dumps(found)) == found


def test_statistics_of_real_stories_are_those_of_counting_by_hand(shared, real_lm, tmp_path):
    stories = list(read_documents(shared / "data" / "text" / "tinystories_1000.jsonl"))
    assert len(stories) == 1000
    ids = [real_lm.encode(story, bos=False) for story in stories]
    tokens = packed(tmp_path, stories, real_lm.tokenizer)
    found = statistics(tokens, real_lm.tokenizer)
    assert found["document_lengths"]["min"] == min(map(len, ids))
    assert found["document_lengths"]["max"] == max(map(len, ids))
    assert found["n_tokens"] - found["n_special_tokens"] == sum(map(len, ids))
    assert sum(found["document_lengths"]["histogram"]["counts"]) == 1000
    assert found["vocabulary"]["top"][0]["token"] == "."


def test_published_sample_files_are_cut_at_their_marks(shared):
    assert len(list(read_documents(shared / "data" / "text" / "tinystories_v2_sample5.txt"))) == 5
