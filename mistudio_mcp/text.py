"""What an agent reads: results as small structures, and the same as short text.

Numbers have three significant figures, long lists are cut and counted, and whatever comes from a dataset stands in fields
that say `untrusted`, with control and bidirectional characters escaped: text that steers a reader must not steer an agent.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from pydantic import BaseModel

from mistudio_engine.api.features import Example, FeatureCard, TextFeatures
from mistudio_engine.api.records import Job, Page
from mistudio_engine.api.steering import SteerResult

__all__ = ["as_structure", "as_text", "marked", "shown", "untrusted"]

MAX_TEXT = 400
"""Characters of one untrusted string; what is longer is cut and says so."""

MAX_CHARACTERS = 22_000
"""An answer is never above 6,000 tokens of about four characters; some are left for the JSON around it."""


def untrusted(text: str, limit: int = MAX_TEXT) -> str:
    """Text of others, made harmless to look at: control, format and bidirectional characters escaped, long ones cut."""
    safe = "".join(
        character if character == " " or unicodedata.category(character)[0] not in "CZ" else _escaped(character)
        for character in text[:limit]
    )
    return safe + "…" if len(text) > limit else safe


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode() if character not in "\u2028\u2029" else "\\n"


def shown(value: Any) -> Any:
    """Floats with three significant figures, throughout."""
    if isinstance(value, float):
        return float(f"{value:.3g}") if value == value else None
    if isinstance(value, dict):
        return {key: shown(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shown(each) for each in value]
    return value


def as_structure(result: BaseModel) -> dict[str, Any]:
    """A result as an agent is given it: what it needs, and no more than it can read."""
    match result:
        case Job():
            structure = _job(result)
        case FeatureCard():
            structure = _feature(result)
        case TextFeatures():
            structure = _text_features(result)
        case SteerResult():
            structure = _steered(result)
        case Page():
            structure = _page(result)
        case _:
            structure = result.model_dump(mode="json", exclude_none=True)
    return shown(structure)


def _page(page: Page[Any]) -> dict[str, Any]:
    structure = page.model_dump(mode="json", exclude_none=True, exclude={"rows"})
    rows = [_job(row) if isinstance(row, Job) else row.model_dump(mode="json", exclude_none=True) for row in page.rows]
    return {"rows": rows, **structure}


def _job(job: Job) -> dict[str, Any]:
    fields = (
        "ref",
        "operation",
        "state",
        "subject",
        "stage",
        "progress",
        "eta_seconds",
        "attempt",
        "author",
        "message",
    )
    record = job.model_dump(mode="json", exclude_none=True)
    structure = {name: record[name] for name in fields if record.get(name) not in (None, "")}
    structure["id"] = job.slug
    if job.plan and job.state in ("queued", "running"):
        structure["plan"] = job.plan.model_dump(mode="json", exclude_none=True)
    if job.metrics and not job.finished:
        structure["metrics"] = job.metrics
    if job.error:
        structure["error"] = job.error.model_dump(mode="json", exclude_none=True)
    if job.result is not None:
        structure["result"] = _outcome(job.result)
    if job.slug != "dry-run":
        structure["next_call"] = _after(job)
    return {name: value for name, value in structure.items() if value is not None}


def _outcome(result: dict[str, Any]) -> dict[str, Any]:
    """A job's result in short: a steering run as its own tool would show it, a record without what describe gives."""
    if "baseline" in result and "steered" in result:
        return _steered(SteerResult.model_validate(result))
    return {key: value for key, value in result.items() if value not in (None, "", [], {}) and key != "config"}


def _after(job: Job) -> dict[str, Any] | None:
    """What to call next."""
    if not job.finished:
        return {"tool": "job", "arguments": {"id": job.slug, "wait_s": 20}}
    if job.state == "failed":
        if job.error and job.error.next_call:
            return job.error.next_call.model_dump(mode="json")
        return {"tool": "job_control", "arguments": {"id": job.slug, "action": "retry"}}
    if job.state == "completed" and job.result and "ref" in job.result:
        return {"tool": "describe", "arguments": {"ref": job.result["ref"]}}
    return None


def _feature(card: FeatureCard) -> dict[str, Any]:
    structure = card.model_dump(
        mode="json", exclude_none=True, exclude={"examples", "top_tokens", "histogram", "promoted", "suppressed", "id"}
    )
    if card.label:
        structure["label"] = untrusted(card.label)
    if card.top_tokens:
        structure["top_tokens_untrusted"] = [
            {
                "token": untrusted(each.token, 40),
                "count": each.count,
                "mean": each.mean_activation,
                "max": each.max_activation,
            }
            for each in card.top_tokens[:15]
        ]
    for name in ("promoted", "suppressed"):
        tokens = getattr(card, name)
        if tokens:
            structure[name] = [{"token": untrusted(each.token, 40), "value": each.value} for each in tokens[:10]]
    if card.examples is not None:
        structure["examples_untrusted"] = [
            {"text": marked(each), "value": each.value, "group": each.group} for each in card.examples
        ]
    if card.labels:
        structure["labels"] = structure["labels"][:5]
    return structure


def marked(example: Example) -> str:
    """An example as one line with its prime token in «guillemets»."""
    tokens = [untrusted(token, 60) for token in example.tokens]
    tokens[example.position] = f"«{tokens[example.position]}»"
    return "".join(tokens)


def _text_features(found: TextFeatures) -> dict[str, Any]:
    structure = found.model_dump(mode="json", exclude_none=True, exclude={"rows": {"__all__": {"values"}}})
    structure["tokens"] = [untrusted(token, 40) for token in found.tokens]
    return structure


def _steered(result: SteerResult) -> dict[str, Any]:
    structure = result.model_dump(mode="json", exclude_none=True)
    for side in ("baseline", "steered"):
        structure[side] = [
            {
                "text_untrusted": untrusted(each.text, 1500),
                "perplexity": each.perplexity,
                "repetition": each.repetition,
                "finish_reason": each.finish_reason,
            }
            for each in getattr(result, side)
        ]
    return structure


def as_text(structure: dict[str, Any]) -> str:
    """The same as text: `name: value` lines, lists one item a line."""
    text = "\n".join(_lines(structure, 0))
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS] + "\n… cut: ask for fewer rows, or for one thing with describe."
    return text


def _lines(value: Any, depth: int) -> list[str]:
    indent = "  " * depth
    if isinstance(value, dict):
        lines = []
        for key, each in value.items():
            if isinstance(each, dict | list) and each:
                if _short(each):
                    lines.append(f"{indent}{key}: {_inline(each)}")
                else:
                    lines += [f"{indent}{key}:", *_lines(each, depth + 1)]
            elif each not in (None, "", [], {}):
                lines.append(f"{indent}{key}: {each}")
        return lines
    if isinstance(value, list):
        return [f"{indent}- {_inline(each)}" for each in value]
    return [f"{indent}{value}"]


def _short(value: Any) -> bool:
    return len(_inline(value)) <= 100


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_inline(each)}" for key, each in value.items() if each not in (None, "", [], {}))
    if isinstance(value, list):
        return " | ".join(_inline(each) for each in value)
    return str(value)
