"""What an agent reads: results as small structures, and the same as short text.

Numbers have three significant figures, long lists are cut and counted, and whatever comes from a dataset stands in
fields that say `untrusted`, with control and bidirectional characters escaped: text that steers a reader must not steer
an agent.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from mistudio_engine.api.feature_card import FeatureCard
from mistudio_engine.api.features import Example, TextFeatures
from mistudio_engine.api.records import Job, Page
from mistudio_engine.api.steering import SteerResult

__all__ = ["UNSHOWN", "as_structure", "as_text", "marked", "shown", "untrusted"]

MAX_TEXT = 400
"""Characters of one untrusted string; what is longer is cut and says so."""

MAX_CHARACTERS = 22_000
"""An answer is never above 6,000 tokens of about four characters; some are left for the JSON around it."""

INVISIBLE = frozenset(
    [0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10)]
) | frozenset(range(0xE0100, 0xE01F0))
"""Characters that show nothing although they are letters or marks to Unicode: fillers and variation selectors, in which
whole sentences can be hidden (DerivedCoreProperties.txt, Default_Ignorable_Code_Point)."""


def untrusted(text: str, limit: int = MAX_TEXT) -> str:
    """Text of others, made harmless to look at: control, format and bidirectional characters escaped, long ones cut."""
    safe = _harmless(text[:limit], keep=" ")
    return safe + "…" if len(text) > limit else safe


def _harmless(text: str, keep: str) -> str:
    return "".join(
        character if character in keep or not _is_treacherous(character) else _escaped(character) for character in text
    )


def _is_treacherous(character: str) -> bool:
    return unicodedata.category(character)[0] in "CZ" or ord(character) in INVISIBLE


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode() if character not in "\u2028\u2029" else "\\n"


def shown(value: Any) -> Any:
    """Floats with three significant figures and strings without treacherous characters, throughout.

    What JSON cannot carry, nan and the infinities, is left out of objects and null in lists.
    """
    if isinstance(value, str):
        return value if value.isascii() and value.isprintable() else _harmless(value, keep=" \n\t")
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: made for key, each in value.items() if (made := shown(each)) is not None or each is None}
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
    return _fitted(shown(structure))


def _fitted(structure: dict[str, Any]) -> dict[str, Any]:
    """What is too long for an agent is cut, the longest list or text first; `cut` says how much is left of each."""
    was: dict[str, int] = {}
    while len(json.dumps(structure, ensure_ascii=False)) > MAX_CHARACTERS:
        cuttable = list(_cuttable(structure, ""))
        if not cuttable:
            break
        path, parent, key = max(cuttable, key=lambda each: len(json.dumps(each[1][each[2]])))
        value = parent[key]
        parent[key] = value[: len(value) // 2]
        structure.setdefault("cut", {})[path] = f"{len(parent[key])} of {was.setdefault(path, len(value))}"
    if "rows" in was and "next_cursor" in structure:
        # The cursor goes on after rows that are not here; asked for fewer, the same call gives one that fits.
        del structure["next_cursor"]
        structure["cut"]["rows"] += f"; for the others call again with limit={len(structure['rows'])}"
    if "rows" in was and "shown" in structure:
        structure["shown"] = len(structure["rows"])
    return structure


def _cuttable(value: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Every list of several and every long text: its path, what it is in, and under which key."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        here = f"{path}.{key}" if path else str(key)
        if (isinstance(each, list) and len(each) > 1) or (isinstance(each, str) and len(each) > MAX_TEXT):
            yield here, value, key
        if isinstance(each, dict | list):
            yield from _cuttable(each, here)


def _page(page: Page[Any]) -> dict[str, Any]:
    structure = page.model_dump(mode="json", exclude_none=True, exclude={"rows"})
    return {"rows": [_job(row) if isinstance(row, Job) else _row(row) for row in page.rows], **structure}


def _row(row: BaseModel) -> dict[str, Any]:
    structure = row.model_dump(mode="json", exclude_none=True)
    # A label may be a language model's: it stays in its line.
    return structure | {name: untrusted(structure[name]) for name in ("label", "token") if name in structure}


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


UNSHOWN: dict[Any, tuple[str, ...]] = {
    FeatureCard: ("examples", "top_tokens", "histogram", "logit_histogram", "analysis", "id"),
}
"""Fields of a result that an agent is not given, or under another name."""

LONG_PARTS = {*UNSHOWN[FeatureCard], "promoted", "suppressed", "partners", "neighbours", "ablation"}
"""Of a card: shown in short, or not at all."""


def _feature(card: FeatureCard) -> dict[str, Any]:
    structure = card.model_dump(mode="json", exclude_none=True, exclude=LONG_PARTS)
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
    if card.analysis is not None:
        structure["analysis_untrusted"] = untrusted(card.analysis.summary, 1500)
    if card.neighbours is not None:
        structure["neighbours"] = [_row(each) for each in card.neighbours]
    if card.ablation is not None:
        structure["ablation"] = card.ablation.model_dump(mode="json", exclude_none=True, exclude={"texts"})
    if card.partners:
        structure["partners"] = [_row(each) for each in card.partners[:5]]
    if card.labels:
        structure["labels"] = structure["labels"][:5]
    return structure


def marked(example: Example) -> str:
    """An example as one line with its prime token in «guillemets»."""
    tokens = [untrusted(token, 60) for token in example.tokens]
    tokens[example.position] = f"«{tokens[example.position]}»"
    return "".join(tokens)


def _text_features(found: TextFeatures) -> dict[str, Any]:
    structure = found.model_dump(mode="json", exclude_none=True, exclude={"rows"})
    structure["rows"] = [_row(row.model_copy(update={"values": None})) for row in found.rows]
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
    return str(value).replace("\n", "\\n")
