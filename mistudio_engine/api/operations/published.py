"""Operations on labels and examples that others have published."""

from __future__ import annotations

__all__: list[str] = []
