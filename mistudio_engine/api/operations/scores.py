"""Operations on how well labels foretell where their features fire."""

from __future__ import annotations

__all__: list[str] = []
