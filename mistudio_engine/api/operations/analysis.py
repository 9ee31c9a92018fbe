"""Operations on what the words of features have in common, and a map of them."""

from __future__ import annotations

__all__: list[str] = []
