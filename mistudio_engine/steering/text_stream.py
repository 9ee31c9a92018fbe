"""Text as it is generated: whole characters only, cut at the first stop sequence.

Tokens are bytes for byte-level tokenizers, so a token may end within a character; and a text may be at the beginning of
a stop sequence that is not complete yet. What is unsure is held back in both cases. It knows no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

REPLACEMENT = "\ufffd"
"""What decoders give for bytes that are no whole character (yet)."""

N_CONTEXT_TOKENS = 6
"""Tokens of the prompt decoded along with the first new one: a SentencePiece decoder drops the space before the first
token it sees, and a character of four bytes may have begun in the prompt."""


class TextStream:
    """The text of one continuation, token by token. `pieces joined == text`, which follows the prompt's text.

    Args:
        decode: token ids to text.
        prompt_ids: what the continuation follows.
        stops: the text ends before the first of these to appear.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stops = stops
        self._known = list(prompt_ids[-N_CONTEXT_TOKENS:])  # decoded and emitted, kept as left context
        self._new: list[int] = []  # not emitted yet
        self._held = ""  # whole characters that may begin a stop sequence

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while it completes none."""
        self._new.append(token_id)
        fresh = self._fresh()
        if fresh.endswith(REPLACEMENT):
            return ""
        self._advance()
        return self._emit(fresh)

    def finish(self) -> str:
        """What was held back, once no more tokens come: bytes that never became a character read as U+FFFD."""
        if self.stopped:
            return ""
        piece = self._emit(self._fresh())
        self._new.clear()
        if not self.stopped:
            piece += self._held
            self.text += self._held
        self._held = ""
        return piece

    def _fresh(self) -> str:
        before, after = self._decode(self._known), self._decode(self._known + self._new)
        if not after.startswith(before):
            before = before.rstrip(REPLACEMENT)  # the prompt ended within a character that is whole now
        return after[len(before) :]

    def _advance(self) -> None:
        self._known, self._new = (self._known + self._new)[-N_CONTEXT_TOKENS:], []

    def _emit(self, fresh: str) -> str:
        pending = self._held + fresh
        cuts = [at for stop in self._stops if (at := pending.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            piece, self._held = pending[: min(cuts)], ""
        else:
            n_held = max((_overlap(pending, stop) for stop in self._stops), default=0)
            piece, self._held = pending[: len(pending) - n_held], pending[len(pending) - n_held :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop without completing it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
