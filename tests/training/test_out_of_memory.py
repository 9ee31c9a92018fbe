"""Where an allocation really fails, a step is made in smaller parts: in a process whose memory the system limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="address space is limited and read as Linux does it")

A_LITTLE, NEXT_TO_NOTHING = 200 << 20, 1 << 20


def starved(architecture: str, spare: int) -> list[dict[str, Any]]:
    """Two steps of a trainer that may allocate `spare` bytes more, of one that may have all, and how far apart their
    weights are (starved.py)."""
    script = Path(__file__).with_name("starved.py")
    paths = os.pathsep.join([str(script.parent), str(script.parents[2])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(script), architecture, str(spare)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu_transcoder"])
def test_where_memory_runs_out_the_same_steps_are_made_in_smaller_parts(architecture: str) -> None:
    little, plenty, apart = starved(architecture, A_LITTLE)
    assert little["error"] is None
    assert little["micro_batch_size"] < 2048 == plenty["micro_batch_size"]
    assert plenty["warnings"] == []
    said = "Memory ran out with 2048 tokens at a time; going on with 1024, which gives the same steps"
    assert said in little["warnings"][0]
    for ours, theirs in zip(little["steps"], plenty["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # Adam's first steps have the size of lr whatever the gradient's: one that is next to zero may round to either sign.
    assert {name: distance for name, distance in apart.items() if distance > 1e-4} == {}


def test_a_batchtopk_that_runs_out_of_memory_goes_on_and_says_that_its_choice_is_another() -> None:
    little, *_ = starved("batchtopk", A_LITTLE)
    assert little["n_steps_done"] == 2
    assert "among which alone BatchTopK then chooses" in little["warnings"][0]
    assert [step["l0"] for step in little["steps"]] == [4, 4]


def test_where_not_even_one_token_fits_it_says_what_is_needed() -> None:
    little, plenty, _ = starved("standard", NEXT_TO_NOTHING)
    assert little["n_steps_done"] == 0
    assert "This training needs" in little["error"]
    assert "Lower d_sae" in little["error"]
    assert plenty["n_steps_done"] == 2
