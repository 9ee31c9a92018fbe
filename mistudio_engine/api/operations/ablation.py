"""Operations on what a feature does to the model, and where it fires on given texts."""

from __future__ import annotations

__all__: list[str] = []
