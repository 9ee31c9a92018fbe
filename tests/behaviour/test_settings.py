"""Settings are made by people, checked, and shown; keys are kept for their owner alone and shown to nobody."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mistudio_engine.api.errors import BadInput, CorruptFile, Forbidden
from mistudio_engine.api.operations import ListSettings, SetSetting
from mistudio_engine.runtime.engine import Engine
from mistudio_engine.runtime.secrets import SECRETS, Secrets, looks_secret
from tests.behaviour.doors import DOORS, Door, Loop, Served

KEY = "sk-settings-0123456789abcdefgh"


@pytest.fixture(params=["in process", "REST"])
def direct(request: pytest.FixtureRequest, studio: Served, loop: Loop) -> Iterator[Door]:
    """The doors by which people come."""
    yield from DOORS[request.param](studio, loop)


@pytest.fixture
def engine(studio: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The engine, without keys in its environment, and with nothing set at the end."""
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield studio.engine
    for row in studio.engine.call(ListSettings()).rows:
        studio.engine.call(SetSetting(key=row.key, value=None))  # type: ignore[arg-type]


def shown(call: Door, key: str) -> Any:
    return next(row for row in call(ListSettings()).rows if row.key == key)


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("labelling_provider", "ollama", "ollama"),
        ("labelling_model", " llama3.2 ", "llama3.2"),
        ("labelling_base_url", "http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("openai_base_url", "https://gateway.example.com/v1", "https://gateway.example.com/v1"),
        ("ollama_base_url", "http://localhost:11434", "http://localhost:11434"),
        ("price_per_million_input", "0.15", 0.15),
        ("price_per_million_output", 0, 0.0),
        ("embedder", "transformers:sentence-transformers/all-MiniLM-L6-v2", None),
        ("embedder", "openai:text-embedding-3-small", None),
        ("embedder", "ollama:nomic-embed-text", None),
        ("embedder", "words", None),
    ],
)
def test_a_setting_is_made_shown_and_taken_back(direct: Door, engine: Engine, key: Any, value: Any, kept: Any) -> None:
    before = shown(direct, key)
    made = direct(SetSetting(key=key, value=value))
    assert made.value == (value if kept is None else kept) and made.is_set and made.source == "settings"
    assert shown(direct, key) == made and made.description
    assert direct(SetSetting(key=key, value=None)) == before and not before.is_set


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labelling_provider", "claude"),
        ("labelling_model", ""),
        ("labelling_model", "a\nb"),
        ("labelling_base_url", "here"),
        ("labelling_base_url", 5),
        ("price_per_million_input", -1),
        ("price_per_million_input", "NaN"),
        ("price_per_million_output", "cheap"),
        ("price_per_million_output", True),
        ("embedder", "word2vec"),
        ("embedder", "openai:"),
        ("embedder", ["words"]),
    ],
)
def test_a_value_that_cannot_count_is_refused(direct: Door, engine: Engine, key: Any, value: Any) -> None:
    with pytest.raises(BadInput) as refused:
        direct(SetSetting(key=key, value=value))
    assert refused.value.fix and not shown(direct, key).is_set


@pytest.mark.parametrize("key", SECRETS)
def test_a_key_is_kept_for_its_owner_and_shown_to_nobody(direct: Door, engine: Engine, key: Any) -> None:
    made = direct(SetSetting(key=key, value=KEY))
    assert (made.is_set, made.value, made.secret, made.source) == (True, None, True, "secrets.json")
    assert KEY not in json.dumps([vars(row) for row in direct(ListSettings()).rows], default=str)
    path = engine.home / "secrets.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and Secrets(engine.home).get(key) == KEY
    assert KEY.encode() not in b"".join(each.read_bytes() for each in engine.home.glob("mistudio.db*"))
    assert KEY not in repr(SetSetting(key=key, value=KEY))
    assert not direct(SetSetting(key=key, value=None)).is_set
    assert Secrets(engine.home).get(key) is None


@pytest.mark.parametrize(
    "value", ["short", "a key with spaces", "x" * 2000, "schlüssel-0123456789", 12345678901, [KEY]]
)
def test_what_cannot_be_a_key_is_refused_and_not_repeated(direct: Door, engine: Engine, value: Any) -> None:
    with pytest.raises(BadInput) as refused:
        direct(SetSetting(key="openai_api_key", value=value))
    assert str(value) not in str(refused.value) and KEY not in str(refused.value) and refused.value.fix
    assert not shown(direct, "openai_api_key").is_set


def test_a_key_in_the_place_of_a_setting_is_refused_and_not_repeated(direct: Door, engine: Engine) -> None:
    with pytest.raises(BadInput, match="looks like a key") as refused:
        direct(SetSetting(key="labelling_model", value=KEY))
    assert KEY not in str(refused.value)


def test_a_misspelt_setting_is_refused_without_its_value(studio: Served, engine: Engine) -> None:
    with studio.http(headers=studio.headers) as http:
        answer = http.put("/api/v1/settings/openai_api_kez", json={"value": KEY})
    assert answer.status_code == 422 and KEY not in answer.text


def test_the_environment_counts_where_nothing_is_set(
    direct: Door, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment-0123456789")
    row = shown(direct, "openai_api_key")
    assert (row.is_set, row.source, row.value) == (True, "environment (OPENAI_API_KEY)", None)
    assert Secrets(engine.home).get("openai_api_key") == "sk-environment-0123456789"
    direct(SetSetting(key="openai_api_key", value=KEY))
    assert Secrets(engine.home).get("openai_api_key") == KEY


@pytest.mark.parametrize("key", ["labelling_base_url", "labelling_provider", "labelling_api_key"])
def test_an_agent_changes_no_setting(studio: Served, engine: Engine, key: Any) -> None:
    asked = SetSetting(key=key, value="http://evil.example.com/v1")
    with pytest.raises(Forbidden, match="Only a person") as refused:
        engine.call(asked, caller="agent:claude")
    assert "Ask the person" in refused.value.fix
    with studio.http(headers=studio.headers | {"Mistudio-Caller": "agent:claude"}) as http:
        answer = http.put(f"/api/v1/settings/{key}", json={"value": "http://evil.example.com/v1"})
    assert answer.status_code == 403
    assert not any(row.is_set for row in engine.call(ListSettings(), caller="agent:claude").rows)


# The file


def test_two_keys_do_not_disturb_each_other(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path)
    secrets.put("openai_api_key", KEY)
    secrets.put("hf_token", "hf_0123456789abcdef")
    secrets.put("openai_api_key", None)
    assert Secrets(tmp_path).get("hf_token") == "hf_0123456789abcdef"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secrets.json"], "nothing half written is left"


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "secrets.json"
    path.write_text(json.dumps({"openai_api_key": KEY}))
    os.chmod(path, 0o644)
    assert Secrets(tmp_path).get("openai_api_key") == KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"'])
def test_a_torn_file_is_said_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "secrets.json").write_text(content)
    with pytest.raises(CorruptFile) as torn:
        Secrets(tmp_path).get("openai_api_key")
    assert torn.value.fix


def test_keys_are_taken_out_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = Secrets(tmp_path)
    secrets.put("labelling_api_key", "a-key-like-no-other")
    monkeypatch.setenv("HF_TOKEN", "environment-token")
    text = (
        "a-key-like-no-other environment-token sk-proj-abcdefghijklmnop sk-abc*********wxyz hf_abcdefghijklmnop "
        "https://me:hunter2@example.com Bearer abcdefghijklmnop.qrst"
    )
    hidden = secrets.redact(text)
    for secret in ("no-other", "environment-token", "ijklmn", "wxyz", "hunter2"):
        assert secret not in hidden
    harmless = "words: skill, bearer of news, sk-1, https://example.com/a:b, hf_hub"
    assert secrets.redact(harmless) == harmless and not looks_secret(harmless)
    label = '{"reasoning":"after the bearer","label":"bearer tokens","category":"Token > Word"}'
    assert secrets.redact(label) == label, "an answer stays JSON"
