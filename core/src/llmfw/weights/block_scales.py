"""Checkpoints of float8 weights with a scale for each block: dequantised when they are read.

A weight `X.weight` [out, in] in float8 has beside it `X.weight_scale_inv`, float32 with one number
for each block of (128, 128), by which its block is multiplied (arXiv:2412.19437, 3.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmfw.errors import CheckpointError
from llmfw.weights.checkpoint import Checkpoint, TensorInfo

SCALES = "_scale_inv"
DEFAULT_BLOCK = (128, 128)


def has_block_scales(checkpoint: Checkpoint) -> bool:
    """Whether any weight has scales beside it."""
    return any(name.endswith(f".weight{SCALES}") for name in checkpoint.names())


def block_size_in(raw: Mapping[str, Any]) -> tuple[int, int]:
    """The size of a block, as a raw config.json says it.

    Raises:
        CheckpointError: If it says something else.
    """
    quantised = raw.get("quantization_config")
    said = quantised.get("weight_block_size") if isinstance(quantised, Mapping) else None
    said = DEFAULT_BLOCK if said is None else said
    whole = isinstance(said, Sequence) and all(isinstance(n, int) and n > 0 for n in said)
    if not whole or len(said) != 2:
        raise CheckpointError(f"config.json: weight_block_size {said!r} is no size of a block")
    return (said[0], said[1])


class BlockScaledCheckpoint:
    """A checkpoint whose float8 weights are read as float32; their scales are no tensors of it.

    Args:
        stored: The checkpoint as it is.
        block: Rows and columns that share a scale.

    Raises:
        CheckpointError: If scales have no weight, or another shape than its blocks.
    """

    format = "float8"

    def __init__(self, stored: Checkpoint, block: tuple[int, int] = DEFAULT_BLOCK) -> None:
        self.path: Path = stored.path
        self._stored = stored
        self.block = block
        names = set(stored.names())
        self._scaled = {name for name in names if f"{name}{SCALES}" in names}
        self._names = tuple(
            name
            for name in stored.names()
            if name in self._scaled or name.removesuffix(SCALES) not in self._scaled
        )
        lone = [name for name in self._names if name.endswith(f".weight{SCALES}")]
        if lone:
            raise CheckpointError(
                f"{self.path}: {lone[0]} has no weight beside it",
                hint="download the checkpoint again, all its files",
                tensor=lone[0],
            )
        for name in self._scaled:
            self._check(name)

    def _check(self, name: str) -> None:
        weight, scales = self._stored.info(name), self._stored.info(f"{name}{SCALES}")
        if len(weight.shape) == 2:
            blocks = tuple(-(-n // b) for n, b in zip(weight.shape, self.block, strict=True))
            if scales.shape == blocks:
                return
        raise CheckpointError(
            f"{self.path}: {name}{SCALES} has shape {list(scales.shape)}, which are not the blocks "
            f"of {list(self.block)} of a weight {list(weight.shape)}",
            hint="config.json says the size of a block: quantization_config.weight_block_size",
            tensor=name,
        )

    @property
    def stored(self) -> Checkpoint:
        """The checkpoint as it is."""
        return self._stored

    def names(self) -> Sequence[str]:
        """All names but those of scales."""
        return self._names

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The stored tensors that a tensor is read from."""
        return (name, f"{name}{SCALES}") if name in self._scaled else (name,)

    def info(self, name: str) -> TensorInfo:
        """The header of one tensor; a scaled weight's dtype is float32."""
        info = self._stored.info(name)
        if name not in self._scaled:
            return info
        stored = info.stored or str(info.dtype).removeprefix("torch.")
        return replace(info, dtype=torch.float32, stored=f"{stored}, scaled by blocks")

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        if name not in self._scaled:
            return self._stored.tensor(name)
        rows, columns = self._stored.info(name).shape
        return self._scale(name, self._stored.tensor(name), (0, rows), (0, columns))

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Part of a tensor; only that part of a weight is read."""
        part = self._stored.slice(name, dim, start, stop)
        if name not in self._scaled:
            return part
        rows, columns = part.shape
        if dim == 0:
            return self._scale(name, part, (start, stop), (0, columns))
        return self._scale(name, part, (0, rows), (start, stop))

    def _scale(
        self, name: str, part: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]
    ) -> torch.Tensor:
        """A weight's part, where it lies in the whole, times the scales of its blocks."""
        scales = self._stored.tensor(f"{name}{SCALES}").float()
        of_columns = scales[:, torch.arange(*columns) // self.block[1]]  # [row blocks, columns]
        height, (first, stop) = self.block[0], rows
        value = part.float()
        for block in range(first // height, -(-stop // height)):
            start, end = max(block * height, first), min((block + 1) * height, stop)
            value[start - first : end - first].mul_(of_columns[block])
        return value
