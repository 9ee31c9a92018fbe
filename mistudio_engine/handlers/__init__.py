"""The joint between the machine and the science: one file or a few for each file of operations.

Importing this package loads only what needs no torch (the engine itself, its jobs, templates), so that the engine
answers `status` while it is still starting; `load()` imports the rest, on the compute thread.
"""

from __future__ import annotations

import importlib

from mistudio_engine.handlers import jobs, settings, system, templates  # noqa: F401  they register themselves
from mistudio_engine.handlers.registry import HANDLERS, PLANS, RUNS
from mistudio_engine.runtime.engine import Engine, Registry

__all__ = ["REGISTRY", "load"]

AT_ONCE = frozenset(HANDLERS)

SCIENCE = (
    "resources",
    "search_index",
    "datasets",
    "models",
    "training",
    "trainings",
    "reproduce",
    "saes",
    "extractions",
    "health",
    "labels",
    "scores",
    "analysis",
    "feature_map",
    "ablation",
    "published",
    "features",
    "search",
    "neighbours",
    "on_text",
    "steering",
    "exports",
)


def load(engine: Engine) -> None:
    """Import the handlers that need torch, and open what they work with; on the compute thread."""
    modules = {name: importlib.import_module(f"mistudio_engine.handlers.{name}") for name in SCIENCE}
    engine.device = modules["resources"].best_device()
    engine.jobs.faults = modules["resources"].FAULTS
    modules["search_index"].open_index(engine)
    modules["trainings"].follow_trainings(engine)
    modules["exports"].follow_exports(engine)


REGISTRY = Registry(HANDLERS, PLANS, RUNS, AT_ONCE, load, templates.apply_template, templates.count_use)
