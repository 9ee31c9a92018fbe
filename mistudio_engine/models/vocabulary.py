"""A tokenizer's tokens as people read them, and which of them are special.

It knows tokens one by one: words that span several tokens are put together elsewhere, from the text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

__all__ = [
    "byte_alphabet",
    "ids_that_read",
    "is_part_of_character",
    "special_ids",
    "token_string",
    "token_strings",
    "tokenizer_hash",
]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_strings(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """Each id as text: leading spaces kept, never empty, one string an id whatever stands beside it.

    A token of bytes that are no whole character is written `<0xE2><0x80>`, so that two different tokens never read the
    same because both decode to a replacement character. An id without a token (models pad their vocabulary) reads
    `<id 50300>`.
    """
    byte_level = _is_byte_level(tokenizer)
    added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
    listed = [int(i) for i in ids]
    pieces = tokenizer.convert_ids_to_tokens(listed)
    return [
        added.get(token_id) or _readable(piece, byte_level) or f"<id {token_id}>"
        for token_id, piece in zip(listed, pieces, strict=True)
    ]


def is_part_of_character(string: str) -> bool:
    """Does a token's string, as `token_strings` gives it, stand for bytes that are no whole character?"""
    return "<0x" in string and bool(_BYTE_TOKEN.search(string))


def token_string(tokenizer: Any, token_id: int) -> str:
    """One id as text, as in `token_strings`."""
    return token_strings(tokenizer, [token_id])[0]


def ids_that_read(tokenizer: Any, text: str) -> set[int]:
    """Ids of the single tokens that read as `text`, with or without spaces around them; none where it is several."""
    ids = list(tokenizer.get_vocab().values())
    wanted = text.strip() or text
    return {
        each
        for each, string in zip(ids, token_strings(tokenizer, ids), strict=True)
        if wanted in (string.strip(), string)
    }


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that stand for no text: beginning, end, padding, chat marks.

    The unknown token is not among them: it stands for text that the vocabulary lacks. (GPT-2 names its end-of-text
    token as its unknown token too: as an end it is special.)
    """
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = {tokenizer.unk_token_id} - marks
    return frozenset((special | set(tokenizer.all_special_ids) | marks) - unknown)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what a tokenizer does: vocabulary, rules and special tokens, whatever folder it came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):
        # Left behind by earlier calls with padding or truncation: settings of a call, not of the tokenizer.
        rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    marks = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    text = json.dumps([rules, marks], sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether pieces are written in GPT-2's alphabet of 256 printable characters, one a byte."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    return "ByteLevel" in f"{backend.decoder!r} {backend.pre_tokenizer!r}"


def _readable(piece: str | None, byte_level: bool) -> str:
    if piece is None:
        return ""
    if byte_level:
        alphabet = byte_alphabet()
        if all(character in alphabet for character in piece):
            return _text(bytes(alphabet[character] for character in piece))
        return piece
    if match := _BYTE_TOKEN.fullmatch(piece):
        return _text(bytes([int(match[1], 16)]))
    return piece.replace("▁", " ")


def _text(raw: bytes) -> str:
    """UTF-8 as text, with <0x..> for each byte of a broken character and each control character but \\n and \\t."""
    return "".join(
        f"<0x{ord(c) & 0xFF:02X}>" if "\udc80" <= c <= "\udcff" or (c < " " and c not in "\n\t") or c == "\x7f" else c
        for c in raw.decode("utf-8", errors="surrogateescape")
    )


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 characters are themselves, the others U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + n): byte for n, byte in enumerate(others)}
