"""A device that has too little memory: one error that says what for, and what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmfw.errors import DeviceError

# What raises a plain RuntimeError: torch's allocator of the CPU; CUDA itself, for graphs, contexts,
# modules and page-locked memory, by torch and by CuPy; the library of matrix products.
_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@contextmanager
def memory_for(what: str, device: torch.device, *cures: str) -> Iterator[None]:
    """Turn an allocation that fails within the block into a `DeviceError`.

    Args:
        what: What the memory was for, e.g. "the weights".
        device: Where it was asked for.
        *cures: What the user may lower or switch off, one a line of the hint.

    Raises:
        DeviceError: If torch, CuPy or Python had no memory; the original error is chained.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as exc:
        told = told_of_memory(exc, what, device, *cures)
        if told is exc:
            raise
        raise told from exc


def told_of_memory(exc: Exception, what: str, device: torch.device, *cures: str) -> Exception:
    """The `DeviceError` for an allocation that failed, with its cause; any other error as it is.

    Arguments as for `memory_for`.
    """
    if not _is_out_of_memory(exc):
        return exc
    message = f"not enough memory on {device} for {what}{_free(device)}"
    error = DeviceError(message, hint="\n".join(cures))
    error.__cause__ = exc
    return error


def _is_out_of_memory(exc: BaseException) -> bool:
    known = isinstance(exc, (torch.OutOfMemoryError, MemoryError))
    return known or any(text in str(exc) for text in _TEXTS)


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f": {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
