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

ARCHITECTURES = ["standard", "jumprelu_transcoder", "batchtopk"]
A_LITTLE, NEXT_TO_NOTHING = 100 << 20, 1 << 20
CASES = [("standard", NEXT_TO_NOTHING), *((architecture, A_LITTLE) for architecture in ARCHITECTURES)]
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""What one case has freed would not be limited in the next."""


@pytest.fixture(scope="module")
def starved() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """By architecture and bytes to spare: two steps of a trainer that may allocate no more, of one that may have all,
    and how far apart their weights are (starved.py)."""
    script = Path(__file__).with_name("starved.py")
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    env = os.environ | GIVES_BACK | one
    command = [sys.executable, str(script), json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_memory_runs_out_the_same_steps_are_made_in_smaller_parts(
    starved: dict[tuple[str, int], list[dict[str, Any]]], architecture: str
) -> None:
    little, plenty, apart = starved[architecture, A_LITTLE]
    assert little["error"] is None
    assert little["micro_batch_size"] < 1024 == plenty["micro_batch_size"]
    assert plenty["warnings"] == []
    said = "Memory ran out with 1024 tokens at a time; going on with 512, which gives the same steps"
    assert said in little["warnings"][0]
    for ours, theirs in zip(little["steps"], plenty["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # Adam's first steps have the size of lr whatever the gradient's: one that is next to zero may round to either sign.
    assert {name: distance for name, distance in apart.items() if distance > 1e-4} == {}


def test_where_not_even_one_token_fits_it_says_what_is_needed(
    starved: dict[tuple[str, int], list[dict[str, Any]]],
) -> None:
    little, plenty, _ = starved["standard", NEXT_TO_NOTHING]
    assert little["n_steps_done"] == 0
    assert "This training needs" in little["error"]
    assert "Lower d_sae" in little["error"]
    assert plenty["n_steps_done"] == 2
