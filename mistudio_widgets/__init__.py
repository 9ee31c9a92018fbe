"""The workbench in Jupyter: widgets, and the server extension that brings them to the engine.

Importing the package loads neither: Jupyter Server imports it at every start only to learn where its extension is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistudio_widgets.job_progress import JobProgress

__all__ = ["JobProgress"]


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    return [{"module": "mistudio_widgets.server_extension"}]


def __getattr__(name: str) -> Any:
    if name == "JobProgress":
        from mistudio_widgets.job_progress import JobProgress

        return JobProgress
    if name == "__version__":  # `jupyter server extension list` shows it
        from importlib.metadata import version

        return version("mistudio")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
