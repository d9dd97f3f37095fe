"""From files to another device through page-locked buffers; reads and copies overlap.

`LLMFW_PINNED_LOADING=off` reads each tensor on the CPU and copies it whole instead.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from llmfw.errors import UsageError
from llmfw.weights.checkpoint import ReadsInto, TensorInfo

VARIABLE = "LLMFW_PINNED_LOADING"
STAGE_BYTES = 16 << 20  # of each of a thread's two buffers


def pinned_loading() -> bool:
    """Whether weights for another device go through page-locked buffers.

    Raises:
        UsageError: If `LLMFW_PINNED_LOADING` is neither "on" nor "off".
    """
    value = os.environ.get(VARIABLE, "on")
    if value not in ("on", "off"):
        raise UsageError(f"{VARIABLE} is {value!r}", hint="use on or off")
    return value == "on"


class StagedCheckpoint:
    """A checkpoint whose tensors can be read straight into parameters on a device.

    Each reading thread has two buffers: while one is copied to the device, the next piece of the
    file is read into the other. A dtype that differs is converted on the device.

    Args:
        inner: A checkpoint that reads into CPU tensors.
        device: Where parameters are.
        stage_bytes: Size of a buffer.
    """

    def __init__(
        self, inner: ReadsInto, device: torch.device, stage_bytes: int = STAGE_BYTES
    ) -> None:
        self._inner = inner
        self._device = device
        self._bytes = stage_bytes
        self._local = threading.local()

    @property
    def format(self) -> str:
        """The inner checkpoint's."""
        return self._inner.format

    @property
    def path(self) -> Path:
        """The inner checkpoint's."""
        return self._inner.path

    def names(self) -> Sequence[str]:
        """The inner checkpoint's."""
        return self._inner.names()

    def info(self, name: str) -> TensorInfo:
        """The inner checkpoint's."""
        return self._inner.info(name)

    def tensor(self, name: str) -> torch.Tensor:
        """The inner checkpoint's, on the CPU."""
        return self._inner.tensor(name)

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """The inner checkpoint's, on the CPU."""
        return self._inner.slice(name, dim, start, stop)

    def reads_into(self, name: str, out: torch.Tensor) -> bool:
        """Whether `read_into` serves: out is there, without gaps, and a row fits a buffer."""
        info = self.info(name)
        if out.device != self._device or not out.is_contiguous() or out.numel() == 0:
            return False
        if not info.shape or out.dim() != len(info.shape):
            return False
        return info.nbytes // info.shape[0] <= self._bytes

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> None:
        """Fills `out` with rows `start` and on; the copies may still be under way at return."""
        info = self.info(name)
        stages = self._stages()
        rows = self._bytes // (info.nbytes // info.shape[0])
        for first in range(0, out.shape[0], rows):
            count = min(rows, out.shape[0] - first)
            stage = stages[first // rows % 2]
            piece = stage.piece((count, *info.shape[1:]), info.dtype)
            self._inner.read_into(name, piece, start + first)
            stage.copy_to(out.narrow(0, first, count), piece)

    def _stages(self) -> tuple[_Stage, _Stage]:
        if not hasattr(self._local, "stages"):
            self._local.stages = tuple(_Stage(self._device, self._bytes) for _ in range(2))
        return self._local.stages  # type: ignore[no-any-return]


class _Stage:
    """A buffer that is not written to before the copy out of it is done."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        on_cuda = device.type == "cuda"
        self._buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_cuda)
        self._copied = torch.cuda.Event() if on_cuda else None

    def piece(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The buffer's beginning as a tensor, once it is free."""
        if self._copied is not None:
            self._copied.synchronize()  # returns at once before the first record
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        return self._buffer[:nbytes].view(dtype).view(shape)

    def copy_to(self, out: torch.Tensor, piece: torch.Tensor) -> None:
        """Start the copy; a conversion runs on the device, after it."""
        if out.dtype != piece.dtype:
            piece = piece.to(out.device, non_blocking=True)
        out.copy_(piece, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(out.device))
