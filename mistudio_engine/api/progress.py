"""A job's progress where a person looks: a bar in a terminal, a widget in a notebook, nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mistudio_engine.api.records import Job

if TYPE_CHECKING:
    from mistudio_engine.api.client import Studio

__all__ = ["bar", "describe_rate", "shown"]


@contextmanager
def shown(job: Job, studio: Studio, wanted: bool | None) -> Iterator[Callable[[Job], None] | None]:
    """A callback that shows each new state of `job`; None where nobody looks.

    Args:
        wanted: True shows it, False does not, None decides by where we are.
    """
    if wanted is False or (wanted is None and not (in_notebook() or sys.stderr.isatty())):
        yield None
    elif in_notebook():
        with _widget(job, studio) as callback:
            yield callback
    else:
        with bar() as callback:
            yield callback


def in_notebook() -> bool:
    """Whether this is an IPython kernel with a front end."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


@contextmanager
def bar() -> Iterator[Callable[[Job], None]]:
    """A progress bar on the terminal's error stream."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("waiting", total=1.0, rate="")

        def show(job: Job) -> None:
            done = 1.0 if job.state == "completed" else job.progress or 0.0
            progress.update(task, completed=done, description=(job.stage or job.state)[:28], rate=describe_rate(job))

        yield show


def describe_rate(job: Job) -> str:
    """`12,300 tokens/s`, or nothing while it is not known."""
    return f"{job.rate:,.0f} {job.unit}/s" if job.rate else ""


@contextmanager
def _widget(job: Job, studio: Studio) -> Iterator[Callable[[Job], None] | None]:
    from IPython.display import display  # type: ignore[import-not-found]

    from mistudio_widgets.job_progress import JobProgress  # needs anywidget, which only notebooks have to load

    display(JobProgress(job, studio))
    yield None  # the widget follows the engine by itself
