"""Addresses of language model servers: which can be one, and which stay on this machine. It opens no connection."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from mistudio_engine.api.errors import BadInput, Unsupported

__all__ = ["check_address", "is_loopback", "shown_address"]


def check_address(url: str, *, offline: bool = False) -> str:
    """The address without a slash at its end.

    Raises:
        BadInput: it is no address of a server, or carries something secret.
        Unsupported: it leaves this machine, and `offline` forbids that.
    """
    try:
        parts = urlsplit(url.strip())
        _ = parts.port
    except ValueError:  # not shown: what cannot be taken apart may hold a password
        raise BadInput("This is not an address.", fix=_LIKE_THIS) from None
    if parts.username or parts.password or "@" in parts.netloc:
        # Not shown: what stands before the @ is a password.
        raise BadInput(
            "The address holds a name or a password.",
            why="Addresses are shown and kept, and secrets are not.",
            fix="Leave it out, and set the key with set_setting(labelling_api_key).",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        what = "This" if "@" in url else repr(shown_address(url))  # me:password@host has no host to tell it by
        raise BadInput(f"{what} is not the address of a server.", fix=_LIKE_THIS)
    if offline and not is_loopback(url):
        raise Unsupported(
            f"{shown_address(url)} is not on this machine, and the engine is offline (MISTUDIO_OFFLINE=1).",
            fix="Use a server on this machine, such as Ollama, or the token_pattern provider; or start without it.",
        )
    return url.strip().rstrip("/")


_LIKE_THIS = "Give one such as http://127.0.0.1:8000/v1, without a query."


def is_loopback(url: str) -> bool:
    """Does the address name this machine?"""
    host = urlsplit(url.strip()).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown_address(url: str) -> str:
    """As it may be shown: without anything that can be secret, and not long."""
    parts = urlsplit(url.strip())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:120]
