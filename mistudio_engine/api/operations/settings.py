"""Operations on settings of the engine."""

from __future__ import annotations

__all__: list[str] = []
