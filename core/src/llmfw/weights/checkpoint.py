"""What a checkpoint is: named tensors whose headers are read first and values later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's header.

    Args:
        shape: Its shape as `Checkpoint.tensor` returns it.
        dtype: Its dtype as `Checkpoint.tensor` returns it (a quantised GGUF tensor: float32,
            dequantised).
        file: Name of the file that holds it ("" for a checkpoint in memory).
        nbytes: Bytes it takes in that file.
        stored: How it is stored, for display: "BF16", "Q4_1", ...
        offset: Where its data begin in the file, in bytes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    nbytes: int
    stored: str = ""
    offset: int = 0

    @property
    def is_packed(self) -> bool:
        """Whether it is stored in a form of its own, and is dequantised when it is read."""
        return self.nbytes != torch.Size(self.shape).numel() * self.dtype.itemsize


@runtime_checkable
class Checkpoint(Protocol):
    """Named tensors, read lazily.

    Opening one reads headers only. `tensor` and `slice` return CPU tensors that the caller must not
    write to (they may be mapped from the file); both may be called from several threads. Every
    failure to read is a `CheckpointError` that names file and tensor.
    """

    @property
    def format(self) -> str:
        """ "safetensors", "gguf", "memory", or what a wrapper dequantises: "float8", "mxfp4"."""

    @property
    def path(self) -> Path:
        """The directory or file it was opened from."""

    def names(self) -> Sequence[str]:
        """All tensors' names, in the order of the files."""

    def info(self, name: str) -> TensorInfo:
        """The header of one tensor."""

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of it along `dim`, read as sparingly as the format allows."""


@runtime_checkable
class ReadsInto(Checkpoint, Protocol):
    """A checkpoint that can also read straight into a tensor, without a copy in between."""

    def reads_into(self, name: str, out: torch.Tensor) -> bool:
        """Whether `read_into` can fill `out` with rows of that tensor."""

    def read_into(self, name: str, out: torch.Tensor, start: int = 0) -> None:
        """Fills `out` with rows `start` and on of a tensor."""
