"""The command line: instant help, a command for each operation, errors in three lines, exit codes with a meaning."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click import Option

from mistudio_engine.api.home import EXIT_BUSY, EngineFile, write_engine_file
from mistudio_engine.api.operations import OPERATIONS, JobOperation
from mistudio_engine.server.cli import cli, main
from mistudio_engine.server.cli_operations import command_of
from tests.behaviour.doors import Served

FIXED = ("serve", "demo", "mcp", "engine", "doctor", "reproduce")
HELP_CPU_SECONDS = 0.5

Shell = subprocess.CompletedProcess[str]


def shell(*arguments: str, home: Path | None = None) -> Shell:
    """`mistudio ARGUMENTS` in a process of its own."""
    environment = os.environ | ({"MISTUDIO_HOME": str(home)} if home else {})
    command = [sys.executable, "-m", "mistudio_engine.server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)


@pytest.fixture
def here(bare: Served, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """The command line in this process, on the engine that runs here."""
    engine = EngineFile(
        url=bare.url, token=bare.engine.token, pid=os.getpid(), version="", epoch=bare.engine.epoch, started_at=0
    )
    path = write_engine_file(bare.engine.home, engine)
    yield Command(bare.engine.home, capsys)
    path.unlink()


class Command:
    """`here("list-models")` → exit code, output, error output."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self.capsys = home, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--home", str(self.home)])
        said = self.capsys.readouterr()
        code = ended.value.code
        return code if isinstance(code, int) else 0, said.out, said.err


def test_help_lists_everything_at_once_and_loads_nothing_heavy() -> None:
    code = (
        "import os, sys; from mistudio_engine.server.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit:\n"
        "    print(os.times().user, sorted({'torch', 'transformers', 'fastmcp', 'httpx'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    words = said.stdout.split()
    assert words[-1] == "[]", "these were loaded"
    listed = {*FIXED, *(name.replace("_", "-") for name in OPERATIONS)}
    assert listed <= set(words)
    names = re.findall(r"^  ([a-z]\S*)", said.stdout, re.MULTILINE)
    assert [name for name in listed if names.count(name) != 1] == [], "each stands there once"
    assert float(words[-2]) < HELP_CPU_SECONDS


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_a_command_with_an_option_for_each_field(name: str) -> None:
    kind, command = OPERATIONS[name], command_of(name)
    options = {option.name: option for option in command.params if isinstance(option, Option)}
    assert set(kind.model_fields) <= set(options)
    for field, info in kind.model_fields.items():
        assert f"--{field.replace('_', '-')}" in options[field].opts
        assert options[field].required == info.is_required()
    assert ("_wait" in options) == issubclass(kind, JobOperation)
    assert command.help == kind.__doc__
    assert cli.get_command(None, name.replace("_", "-")) is not None  # type: ignore[arg-type]


def test_a_result_is_text_for_people_and_json_for_programs(here: Command) -> None:
    assert here("list-models")[:2] == (0, "0 of 0\n")
    code, out, _ = here("status", "--json")
    assert code == 0
    assert json.loads(out)["state"] == "ready"


def test_a_plan_is_shown_and_nothing_is_started(here: Command, bare: Served) -> None:
    code, out, _ = here("get-model", "--source", "embedded", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["summary"]
    assert bare.engine.jobs.counts() == {}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["show-sae", "--sae", "nobody"], 1, "There is no sae 'nobody'"),
        (["list-models", "--limit", "0"], 1, "limit"),
        (["reproduce", "training/nobody"], 1, "training/nobody is not here"),
        (["reproduce", "dataset/corpus"], 1, "cannot be made again"),
        (["show-sae", "--sae", "../etc"], 1, "is not a"),
        (["show-sae"], 2, "--sae"),
        (["list-models", "--colour", "red"], 2, "--colour"),
        (["find", "--kind", "unicorn"], 2, "unicorn"),
        (["steer", "--prompt", "x", "--interventions", "{"], 2, "is not JSON"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_command_says_what_and_how_to_mend_it(
    here: Command, arguments: list[str], code: int, words: str
) -> None:
    ended, out, err = here(*arguments)
    assert ended == code
    assert words in err
    assert not out
    assert "Traceback" not in err and "pydantic" not in err
    if code == 1:
        what, *fix = err.strip().splitlines()
        assert what.startswith("error: ") and fix


def test_an_error_is_json_for_programs_that_want_it(here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTUDIO_JSON_ERRORS", "1")
    code, _, err = here("show-sae", "--sae", "nobody")
    assert code == 1
    assert json.loads(err)["code"] == "not_found"


def test_an_unknown_command_is_refused(tmp_path: Path) -> None:
    said = shell("trian-sae", home=tmp_path)
    assert said.returncode == 2
    assert "No such command 'trian-sae'" in said.stderr


def test_the_engine_is_started_found_shown_and_stopped(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert shell("engine", "status", home=home).returncode == 3
    assert shell("engine", "stop", home=home).stdout == "no engine runs\n"
    started = shell("engine", "start", home=home)
    try:
        assert started.returncode == 0, started.stderr
        assert shell("engine", "start", home=home).stdout == started.stdout, "the one that runs is found"
        status = shell("engine", "status", home=home)
        assert status.returncode == 0
        assert status.stdout.startswith(started.stdout.strip())
        assert "listens on" in shell("engine", "logs", home=home).stdout
        assert shell("serve", home=home).returncode == EXIT_BUSY
    finally:
        assert shell("engine", "stop", home=home).stdout.startswith("engine stopped")
    assert shell("engine", "status", home=home).returncode == 3


def test_the_doctor_finds_this_installation_well_and_a_missing_disk_not(tmp_path: Path) -> None:
    well = shell("doctor", home=tmp_path / "home")
    assert well.returncode == 0, well.stdout
    for name in ("engine packages", "device", "data directory", "text embedder", "JupyterLab", "engine"):
        assert name in well.stdout
    assert not (tmp_path / "home").exists(), "it changes nothing"


def test_the_doctor_names_a_package_that_is_there_and_broken(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so is missing')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    command = [sys.executable, "-m", "mistudio_engine.server", "doctor", "--home", str(tmp_path / "home")]
    ill = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    assert ill.returncode == 1
    assert "FAIL device" in ill.stdout and "libcudart.so is missing" in ill.stdout
    assert "Traceback" not in ill.stderr


def test_installing_for_an_agents_program_says_what_it_did(tmp_path: Path) -> None:
    path = tmp_path / "mcp.json"
    with pytest.raises(SystemExit) as ended:
        main(["mcp", "install", "cursor", "--path", str(path)])
    assert not ended.value.code
    assert "mistudio" in json.loads(path.read_text())["mcpServers"]
