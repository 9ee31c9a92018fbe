"""The numbers of the spine, each beside its limit: `python benchmarks/spine.py [--demo]`.

It measures what a user waits for: imports, the stdio door with no engine running, what HTTP adds to a call, greedy
decoding beside transformers' own, and with --demo the whole path. It exits with 1 when a limit is broken. On a busy
machine the times are too long, never too short; ratios are taken within one run, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "lancedb")
N_IMPORTS, N_CALLS, N_DECODED, N_TURNS = 5, 200, 100, 5


class Row(NamedTuple):
    """One line of the table; a limit of None is only shown."""

    what: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def good(self) -> bool:
        return self.limit is None or self.value <= self.limit

    def __str__(self) -> str:
        limit = "" if self.limit is None else f"{self.limit:g} {self.unit}"
        share = "" if not self.limit else f"{self.value / self.limit:.2f}"
        return (
            f"{self.what:<58} {self.value:>8.3g} {self.unit:<4} {limit:>8} {share:>6}  {'' if self.good else 'BROKEN'}"
        )


def imports() -> Iterator[Row]:
    """A fresh process each time, the start of Python itself included."""
    yield Row("python -c pass, for comparison", _median_run("pass"), "s")
    loads_none = f"import sys; assert not {set(HEAVY)!r} & set(sys.modules), 'a heavy package was loaded'"
    yield Row("import mistudio_mcp, without torch", _median_run(f"import mistudio_mcp; {loads_none}"), "s", 0.5)
    yield Row("  and its server, which is FastMCP", _median_run(f"import mistudio_mcp.__main__; {loads_none}"), "s")
    code = f"from mistudio_engine.server.cli import main\ntry: main(['--help'])\nexcept SystemExit: {loads_none}"
    yield Row("mistudio --help, without torch", _median_run(code), "s", 0.5)


def _median_run(code: str) -> float:
    def run() -> None:
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)

    run()  # the bytecode and the disk's cache
    return statistics.median(_seconds(run) for _ in range(N_IMPORTS))


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def stdio(home: Path) -> Iterator[Row]:
    """An agent's first moment: start the server, connect, list the tools, ask for the status; no engine runs."""
    import jsonschema
    from fastmcp import Client
    from fastmcp.client.transports import StdioTransport

    # What the *client* imports to check our answer takes it a second or two, once; that is not the server's time.
    assert jsonschema.Draft202012Validator.FORMAT_CHECKER

    async def first_moment() -> float:
        transport = StdioTransport(
            sys.executable, ["-m", "mistudio_mcp"], env={**os.environ, "MISTUDIO_HOME": str(home)}, cwd=str(ROOT)
        )
        began = time.perf_counter()
        async with Client(transport) as client:
            await client.list_tools()
            answer = await client.call_tool("status", {})
            seconds = time.perf_counter() - began
        assert answer.structured_content["state"] == "starting", answer
        return seconds

    yield Row("stdio MCP: start, connect, list, status, no engine running", asyncio.run(first_moment()), "s", 2.0)


def over_http(home: Path) -> Iterator[Row]:
    """`list_models` by the client over HTTP and in process, in turns, on one engine."""
    from mistudio_engine.api.client import AsyncStudio
    from mistudio_engine.api.home import EngineFile
    from mistudio_engine.api.operations import ListModels

    sys.path.insert(0, str(ROOT))
    from tests.behaviour.doors import served

    with served(home) as made:
        at_home: list[float] = []
        over_the_wire: list[float] = []

        async def in_turns() -> None:
            client = AsyncStudio(home, autostart=False)
            client._engine = EngineFile(
                url=made.url, token=made.engine.token, pid=os.getpid(), version="", epoch="", started_at=0
            )
            for _ in range(N_CALLS + 10):
                began = time.perf_counter()
                await made.engine.acall(ListModels())
                between = time.perf_counter()
                await client.call(ListModels())
                at_home.append(between - began)
                over_the_wire.append(time.perf_counter() - between)
            await client.close()

        asyncio.run(in_turns())
    inside, outside = (statistics.median(times[10:]) * 1000 for times in (at_home, over_the_wire))
    yield Row(f"list_models in process, median of {N_CALLS}", inside, "ms")
    yield Row(f"list_models over HTTP, median of {N_CALLS}", outside, "ms")
    yield Row("what HTTP adds", outside - inside, "ms", 5.0)


def decoding() -> Iterator[Row]:
    """Greedy decoding of the embedded model, ours and transformers', in turns; the tokens must be the same."""
    import torch

    from mistudio_engine.demo.embedded import MODEL_FOLDER
    from mistudio_engine.models.language_model import LanguageModel
    from mistudio_engine.steering.generation import generate
    from mistudio_engine.steering.sampling import Sampling

    lm = LanguageModel.load(MODEL_FOLDER)
    greedy = Sampling(max_new_tokens=N_DECODED, temperature=0.0)
    ids = torch.tensor([lm.encode("The", bos=True)])
    made: dict[str, list[int]] = {}

    def ours() -> None:
        steps = generate(lm, "The", sampling=greedy)
        try:
            while True:
                next(steps)
        except StopIteration as end:
            made["ours"] = list(end.value[0].token_ids)

    def theirs() -> None:
        out = lm.hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_DECODED, do_sample=False, pad_token_id=0
        )
        made["theirs"] = out[0, ids.shape[1] :].tolist()

    ours(), theirs()
    assert made["ours"] == made["theirs"], "greedy decoding differs from transformers' generate"
    times = [(_seconds(ours), _seconds(theirs)) for _ in range(N_TURNS)]
    n = len(made["ours"])
    yield Row("greedy decoding, ours", n / statistics.median(a for a, _ in times), "t/s")
    yield Row("greedy decoding, transformers' generate", n / statistics.median(b for _, b in times), "t/s")
    yield Row("our time / transformers' time, same tokens", statistics.median(a / b for a, b in times), "")


def demo(home: Path) -> Iterator[Row]:
    """`mistudio demo`, from the start of its process to its end."""
    command = [sys.executable, "-m", "mistudio_engine.server", "demo", "--json", "--home", str(home)]
    began = time.perf_counter()
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    yield Row("mistudio demo, the whole path", time.perf_counter() - began, "s", 120.0)
    result = json.loads(said.stdout.splitlines()[-1])
    yield Row("its SAE's FVU", result["fvu"], "", 0.2)


@contextmanager
def directory() -> Iterator[Path]:
    """A data directory for one measurement; an engine that was started on it is stopped."""
    from mistudio_engine.server.serve import stop

    with tempfile.TemporaryDirectory(prefix="mistudio-spine-") as folder:
        home = Path(folder) / "home"
        try:
            yield home
        finally:
            _settle(home)
            stop(home)


def _settle(home: Path) -> None:
    """An engine that is still starting is waited for: it could not be stopped."""
    from mistudio_engine.api.home import ensure_engine

    if (home / "start.lock").exists():
        ensure_engine(home)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true", help="run the demo as well")
    wanted = parser.parse_args()
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}, {load}")
    rows: list[Row] = []

    def show(measured: Iterator[Row]) -> None:
        for row in measured:
            rows.append(row)
            print(row, flush=True)

    print(f"{'':<58} {'value':>8} {'':<4} {'limit':>8} {'ratio':>6}")
    show(imports())
    for measure in (stdio, over_http):
        with directory() as home:
            show(measure(home))
    show(decoding())
    if wanted.demo:
        with directory() as home:
            show(demo(home))
    sys.exit(0 if all(row.good for row in rows) else 1)


if __name__ == "__main__":
    main()
