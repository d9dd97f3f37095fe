"""Checkpoints that dequantise what lies in another one: which there are, and how they are named."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from llmfw.errors import CheckpointError
from llmfw.weights.block_scales import DEFAULT_BLOCK, BlockScaledCheckpoint
from llmfw.weights.checkpoint import Checkpoint
from llmfw.weights.mxfp4 import Mxfp4Checkpoint


@runtime_checkable
class Dequantising(Checkpoint, Protocol):
    """A checkpoint that is read through another one, whose tensors are packed."""

    @property
    def stored(self) -> Checkpoint:
        """The checkpoint as it is."""

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The stored tensors that a tensor is read from."""


def dequantising(format: str, stored: Checkpoint, block: tuple[int, int] | None) -> Dequantising:
    """The reader of a format, over tensors as they are stored.

    Args:
        format: "mxfp4" or "float8".
        stored: The tensors; headers are enough where headers are wanted.
        block: Rows and columns of float8 that share a scale.

    Raises:
        CheckpointError: If the format is another, or the tensors are not of it.
    """
    if format == Mxfp4Checkpoint.format:
        return Mxfp4Checkpoint(stored)
    if format == BlockScaledCheckpoint.format:
        return BlockScaledCheckpoint(stored, block or DEFAULT_BLOCK)
    raise CheckpointError(
        f"{stored.path}: weights packed as {format!r} are not known here",
        hint="upgrade llmfw-core, or convert the model again",
    )
