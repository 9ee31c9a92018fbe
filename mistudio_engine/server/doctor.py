"""`mistudio doctor`: is everything here that the parts need, and does it work? It changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mistudio_engine import __version__
from mistudio_engine.api.errors import human_bytes
from mistudio_engine.api.home import data_dir, missing_packages, probe

__all__ = ["Finding", "checks"]


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    text: str
    good: bool = True
    fatal: bool = False
    """The engine cannot run like this."""

    @property
    def mark(self) -> str:
        """Shown in front."""
        return "ok  " if self.good else "FAIL" if self.fatal else "note"


def checks(home: Path | None) -> Iterator[Finding]:
    """Every finding, one after the other."""
    yield Finding("miStudio", f"{__version__} on Python {sys.version.split()[0]}, {sys.executable}")
    missing = missing_packages()
    fix = 'pip install "mistudio[engine]"'
    yield Finding(
        "engine packages",
        f"missing: {', '.join(missing)}; {fix}" if missing else _versions(),
        not missing,
        bool(missing),
    )
    for name, look in (("device", _device), ("text embedder", _embedder)):
        yield Finding(name, "not known without torch", False) if missing else _tried(name, look)
    yield _disk(home)
    yield _jupyter()
    yield _hub()
    found = probe(home)
    yield Finding(
        "engine", f"runs at {found.url}, pid {found.pid}" if found else "not running; it starts when it is needed"
    )


def _tried(name: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except Exception as error:  # a package that is there and broken is what a doctor is asked about
        return Finding(name, f"{type(error).__name__}: {error}", False, True)


def _versions() -> str:
    return ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "lancedb", "fastmcp")
    )


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return Finding("device", f"{name}, {human_bytes(free)} of {human_bytes(total)} free")
    return Finding("device", f"CPU with {torch.get_num_threads()} threads; no CUDA device was found")


def _disk(home: Path | None) -> Finding:
    folder = data_dir(home)
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    text = f"{folder}: {human_bytes(free)} free" if writable else f"{folder} cannot be written to"
    return Finding("data directory", text, writable and free > 1 << 30, not writable)


def _embedder() -> Finding:
    from mistudio_engine.discovery.embedding import find_local_embedder

    embedder = find_local_embedder()
    if embedder is None:
        return Finding("text embedder", 'none: search compares words only; pip install "mistudio[embed]"', False)
    return Finding("text embedder", f"{embedder.id}, {embedder.dimension} dimensions")


def _jupyter() -> Finding:
    if importlib.util.find_spec("jupyter_server") is None:
        return Finding("JupyterLab", 'not installed: pip install "mistudio[lab]"', False)
    config = Path(sys.prefix) / "etc" / "jupyter" / "jupyter_server_config.d" / "mistudio_widgets.json"
    text = "extension enabled" if config.exists() else f"extension not enabled: {config} is missing; reinstall mistudio"
    return Finding("JupyterLab", text, config.exists())


def _hub() -> Finding:
    if os.environ.get("MISTUDIO_OFFLINE") == "1":
        return Finding("Hugging Face Hub", "off: MISTUDIO_OFFLINE=1")
    has_token = bool(os.environ.get("HF_TOKEN")) or (Path.home() / ".cache" / "huggingface" / "token").exists()
    return Finding("Hugging Face Hub", "a token is set" if has_token else "no token: gated models need HF_TOKEN")
