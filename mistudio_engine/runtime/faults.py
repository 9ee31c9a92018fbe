"""What the runtime has to be told about errors of libraries that it does not know, torch before all."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mistudio_engine.api.errors import MistudioError

__all__ = ["Faults", "first_line"]


class Faults(NamedTuple):
    """How errors are to be taken; as they are, unless the handlers say more."""

    is_device_lost: Callable[[BaseException], bool] = lambda _: False
    """Nothing can run on the device any more in this process: it has to end, and another to go on."""

    in_our_words: Callable[[BaseException, str], MistudioError | None] = lambda _error, _what: None
    """A library's error as one of ours, from the error and what was being done; None for one that has no words."""


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that CUDA's errors carry along."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
