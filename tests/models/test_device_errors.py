"""Errors of torch that concern the whole process are told apart by what torch really says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mistudio_engine.api.errors import Internal, OutOfMemory
from mistudio_engine.models.device_errors import as_out_of_memory, is_device_lost

ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
)

CUDA_FULL = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.72 GiB of which 1.50 GiB is "
    "free. Process 42 has 138.21 GiB memory in use. Of the allocated memory 137.61 GiB is allocated by PyTorch."
)


@pytest.mark.parametrize(
    "words",
    [
        "an illegal memory access was encountered",
        "device-side assert triggered",
        "unspecified launch failure",
        "misaligned address",
        "uncorrectable ECC error encountered",
    ],
)
def test_after_a_sticky_error_the_device_is_lost(words: str) -> None:
    error = torch.AcceleratorError(f"CUDA error: {words}{ADVICE}")
    assert is_device_lost(error)
    assert is_device_lost(RuntimeError(f"CUDA error: {words}{ADVICE}")), "as older versions of torch raise it"
    wrapped = Internal("Something of ours failed.")
    wrapped.__cause__ = error
    assert is_device_lost(wrapped)
    assert as_out_of_memory(error, "this") is None


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: invalid configuration argument" + ADVICE),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device" + ADVICE),
        torch.OutOfMemoryError(CUDA_FULL),
        torch.AcceleratorError("CUDA error: out of memory" + ADVICE),
        RuntimeError("the model card says: device-side assert triggered"),
        ValueError("CUDA error: device-side assert triggered"),
        KeyError("x"),
    ],
    ids=repr,
)
def test_after_any_other_error_it_is_not(error: Exception) -> None:
    assert not is_device_lost(error)


def test_a_full_gpu_is_told_with_its_numbers() -> None:
    ours = as_out_of_memory(torch.OutOfMemoryError(CUDA_FULL), "job/train-sae-0001")
    assert isinstance(ours, OutOfMemory)
    assert ours.what == "The next step of job/train-sae-0001 needs about 20.0 GiB and 1.5 GiB is free."
    assert "batch_size" in ours.fix


def test_main_memory_that_is_not_there_is_told_with_its_numbers() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(10**15)
    ours = as_out_of_memory(real.value, "this")
    assert isinstance(ours, OutOfMemory)
    assert ours.what.startswith("The next step of this needs about 3638.0 TiB and ")
    with pytest.raises(MemoryError) as pythons:
        bytearray(1 << 62)
    assert isinstance(as_out_of_memory(pythons.value, "this"), OutOfMemory)
    assert as_out_of_memory(RuntimeError("something else"), "this") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_says_both_as_expected() -> None:
    with pytest.raises(torch.OutOfMemoryError) as full:
        torch.empty(10**13, device="cuda")
    assert "is free" in str(as_out_of_memory(full.value, "this"))
    code = (  # in a process of its own, whose context is poisoned
        "import torch\n"
        "from mistudio_engine.models.device_errors import is_device_lost\n"
        "try: torch.zeros(4, device='cuda')[torch.tensor([1 << 40], device='cuda')].sum().item()\n"
        "except RuntimeError as error: print(is_device_lost(error))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert said.stdout == "True\n", said.stderr
