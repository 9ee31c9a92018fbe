"""Keys of other services: kept in a file that only the owner reads, given to who calls those services, shown to nobody.

They are in no record, event, log, error or answer; `redact` takes them out of texts that others wrote. It does not know
what the keys open.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from pathlib import Path

from mistudio_engine.api.errors import BadInput, CorruptFile
from mistudio_engine.runtime.files import write_atomic

__all__ = ["SECRETS", "Secrets", "looks_secret"]

SECRETS = {"openai_api_key": "OPENAI_API_KEY", "labelling_api_key": None, "hf_token": "HF_TOKEN"}
"""Every key by its name, with the variable of the environment that counts where it is not set."""

FILE = "secrets.json"
SHOWN = "[secret]"

_LOOKS_SECRET = re.compile(
    r"\b(?:hf_|sk-|ghp_|gsk_|xai-)[A-Za-z0-9_*-]{12,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|(?i:bearer)\s+[A-Za-z0-9._~+/*-]{16,}=*"
)
"""Keys of the usual services, a password in an address, and a token after Bearer (RFC 6750, 2.1)."""

_SHORTEST = 8
"""A shorter value could be a word, and taking that out of every text would only spoil texts."""

_writing = threading.Lock()


def looks_secret(text: str) -> bool:
    """Is there something in it that looks like a key or a password?"""
    return bool(_LOOKS_SECRET.search(text))


class Secrets:
    """The keys of one data directory; each look reads the file, so that all see the same."""

    def __init__(self, home: Path) -> None:
        self._path = Path(home) / FILE

    def get(self, name: str) -> str | None:
        """A key, as it was set or else from the environment; None where there is none."""
        variable = SECRETS[name]
        return self._read().get(name) or (os.environ.get(variable, "").strip() if variable else None) or None

    def source(self, name: str) -> str | None:
        """Where a key comes from: `secrets.json`, `environment` (with the variable's name), or None."""
        if self._read().get(name):
            return FILE
        variable = SECRETS[name]
        return f"environment ({variable})" if variable and os.environ.get(variable) else None

    def put(self, name: str, value: str | None) -> None:
        """Keep a key; None forgets it.

        Raises:
            BadInput: it cannot be one. The message does not show it.
        """
        if name not in SECRETS:
            raise BadInput(f"There is no secret {name!r}.", fix=f"There are {', '.join(SECRETS)}.")
        if value is not None:
            value = value.strip()
            if not _SHORTEST <= len(value) <= 1000 or not value.isascii() or not value.isprintable() or " " in value:
                raise BadInput(
                    f"This cannot be the {name}.",
                    why=f"A key has {_SHORTEST} to 1000 printable characters without spaces.",
                    fix="Copy it again from where it was made.",
                )
        with _writing:
            kept = self._read()
            kept = {key: each for key, each in kept.items() if key != name} | ({name: value} if value else {})
            write_atomic(self._path, json.dumps(kept), mode=0o600)

    def redact(self, text: str) -> str:
        """The text without any of our keys, and without what looks like one."""
        for name in SECRETS:
            value = self.get(name)
            if value is not None and len(value) >= _SHORTEST:
                text = text.replace(value, SHOWN)
        return _LOOKS_SECRET.sub(SHOWN, text)

    def _read(self) -> dict[str, str]:
        try:
            content = self._path.read_text("utf-8")
        except FileNotFoundError:
            return {}
        if stat.S_IMODE(self._path.stat().st_mode) & 0o077:
            os.chmod(self._path, 0o600)  # copied from elsewhere: nobody else is to read it from now on
        try:
            kept = json.loads(content)
            return {str(name): str(value) for name, value in kept.items()}
        except (ValueError, AttributeError):
            raise CorruptFile(
                f"{FILE} cannot be read.", fix="Remove it from the data directory and set the keys again."
            ) from None
