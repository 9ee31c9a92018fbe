"""Errors of torch that concern the whole process: a device that is lost, and memory that is not there.

It knows neither jobs nor processes, and repairs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import psutil
import torch

from mistudio_engine.api.errors import MistudioError, OutOfMemory

__all__ = ["as_out_of_memory", "is_device_lost"]

STICKY = (
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "device-side assert triggered",
    "hardware stack error",
    "invalid program counter",
    "misaligned address",
    "operation not supported on global/shared address space",
    "the launch timed out and was terminated",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error",
    "unspecified launch failure",
)
"""What `cudaGetErrorString` says of the errors after which every call of the process returns the same error, "and the
process must be terminated and relaunched" (CUDA Runtime API, cudaError); HIP has the same words."""

NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch says it where it raises a plain RuntimeError."""

AMOUNT = r"([\d.]+) (bytes|KiB|MiB|GiB)"
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

FIX = (
    "Lower batch_size, unload models that nobody works with (unload_model), or use a smaller model or precision; then "
    "retry."
)


def is_device_lost(error: BaseException) -> bool:
    """Whether the device cannot be used by this process any more, whoever raised what in consequence."""
    return any(
        isinstance(each, RuntimeError)
        and not isinstance(each, torch.OutOfMemoryError)
        and (isinstance(each, torch.AcceleratorError) or "CUDA error" in str(each) or "HIP error" in str(each))
        and any(words in str(each) for words in STICKY)
        for each in _causes(error)
    )


def as_out_of_memory(error: BaseException, what: str) -> MistudioError | None:
    """A library's lack of memory as our error, with what is known of how much; None when it is something else.

    Args:
        what: what was being done, such as a job's ref.
    """
    if not _lacks_memory(error):
        return None
    needed, free = _bytes(rf"allocate {AMOUNT}", error), _bytes(rf"of which {AMOUNT} is free", error)
    if needed is not None and free is None and not isinstance(error, torch.OutOfMemoryError):
        free = psutil.virtual_memory().available
    if needed is None or free is None:
        return OutOfMemory(f"{what} needs more memory than is free.", why=str(error)[:200], fix=FIX)
    return OutOfMemory.of(f"The next step of {what}", needed, free, FIX)


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _bytes(pattern: str, error: BaseException) -> int | None:
    found = re.search(pattern, str(error))
    return round(float(found[1]) * UNITS[found[2]]) if found else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    for _ in range(10):  # a chain can be made to bite its tail
        if cause is None:
            return
        yield cause
        cause = cause.__cause__
