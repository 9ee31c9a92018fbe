"""An analysis in a few lines of plain text, for people and for the prompts of labellers.

It knows only the numbers that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from mistudio_engine.api.analysis import FeatureAnalysis, Share
from mistudio_engine.discovery.labelling.lexicon import shown

__all__ = ["N_ROWS", "describe"]

N_ROWS = 20
"""Rows that a table of an analysis has at most."""

_MIN_SHARE = 0.1
"""A position below is not worth a line."""


def describe(analysis: FeatureAnalysis) -> str:
    """An analysis in a few lines, for people and for prompts; words of the dataset in it are quoted and printable."""
    distinct = f"{len(analysis.words)} distinct words" if len(analysis.words) < N_ROWS else "many words"
    lines = [
        f"Looked at {analysis.n_examples} places where it fires ({distinct}), against "
        f"{analysis.n_silent_words} words where it is silent.",
        _line("Words", analysis.words, 8, quoted=True),
        _line("Parts of speech", analysis.part_of_speech, 3),
        _line("Lemmas", analysis.lemmas, 6, quoted=True),
        _line("Entities", analysis.entities, 3),
        _line("Shapes", analysis.shapes, 3),
        _line("Scripts", analysis.scripts, 2) if any(row.name != "Latin" for row in analysis.scripts) else "",
    ]
    for where in ("before", "after", "near before", "near after"):
        rows = [row for row in analysis.patterns if row.where == where][:4]
        lines.append(_line(f"{where.capitalize()} it", rows, 4, quoted=True))
    lines.append(_line("Position", [row for row in analysis.positions if row.share >= _MIN_SHARE], 3))
    for group in analysis.groups[:4]:
        members = ", ".join(_quoted(word) for word in group.members[:5])
        lines.append(f"Group by {group.by}: {shown(group.name)} {_numbers(group)}: {members}.")
    if analysis.missing:
        lines.append(f"The pipeline {analysis.pipeline} says nothing of {', '.join(analysis.missing)}.")
    return "\n".join(line for line in lines if line)


def _line(title: str, rows: Sequence[Share] | None, n: int, *, quoted: bool = False) -> str:
    if not rows:
        return ""
    return f"{title}: " + ", ".join(f"{_quoted(r.name) if quoted else r.name} {_numbers(r)}" for r in rows[:n]) + "."


def _numbers(row: Share) -> str:
    lift = f", {row.lift:.1f}×" if row.lift is not None else ""
    return f"{row.share:.0%} (n={row.n}{lift})"


def _quoted(word: str) -> str:
    return f"“{shown(word)}”"
