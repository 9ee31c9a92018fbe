"""The main job: `mistudio demo` on a fresh directory, and what it must reach."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mistudio_engine.api.home import probe
from mistudio_engine.export.check import check_zip


def demo(home: Path, *arguments: str) -> dict[str, Any]:
    """Run the command as a person would and read the JSON line that ends it."""
    command = [sys.executable, "-m", "mistudio_engine.server", "demo", "--home", str(home), "--json", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=os.environ | {"MISTUDIO_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(520)
def test_the_demo_finds_the_known_concepts_and_steers_with_one(tmp_path: Path) -> None:
    found = demo(tmp_path / "home")
    assert found["fvu"] < 0.2
    assert found["ce_loss_score"] > 0.9
    concepts = found["concepts_found"]
    n = sum(kind["n"] for kind in concepts.values())
    assert concepts["contextual"]["n"] >= n / 3
    assert sum(kind["single"] for kind in concepts.values()) >= n / 2
    assert sum(kind["five"] for kind in concepts.values()) >= 0.8 * n
    assert sum(kind["ceiling"] for kind in concepts.values()) >= 0.9 * n, "the model itself knows the concepts"
    steered = found["steered"]
    assert steered["before"] < 0.1
    assert steered["after"] >= 5 * steered["before"]
    assert steered["control"] < 1.5 * steered["before"]
    assert steered["perplexity_ratio"] <= 2
    assert check_zip(Path(found["export_path"])).n_features == found["n_features"]
    assert found["searched"]["meaning"]["hits"] and found["searched"]["text"]["hits"]
    assert probe(tmp_path / "home") is None, "the engine that the demo started stops with it"


@pytest.mark.slow
@pytest.mark.timeout(520)
def test_the_demo_runs_on_a_real_model_and_real_text(tmp_path: Path, shared: Path) -> None:
    found = demo(
        tmp_path / "home",
        *("--model", str(shared / "data" / "stories260K-hf")),
        *("--text", str(shared / "data" / "text" / "tinystories_1000.jsonl")),
        *("--hook", "blocks.2.hook_resid_post"),
    )
    assert found["fvu"] < 0.3
    assert found["concepts_found"] is None
    assert found["steered"]["after"] > found["steered"]["before"]
    assert Path(found["export_path"]).is_file()
