"""A device that has too little memory: one error that says what for, and what to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmfw.errors import DeviceError

# torch's allocator of the CPU raises a plain RuntimeError with this text
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


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
        if not _is_out_of_memory(exc):
            raise
        raise DeviceError(
            f"not enough memory on {device} for {what}{_free(device)}",
            hint="\n".join(cures),
        ) from exc


def _is_out_of_memory(exc: BaseException) -> bool:
    known = isinstance(exc, (torch.OutOfMemoryError, MemoryError))
    return known or _CPU_ALLOCATOR in str(exc)


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f": {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
