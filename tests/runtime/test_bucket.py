"""A public bucket is listed and fetched, and nothing but the bucket is asked."""

from __future__ import annotations

import pytest

from mistudio_engine.api.errors import BadInput, CorruptFile, EmptyData, NotFound, Unreachable
from mistudio_engine.runtime.bucket import Bucket, BucketFile
from tests.bucket_server import BucketServer, bucket_server


@pytest.fixture
def server():
    with bucket_server() as made:
        made.files = {f"v1/m/s/features/batch-{n}.jsonl.gz": bytes([n]) * (n + 1) * 100_000 for n in range(5)}
        yield made


def test_every_page_of_a_listing_is_read(server: BucketServer):
    server.files["v1/other"] = b"x"
    found = Bucket(server.url).listing("v1/m/s/")
    assert found == [BucketFile(key, len(data)) for key, data in server.files.items() if key != "v1/other"]
    assert len(server.requests) == 3


def test_a_file_comes_in_chunks_and_whole(server: BucketServer, tmp_path):
    bucket = Bucket(server.url)
    file = bucket.listing("v1/m/s/features/batch-4")[0]
    assert list(bucket.fetch(file, tmp_path / "f"))[-1] == 500_000
    assert (tmp_path / "f").read_bytes() == server.files[file.key]
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


def test_a_cancelled_or_broken_or_lying_transfer_leaves_nothing(server: BucketServer, tmp_path):
    bucket = Bucket(server.url)
    file = bucket.listing("v1/m/s/features/batch-4")[0]
    work = bucket.fetch(file, tmp_path / "f")
    next(work)
    work.close()
    server.broken.add(file.key)
    with pytest.raises(Unreachable, match="could not be read"):
        list(bucket.fetch(file, tmp_path / "f"))
    server.broken.clear()
    for n_bytes, than in ((1000, "more"), (10**6, "fewer")):
        with pytest.raises(CorruptFile, match=f"has {than} bytes"):
            list(bucket.fetch(file._replace(n_bytes=n_bytes), tmp_path / "f"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((200, b"<html>hello"), Unreachable),
        ((200, b""), Unreachable),
        ((200, b"<!DOCTYPE x [<!ENTITY a 'aaaa'>]><x>&a;</x>"), Unreachable),
        ((200, b"<L><Contents><Key>v1/a</Key><Size>many</Size></Contents></L>"), Unreachable),
        ((302, b""), Unreachable),
        ((500, b""), Unreachable),
        ((403, b""), Unreachable),
        ((404, b""), NotFound),
        ((200, b"<ListBucketResult></ListBucketResult>"), EmptyData),
    ],
)
def test_what_is_no_listing_is_a_typed_error(server: BucketServer, answer, error):
    server.listing = answer
    with pytest.raises(error):
        Bucket(server.url).listing("v1/")
    assert len(server.requests) == 1, "no redirect is followed and nothing is asked twice"


def test_a_listing_without_end_is_cut_off(server: BucketServer, monkeypatch):
    monkeypatch.setattr("mistudio_engine.runtime.bucket.LISTING_CAP_BYTES", 1000)
    server.listing = (200, b"<L>" + b" " * 5000)
    with pytest.raises(Unreachable, match="does not end"):
        Bucket(server.url).listing("v1/")


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org",
        "ftp://127.0.0.1",
        "file:///etc",
        "https://",
        "https://a:secret@example.org",
        "https://:secret@example.org",
        "ftp://a:secret@example.org",
        "https://e.org?x",
        "",
        "http://[::1",
    ],
)
def test_only_addresses_of_buckets_are_taken(address: str):
    with pytest.raises(BadInput, match="is not the address of a bucket") as refused:
        Bucket(address)
    assert "secret" not in str(refused.value)


def test_offline_nothing_but_this_machine_is_asked(server: BucketServer, monkeypatch):
    monkeypatch.setenv("MISTUDIO_OFFLINE", "1")
    with pytest.raises(Unreachable, match="MISTUDIO_OFFLINE=1"):
        Bucket("https://bucket.invalid").listing("v1/")
    assert Bucket(server.url).listing("v1/")
