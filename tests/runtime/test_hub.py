"""Downloads from the hub, against a hub on loopback: whole or not at all, taken up again, and refused in words."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hub_server import HubServer, serve_hub
from huggingface_hub import constants

from mistudio_engine.api.errors import (
    BadInput,
    Cancelled,
    Conflict,
    CorruptFile,
    DiskFull,
    EmptyData,
    Forbidden,
    MistudioError,
    NotFound,
    Unreachable,
    Unsupported,
)
from mistudio_engine.api.events import Progress, Signal
from mistudio_engine.runtime import hub as hub_module
from mistudio_engine.runtime.hub import Hub

WEIGHTS = bytes(range(256)) * 2000  # half a megabyte in 32 chunks


class Desk(NamedTuple):
    """A hub and somebody who downloads from it."""

    server: HubServer
    hub: Hub
    target: Path

    def fetch(self, repo_id: str, kind: str = "model", **how: object) -> list[Progress]:
        """Download to the end; the progress that was made."""
        return list(self.hub.download(kind, repo_id, self.target, **how))  # type: ignore[arg-type]

    @property
    def names(self) -> list[str]:
        """What lies in the target."""
        return sorted(path.relative_to(self.target).as_posix() for path in self.target.rglob("*") if path.is_file())

    @property
    def partial(self) -> list[Path]:
        """What lies in the folder of unfinished downloads."""
        return [path for path in (self.hub.home / "downloads").rglob("*") if path.is_file()]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MISTUDIO_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    repositories = {
        "me/tiny": {
            "config.json": b'{"model_type": "gpt2"}',
            "tokenizer.json": b"{}",
            "model.safetensors": WEIGHTS,
            "consolidated.safetensors": WEIGHTS[:1000],
            "pytorch_model.bin": b"a pickle",
            "modeling.py": b"print('run')",
            "onnx/config.json": b"{}",
            "README.md": b"# tiny",
        },
        "me/pickled": {"config.json": b"{}", "pytorch_model.bin": b"a pickle"},
        "me/empty": {".gitattributes": b""},
        "me/saes": {
            "layer_0/width_16k/params.npz": b"numpy",
            "layer_0/width_16k/notes.pkl": b"a pickle",
            "layer_1/cfg.json": b"{}",
            "layer_1/sae_weights.safetensors": WEIGHTS[:100],
        },
        "me/odd": {"config.json": b"not json", "model.safetensors": b"1"},
        "datasets/me/words": {
            "README.md": b"# words",
            "words.py": b"print('run')",
            "data/train.jsonl": b'{"text": "one"}\n' * 3,
            "data/test.parquet": b"PAR1",
        },
    }
    folders = {repo_id: write(tmp_path / "hub" / repo_id, files) for repo_id, files in repositories.items()}
    with serve_hub(folders) as server:
        yield Desk(server, Hub(tmp_path / "home", endpoint=server.url), tmp_path / "home" / "models" / "tiny")


class TestWhatIsFetched:
    def test_a_model_is_weights_configuration_and_tokenizer_and_nothing_that_runs(self, desk: Desk) -> None:
        desk.fetch("me/tiny")
        assert desk.names == ["config.json", "model.safetensors", "tokenizer.json"]
        assert (desk.target / "model.safetensors").read_bytes() == WEIGHTS
        assert desk.partial == []

    def test_a_dataset_keeps_its_folders_and_brings_no_code(self, desk: Desk) -> None:
        desk.fetch("me/words", kind="dataset")
        assert desk.names == ["README.md", "data/test.parquet", "data/train.jsonl"]

    def test_an_sae_can_be_one_folder_of_many(self, desk: Desk) -> None:
        desk.fetch("me/saes", kind="sae", path="layer_1/")
        assert desk.names == ["layer_1/cfg.json", "layer_1/sae_weights.safetensors"]
        assert [file.name for file in desk.hub.listing("sae", "me/saes").files] == [
            "layer_0/width_16k/params.npz",
            "layer_1/cfg.json",
            "layer_1/sae_weights.safetensors",
        ]

    def test_patterns_of_the_caller_cannot_ask_for_a_pickle(self, desk: Desk) -> None:
        with pytest.raises(EmptyData):
            desk.fetch("me/words", kind="dataset", allow_patterns=["*.py"])
        listing = desk.hub.listing("model", "me/tiny", allow_patterns=["*.bin", "model.safetensors", "onnx/*"])
        assert [file.name for file in listing.files] == ["model.safetensors", "onnx/config.json"]

    def test_sizes_and_configuration_are_known_before_anything_is_downloaded(self, desk: Desk) -> None:
        assert desk.hub.size("model", "me/tiny") == len(WEIGHTS) + 22 + 2
        assert desk.hub.config("model", "me/tiny") == {"model_type": "gpt2"}
        assert desk.hub.config("sae", "me/saes") is None
        assert desk.hub.listing("model", "me/tiny").commit == desk.server.commit("me/tiny")
        assert desk.server.bytes_asked("model.safetensors") == []
        assert not (desk.hub.home / "downloads").exists()

    def test_a_commit_is_a_revision_like_any_other(self, desk: Desk) -> None:
        desk.fetch("me/tiny", revision=desk.server.commit("me/tiny"))
        assert desk.target.is_dir()


class TestProgress:
    def test_progress_is_in_bytes_and_ends_whole(self, desk: Desk) -> None:
        desk.server.hold = threading.Event()
        steps = desk.hub.download("model", "me/tiny", desk.target)
        assert next(steps).stage == "asking the hub for me/tiny"
        for progress in steps:
            if desk.server.held.is_set() and progress.fraction is not None:
                assert 0 <= progress.fraction < 1
                assert progress.unit == "bytes"
                desk.server.hold.set()
        assert desk.target.is_dir()

    def test_what_it_returns_is_the_folder(self, desk: Desk) -> None:
        def job() -> Iterator[Progress]:
            folder = yield from desk.hub.download("model", "me/tiny", desk.target)  # type: ignore[misc]
            assert folder == desk.target

        list(job())


class TestResuming:
    def test_a_connection_that_breaks_is_taken_up_where_it_broke(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # 10 MB, which would be the whole file
        desk.server.cut_after["model.safetensors"] = [100_000]
        desk.fetch("me/tiny")
        assert (desk.target / "model.safetensors").read_bytes() == WEIGHTS
        assert desk.server.bytes_asked("model.safetensors") == [None, "bytes=100000-"]

    def test_a_cancelled_download_leaves_no_folder_and_the_next_one_goes_on(self, desk: Desk) -> None:
        desk.server.hold = threading.Event()
        steps = desk.hub.download("model", "me/tiny", desk.target)
        for progress in steps:
            if desk.server.held.is_set() and "model" in progress.stage:
                break
            if desk.server.held.is_set():
                desk.server.hold.set()
                desk.server.hold, desk.server.held = threading.Event(), threading.Event()
        threading.Timer(0.5, desk.server.hold.set).start()  # a server that goes on sending finds nobody listening
        steps.close()
        assert not desk.target.exists()
        desk.server.hold = None
        first = desk.server.bytes_asked("tokenizer.json") + desk.server.bytes_asked("config.json")
        desk.fetch("me/tiny")
        assert (desk.target / "model.safetensors").read_bytes() == WEIGHTS
        again = desk.server.bytes_asked("tokenizer.json") + desk.server.bytes_asked("config.json")
        assert len(again) == 2 and len(first) >= 1, "what had arrived was not asked for again"

    def test_a_part_that_an_engine_left_behind_is_used(self, desk: Desk) -> None:
        folder = desk.hub.home / "downloads" / hub_module._key("model", desk.hub.listing("model", "me/tiny"))
        write(
            folder,
            {"model.safetensors.incomplete": WEIGHTS[:300_000], "tokenizer.json.incomplete": b"longer than it is"},
        )
        desk.fetch("me/tiny")
        assert desk.server.bytes_asked("model.safetensors") == ["bytes=300000-"]
        assert (desk.target / "model.safetensors").read_bytes() == WEIGHTS
        assert (desk.target / "tokenizer.json").read_bytes() == b"{}"

    def test_a_part_with_other_content_is_noticed_and_fetched_again(self, desk: Desk) -> None:
        folder = desk.hub.home / "downloads" / hub_module._key("model", desk.hub.listing("model", "me/tiny"))
        write(folder, {"model.safetensors.incomplete": b"\0" * 300_000, "config.json.incomplete": b"#"})
        desk.fetch("me/tiny")
        assert desk.server.bytes_asked("model.safetensors") == ["bytes=300000-", None]
        assert (desk.target / "model.safetensors").read_bytes() == WEIGHTS
        assert (desk.target / "config.json").read_bytes() == b'{"model_type": "gpt2"}'

    def test_content_that_stays_wrong_is_refused(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        listing = desk.hub.listing("model", "me/tiny")
        wrong = tuple(file._replace(sha256="0" * 64, git_oid="0" * 40) for file in listing.files)
        monkeypatch.setattr(hub_module, "choose", lambda *_: listing._replace(files=wrong))
        with pytest.raises(CorruptFile, match="arrived with other content"):
            desk.fetch("me/tiny")
        assert not desk.target.exists()

    def test_stopping_early_is_an_end_without_a_result(self, desk: Desk) -> None:
        desk.server.hold = threading.Event()
        steps = desk.hub.download("model", "me/tiny", desk.target)
        next(steps)
        threading.Timer(1.0, desk.server.hold.set).start()
        with pytest.raises(Cancelled):
            while True:
                steps.send(Signal.STOP if desk.server.held.is_set() else Signal.GO)
        assert not desk.target.exists()

    def test_two_downloads_of_one_commit_do_not_write_into_one_file(self, desk: Desk) -> None:
        desk.server.hold = threading.Event()
        first = desk.hub.download("model", "me/tiny", desk.target)
        second = desk.hub.download("model", "me/tiny", desk.target.with_name("twin"))
        while not desk.server.held.is_set():
            next(first)
        stages = {next(second).stage for _ in range(8)}
        assert "waiting for another download of me/tiny" in stages
        desk.server.hold.set()
        for steps in (first, second):
            list(steps)
        assert (desk.target.with_name("twin") / "model.safetensors").read_bytes() == WEIGHTS

    def test_what_was_given_up_is_removed_after_a_day(self, desk: Desk) -> None:
        old = write(desk.hub.home / "downloads" / "old-1", {"model.safetensors.incomplete": b"1"})
        new = write(desk.hub.home / "downloads" / "new-1", {"model.safetensors.incomplete": b"1"})
        os.utime(old, (0, 0))
        desk.fetch("me/tiny")
        assert not old.exists()
        assert new.exists()


class TestRefusals:
    def test_a_gated_repository_says_what_to_set(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        desk.server.gated.add("me/tiny")
        for token in ("", "hf_of_somebody_else"):
            monkeypatch.setenv("HF_TOKEN", token)
            with pytest.raises(BadInput, match="gated") as caught:
                desk.fetch("me/tiny")
            assert "HF_TOKEN" in caught.value.fix
            assert f"{desk.server.url}/me/tiny" in caught.value.fix
        assert not desk.target.exists()
        monkeypatch.setenv("HF_TOKEN", desk.server.accepted_token)
        desk.fetch("me/tiny")
        assert desk.target.is_dir()

    def test_a_repository_or_revision_or_folder_that_is_not_there_is_named(self, desk: Desk) -> None:
        for how, words in [
            ({"repo_id": "me/nothing"}, "There is no repository 'me/nothing'"),
            ({"repo_id": "me/tiny", "revision": "v9"}, "no revision 'v9'"),
            ({"repo_id": "me/saes", "kind": "sae", "path": "layer_7"}, "It has layer_0/width_16k, layer_1."),
            ({"repo_id": "me/words"}, "There is no repository"),  # it is a dataset
        ]:
            with pytest.raises(NotFound) as caught:
                desk.fetch(**how)  # type: ignore[arg-type]
            assert words in str(caught.value)

    def test_a_private_repository_opens_with_the_token(self, desk: Desk) -> None:
        desk.server.private.add("me/tiny")
        with pytest.raises(NotFound, match="or it is private"):
            desk.hub.listing("model", "me/tiny")
        desk.fetch("me/tiny", token=desk.server.accepted_token)
        assert desk.target.is_dir()

    def test_an_id_that_cannot_be_one_is_refused_without_asking(self, desk: Desk) -> None:
        for repo_id in ("a/b/c", "..", "me/ti ny", "-x", ""):
            with pytest.raises(BadInput, match="cannot be the id"):
                desk.hub.listing("model", repo_id)
        assert desk.server.requests == []

    def test_weights_that_are_pickles_only_are_not_downloaded(self, desk: Desk) -> None:
        with pytest.raises(Unsupported, match=r"pytorch_model\.bin"):
            desk.fetch("me/pickled")
        with pytest.raises(EmptyData):
            desk.fetch("me/empty")

    def test_a_hub_that_is_ill_or_away_is_a_passing_fault(self, desk: Desk, tmp_path: Path) -> None:
        desk.server.status_for["tokenizer.json"] = 500
        with pytest.raises(Unreachable, match="answered 500"):
            desk.fetch("me/tiny")
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # nobody listens
            away = Hub(tmp_path, endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}")
            with pytest.raises(Unreachable, match="could not be reached"):
                away.size("model", "me/tiny")

    def test_offline_opens_no_socket(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MISTUDIO_OFFLINE", "1")
        for ask in (lambda: desk.hub.size("model", "me/tiny"), lambda: desk.fetch("me/tiny")):
            with pytest.raises(Unreachable, match="MISTUDIO_OFFLINE"):
                ask()
        assert desk.server.requests == []

    def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hub_module, "DISK_MARGIN_BYTES", 2**60)
        abandoned = write(desk.hub.home / "downloads" / "other-1", {"model.safetensors.incomplete": b"1"})
        with pytest.raises(DiskFull, match="me/tiny"):
            desk.fetch("me/tiny")
        assert desk.server.bytes_asked("config.json") == []
        assert not abandoned.exists(), "what was given up makes room first"

    def test_an_existing_target_is_left_alone(self, desk: Desk) -> None:
        write(desk.target, {"mine.txt": b"mine"})
        with pytest.raises(Conflict):
            desk.fetch("me/tiny")
        assert desk.names == ["mine.txt"]
        assert desk.server.requests == []

    def test_a_configuration_that_is_none_is_said(self, desk: Desk) -> None:
        with pytest.raises(CorruptFile, match="not JSON"):
            desk.hub.config("model", "me/odd")

    def test_a_name_that_leads_outside_is_refused(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        listing = desk.hub.listing("model", "me/tiny")
        outside = (listing.files[0]._replace(name="../../outside.json"),)
        monkeypatch.setattr(hub_module, "choose", lambda *_: listing._replace(files=outside))
        with pytest.raises(Forbidden):
            desk.fetch("me/tiny")

    def test_the_token_is_in_no_error_no_progress_and_no_log_and_goes_to_no_other_host(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        token = "hf_veryverysecret"
        monkeypatch.setenv("HF_TOKEN", token)
        desk.server.gated.add("me/saes")
        desk.server.cut_after["model.safetensors"] = [1000]
        said = [repr(each) for each in desk.fetch("me/tiny")]
        for how in (
            {"repo_id": "me/nothing"},
            {"repo_id": "me/saes", "kind": "sae"},
            {"repo_id": "me/tiny", "revision": "no"},
        ):
            with pytest.raises(MistudioError) as caught:
                list(desk.hub.download(target=desk.target.with_name("other"), **({"kind": "model"} | how)))  # type: ignore[arg-type]
            said += [str(caught.value), repr(caught.value.body), repr(caught.value.__cause__)]
        said += [record.getMessage() for record in caplog.records]
        assert token not in "\n".join(said)
        hosts = {request.host.partition(":")[0] for request in desk.server.requests if request.authorization}
        assert hosts == {"127.0.0.1"}
        assert any(request.host.startswith("localhost") for request in desk.server.requests), "weights come from a CDN"
