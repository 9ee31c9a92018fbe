"""miStudio: a workbench for mechanistic interpretability with sparse autoencoders.

`connect()` finds or starts the engine; everything else is an operation on it. Importing this loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["AsyncStudio", "Studio", "__version__", "connect"]

if TYPE_CHECKING:
    from mistudio_engine.api.client import AsyncStudio, Studio, connect


def __getattr__(name: str) -> Any:
    # The client costs a third of a second to import; the command line's --help should not pay for it.
    if name in ("AsyncStudio", "Studio", "connect"):
        from mistudio_engine.api import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
