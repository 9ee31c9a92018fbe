"""One thread, so that tests share the machine and repeat bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from training_data import tiny_lm

from mistudio_engine.models.language_model import LanguageModel


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    """A tiny random language model."""
    return tiny_lm()
