"""`mistudio mcp install CLIENT`: the entry in an agent program's configuration that starts our stdio server.

Programs with a window do not inherit the shell's PATH, so the entry holds the absolute interpreter. Other entries and
settings stay as they are; a file that is not what it should be is refused, never overwritten.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from mistudio_engine.api.errors import BadInput

__all__ = ["CLIENTS", "entry", "install"]


class AgentProgram(NamedTuple):
    """Where a program keeps its list of MCP servers, and under which key."""

    path: Path
    key: str
    with_type: bool = False
    """VS Code wants to be told that it is stdio."""


def _desktop() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "Claude" / "claude_desktop_config.json"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "Claude" / "claude_desktop_config.json"


def _clients() -> dict[str, AgentProgram]:
    return {
        "claude-code": AgentProgram(Path.cwd() / ".mcp.json", "mcpServers"),
        "claude-desktop": AgentProgram(_desktop(), "mcpServers"),
        "cursor": AgentProgram(Path.home() / ".cursor" / "mcp.json", "mcpServers"),
        "vscode": AgentProgram(Path.cwd() / ".vscode" / "mcp.json", "servers", with_type=True),
    }


CLIENTS = tuple(_clients())


def entry(home: Path | str | None = None) -> dict[str, Any]:
    """The command that starts the stdio server with this interpreter."""
    made: dict[str, Any] = {"command": sys.executable, "args": ["-m", "mistudio_mcp"]}
    chosen = home or os.environ.get("MISTUDIO_HOME")
    if chosen:
        made["env"] = {"MISTUDIO_HOME": str(Path(chosen).expanduser().absolute())}
    return made


def install(client: str, *, path: Path | None = None, home: Path | None = None, dry_run: bool = False) -> str:
    """Write the entry `mistudio` into the program's configuration, with a backup beside it; says what was done.

    Raises:
        BadInput: an unknown program; the file there is not a JSON object, or its list of servers is not one.
    """
    if client not in CLIENTS:
        raise BadInput(f"{client!r} is not a program we know.", fix=f"Known: {', '.join(CLIENTS)}.")
    program = _clients()[client]
    # A link, as people who keep their settings elsewhere have, stays one: what it leads to is written.
    target = (path or program.path).expanduser().resolve()
    config = _read(target)
    before = json.dumps(config)
    servers = config.setdefault(program.key, {})
    if not isinstance(servers, dict):
        raise BadInput(f"{program.key!r} in {target} is not an object.", fix="Mend the file, then call this again.")
    servers["mistudio"] = ({"type": "stdio"} if program.with_type else {}) | entry(home)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    if dry_run:
        return f"{target} would become:\n{text}"
    if json.dumps(config) == before:
        return f"{target} has the server 'mistudio' already."
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_text(text, encoding="utf-8")
    if target.exists():
        shutil.copy2(target, target.with_name(target.name + ".backup"))
        shutil.copymode(target, part)  # others' entries may hold keys that are for the owner only
    os.replace(part, target)
    return f"{target}: added the server 'mistudio'. Restart {client}."


def _read(target: Path) -> dict[str, Any]:
    try:
        text = target.read_text(encoding="utf-8-sig") if target.exists() else ""
        config = json.loads(text) if text.strip() else {}
    except ValueError as error:  # not UTF-8 is one too
        raise BadInput(f"{target} is not JSON: {error}.", fix="Mend the file, then call this again.") from None
    if not isinstance(config, dict):
        raise BadInput(f"{target} is not a JSON object.", fix="Mend the file, then call this again.")
    return config
