"""`mistudio mcp install`: our entry in others' configurations, with everything else left as it is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mistudio_engine.api.errors import BadInput
from mistudio_mcp.install import CLIENTS, install

KEY = {"claude-code": "mcpServers", "claude-desktop": "mcpServers", "cursor": "mcpServers", "vscode": "servers"}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_program_has_its_key() -> None:
    assert set(CLIENTS) == set(KEY)


@pytest.mark.parametrize("client", CLIENTS)
def test_other_entries_stay_and_a_backup_is_kept(client: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    before = {"theme": "dünkel", KEY[client]: {"other": {"command": "other"}}}
    path.write_text(json.dumps(before), encoding="utf-8")
    path.chmod(0o600)
    said = install(client, path=path)
    assert client in said and str(path) in said
    after = read(path)
    entry = after[KEY[client]].pop("mistudio")
    assert after == before
    assert Path(entry["command"]).is_absolute() and entry["command"] == sys.executable
    assert entry["args"] == ["-m", "mistudio_mcp"]
    assert ("type" in entry) == (client == "vscode")
    assert read(tmp_path / "config.json.backup") == before
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["config.json", "config.json.backup"]


@pytest.mark.parametrize("client", CLIENTS)
def test_the_usual_place_is_made_where_it_is_missing(
    client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    install(client)
    (written,) = (path for path in tmp_path.rglob("*.json"))
    assert "mistudio" in read(written)[KEY[client]]


def test_installing_twice_changes_nothing_and_keeps_the_first_backup(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    install("cursor", path=path)
    written = path.read_bytes()
    assert "already" in install("cursor", path=path)
    assert path.read_bytes() == written
    assert (tmp_path / "config.json.backup").read_text() == "{}"


def test_a_dry_run_shows_what_it_would_write_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"mcpServers": {"other": {}}}')
    shown = install("claude-desktop", path=path, dry_run=True)
    assert '"other"' in shown and '"mistudio"' in shown
    assert path.read_text() == '{"mcpServers": {"other": {}}}'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [b'{"mcpServers": {', b"[]", b'{"mcpServers": []}', b'{"a": 1} // comment', b"\xff\xfe{"],
    ids=["torn", "a list", "servers are a list", "with a comment", "not UTF-8"],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"config\.json") as refused:
        install("cursor", path=path)
    assert refused.value.fix
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "\n", "\ufeff{}"], ids=["empty", "blank", "with a byte order mark"])
def test_an_empty_file_is_filled(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    install("cursor", path=path)
    assert list(read(path)["mcpServers"]) == ["mistudio"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    real, link = tmp_path / "dotfiles" / "mcp.json", tmp_path / "mcp.json"
    real.write_text("{}")
    os.symlink(real, link)
    install("cursor", path=link)
    assert link.is_symlink()
    assert "mistudio" in read(real)["mcpServers"]


def test_a_data_directory_of_ones_own_goes_into_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MISTUDIO_HOME", raising=False)
    path = tmp_path / "config.json"
    install("cursor", path=path)
    assert "env" not in read(path)["mcpServers"]["mistudio"]
    install("cursor", path=path, home=tmp_path / "data")
    assert read(path)["mcpServers"]["mistudio"]["env"] == {"MISTUDIO_HOME": str(tmp_path / "data")}


def test_an_unknown_program_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="emacs"):
        install("emacs", path=tmp_path / "config.json")
