"""Labelling 1,000 features by a language model that takes 100 ms and fails a tenth of the time.

    python benchmarks/labelling.py

A real engine asks a real HTTP server in a process of its own, which answers a tenth of the requests with 429, 500 or
garbage. Ideal is n_requests · latency / n_parallel: nothing but waiting, always for as many as may be under way. Prints
a line of JSON for each number of parallel requests; the target is at least 0.9 of the ideal. With the search index in
step, as always.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mistudio_engine.api.operations import (  # noqa: E402
    Extract,
    GetDataset,
    GetModel,
    LabelFeatures,
    LabellingAttempts,
    SetSetting,
    TrainSAE,
)
from mistudio_engine.api.records import Job  # noqa: E402
from mistudio_engine.api.training_config import Hyperparameters  # noqa: E402
from mistudio_engine.demo.embedded import DEMO_HOOK  # noqa: E402
from mistudio_engine.handlers import REGISTRY  # noqa: E402
from mistudio_engine.handlers.knowledge import Knowledge  # noqa: E402
from mistudio_engine.runtime.engine import Engine  # noqa: E402

SECONDS = 600.0


@contextmanager
def language_model(latency: float, failures: float, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server as a process: its address, and what it counted, once it has ended."""
    command = [sys.executable, "-m", "tests.llm_server"]
    options = ["--latency", str(latency), "--failures", str(failures), "--seed", str(seed)]
    counted: dict[str, Any] = {}
    with subprocess.Popen(
        [*command, *options], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), counted
        said, _ = process.communicate()
        counted |= json.loads(said)


def done(engine: Engine, operation: Any) -> Job:
    """The job of an operation at its good end."""
    job = engine.jobs.wait(engine.call(operation).slug, SECONDS)
    if job.state != "completed":
        raise SystemExit(f"{job.ref} {job.state}: {job.message}")
    return job


def prepare(engine: Engine, d_sae: int) -> None:
    """A model, its tokens, and an SAE with enough living features."""
    done(engine, GetModel(source="embedded", name="tiny"))
    done(engine, GetDataset(source="embedded", name="corpus", model="tiny", n_tokens=60_000))
    settings = Hyperparameters(n_tokens=20_480, batch_size=1024, lr=2e-3, buffer_tokens=16_384)
    done(
        engine,
        TrainSAE(
            model="tiny",
            dataset="corpus",
            hook_name=DEMO_HOOK,
            d_sae=d_sae,
            k=64,
            name="wide",
            hyperparameters=settings,
        ),
    )
    done(engine, Extract(sae="wide", n_tokens=30_000))


def labelled(engine: Engine, features: list[int], n_parallel: int, latency: float, failures: float) -> dict[str, Any]:
    """One run, with what it took."""
    engine.store.delete_labels("wide")
    with language_model(latency, failures, seed=n_parallel) as (url, counted):
        engine.call(SetSetting(key="labelling_base_url", value=f"{url}/v1"))
        call = LabelFeatures(sae="wide", features=features, provider="compatible", model="m", n_parallel=n_parallel)
        began_at, cpu_began_at = time.perf_counter(), time.process_time()
        job = done(engine, call)
        seconds, cpu_seconds = time.perf_counter() - began_at, time.process_time() - cpu_began_at
    report = job.result or {}
    reasons = [engine.call(LabellingAttempts(sae="wide", index=i, limit=1)).rows[0].body for i in features]
    ideal = counted["n_requests"] * latency / n_parallel
    return {
        "n_features": len(features),
        "n_parallel": n_parallel,
        "n_requests": counted["n_requests"],
        "peak": counted["peak"],
        "seconds": round(seconds, 2),
        "ideal_seconds": round(ideal, 2),
        "of_ideal": round(ideal / seconds, 3),
        "seconds_per_request": round(report["seconds_per_request"], 4),
        "cpu_seconds": round(cpu_seconds, 2),
        "n_labelled": report["n_labelled"],
        "n_failed": report["n_failed"],
        "every_feature_ends": all(body.get("label") or body.get("reason") for body in reasons),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--n-features", type=int, default=1000)
    parser.add_argument("--n-parallel", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--failures", type=float, default=0.1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        engine = Engine(Path(home), REGISTRY)
        engine.start()
        engine.wait_ready(120)
        try:
            prepare(engine, d_sae=2 * options.n_features)
            with Knowledge.of(engine, "wide") as known:
                features = list(known.alive())[: options.n_features]
            for n_parallel in options.n_parallel:
                row = labelled(engine, features, n_parallel, options.latency, options.failures)
                print(json.dumps(row), flush=True)
        finally:
            engine.stop()


if __name__ == "__main__":
    main()
