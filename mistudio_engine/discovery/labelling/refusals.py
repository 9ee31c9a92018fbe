"""What a language model server's refusal means: whether to try again, to give up the question, or to give up.

The words of servers differ, so they are looked at only where the status does not say it. It knows no client library.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from mistudio_engine.api.errors import BadInput, MistudioError
from mistudio_engine.api.plain_words import plain_line
from mistudio_engine.discovery.labelling.chat import NoAnswer
from mistudio_engine.discovery.labelling.patient_chat import Passing

__all__ = ["meaning_of", "retry_after_seconds", "said"]

_TOO_LONG = re.compile(
    r"context.{0,20}(length|window|size)|maximum.{0,20}(context|length|tokens)|too (long|many tokens)", re.I
)
_QUOTA = re.compile(r"insufficient_quota|billing|quota|credit", re.I)
_FILTERED = re.compile(r"content.?(filter|policy|management)|moderation", re.I)


def meaning_of(
    status: int,
    message: str,
    *,
    code: str | None,
    headers: Mapping[str, str],
    server: str,
    model: str,
    key_setting: str,
) -> MistudioError | Passing:
    """What to raise for an answer with this status.

    Args:
        status: of HTTP.
        message: what the server says, in its words.
        code: its own name for the error.
        headers: of the answer; names in lower case.
        server: where it is, as it may be shown.
        model: which was asked.
        key_setting: the setting with the key for this server.
    """
    words = f"{code or ''} {message}"
    if status == 429:
        if code == "insufficient_quota" or (code is None and _QUOTA.search(message) and "rate" not in message.lower()):
            return BadInput(
                f"The account at {server} has no money or quota left.",
                why=said(message),
                fix="Add credit there, or use another provider; then retry the job: what is labelled stays.",
            )
        return Passing("overloaded", f"it has too much to do (429): {said(message)}", after_seconds=_asked(headers))
    if status >= 500 or status in (408, 409, 425):
        return Passing("server_error", f"it failed ({status}): {said(message)}", after_seconds=_asked(headers))
    if status == 413 or (status in (400, 422) and _TOO_LONG.search(words)):
        return NoAnswer("prompt_too_long", f"the question is too long for {model}: {said(message)}")
    if status in (400, 403) and _FILTERED.search(words):
        return NoAnswer("refused", f"the server's filter stopped it: {said(message)}")
    if status in (401, 403):
        return BadInput(
            f"{server} refused the key ({status}).",
            why=said(message),
            fix=f"Ask a person to set a valid one: set_setting(key={key_setting!r}, value=…).",
        )
    if status == 404:
        return BadInput(
            f"{server} has no model {model!r}, or is not such a server (404).",
            why=said(message),
            fix="Name a model that it has (for Ollama first `ollama pull` it), and check the address (list_settings).",
        )
    return BadInput(
        f"{server} does not accept the request ({status}).",
        why=said(message),
        fix="Check the model's name and settings.",
    )


def said(message: object, longest: int = 300) -> str:
    """A server's words as they may be shown: one line, printable, not long."""
    text = plain_line(str(message)[: 4 * longest])
    return f"“{text if len(text) <= longest else text[: longest - 1] + '…'}”" if text else "it says nothing more"


def _asked(headers: Mapping[str, str]) -> float | None:
    return retry_after_seconds(headers.get("retry-after"), headers.get("retry-after-ms"))


def retry_after_seconds(value: str | None, milliseconds: str | None = None) -> float | None:
    """Seconds to wait, from a number or a date (RFC 9110, 10.2.3); None where neither says."""
    try:
        if milliseconds is not None:
            return max(0.0, float(milliseconds) / 1000)
        return None if value is None else max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value or "").timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
