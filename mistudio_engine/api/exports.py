"""A file that the engine hands out, as it travels."""

from __future__ import annotations

from mistudio_engine.api.records import Data

__all__ = ["Download"]


class Download(Data):
    """A file made by the engine. Over REST the answer to the operation is the file itself."""

    path: str
    """Where it lies on the engine's machine."""

    filename: str
    media_type: str
    n_bytes: int
    sha256: str
