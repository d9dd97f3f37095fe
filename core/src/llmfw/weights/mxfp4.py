"""MXFP4: four-bit floats in blocks of 32 that share a power of two, dequantised when they are read.

An element is E2M1 (sign, two bits of exponent, one of mantissa), a block's scale is E8M0: 2 to the
power of a byte less 127, and no number where the byte is 255. Source: OCP Microscaling Formats (MX)
Specification 1.0.

In a checkpoint, X of shape [..., in, out] is stored as `X_blocks` uint8 [..., out, in / 32, 16],
two elements a byte with the first in the low bits, and `X_scales` uint8 [..., out, in / 32].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llmfw.errors import CheckpointError
from llmfw.weights.checkpoint import Checkpoint, TensorInfo

BLOCK = 32
BLOCKS, SCALES = "_blocks", "_scales"
# The sixteen values of E2M1, by their four bits.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))


def dequantise_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of MXFP4 blocks.

    Args:
        blocks: uint8 [..., n, 16].
        scales: uint8 [..., n].

    Returns:
        bfloat16 [..., n * 32], which holds every value exactly.
    """
    values = torch.tensor(VALUES, dtype=torch.bfloat16)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1)  # [256, 2], by byte
    powers = torch.exp2(torch.arange(256.0) - 127)
    powers[255] = torch.nan
    elements = pairs.view(torch.int32).flatten()[blocks.int()].view(torch.bfloat16)  # [..., n, 32]
    elements *= powers.to(torch.bfloat16)[scales.int()][..., None]
    return elements.flatten(-2)


def has_mxfp4(checkpoint: Checkpoint) -> bool:
    """Whether any tensor is stored as blocks and scales."""
    names = set(checkpoint.names())
    stems = (name.removesuffix(BLOCKS) for name in names if name.endswith(BLOCKS))
    return any(f"{stem}{SCALES}" in names for stem in stems)


class Mxfp4Checkpoint:
    """A checkpoint whose MXFP4 tensors are read as bfloat16, under their names without an ending.

    Args:
        stored: The checkpoint as it is.

    Raises:
        CheckpointError: If blocks or scales stand alone, or do not have each other's shape.
    """

    format = "mxfp4"

    def __init__(self, stored: Checkpoint) -> None:
        self.path: Path = stored.path
        self._stored = stored
        names = stored.names()
        endings = {ending: _stems(names, ending) for ending in (BLOCKS, SCALES)}
        for ending, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
            for stem in sorted(endings[ending] - endings[other]):
                raise CheckpointError(
                    f"{self.path}: {stem}{ending} has no {stem}{other} beside it",
                    hint="download the checkpoint again, all its files",
                    tensor=f"{stem}{ending}",
                )
        self._quantised = endings[BLOCKS]
        for stem in self._quantised:
            self._check(stem)
        scales = {f"{stem}{SCALES}" for stem in self._quantised}
        self._names = tuple(self._shown(name) for name in names if name not in scales)

    def _shown(self, name: str) -> str:
        stem = name.removesuffix(BLOCKS)
        return stem if stem in self._quantised else name

    def _check(self, stem: str) -> None:
        blocks, scales = (self._stored.info(stem + ending) for ending in (BLOCKS, SCALES))
        whole = blocks.dtype == scales.dtype == torch.uint8
        if whole and len(scales.shape) > 1 and blocks.shape == (*scales.shape, BLOCK // 2):
            return
        raise CheckpointError(
            f"{self.path}: {stem}{BLOCKS} {list(blocks.shape)} and {stem}{SCALES} "
            f"{list(scales.shape)} are no blocks of {BLOCK} four-bit numbers and their scales",
            tensor=f"{stem}{BLOCKS}",
        )

    @property
    def stored(self) -> Checkpoint:
        """The checkpoint as it is."""
        return self._stored

    def names(self) -> Sequence[str]:
        """All names; of blocks and scales the one that they share."""
        return self._names

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The stored tensors that a tensor is read from."""
        return (name + BLOCKS, name + SCALES) if name in self._quantised else (name,)

    def info(self, name: str) -> TensorInfo:
        """The header of one tensor; a quantised one's dtype is bfloat16."""
        if name not in self._quantised:
            return self._stored.info(name)
        blocks, scales = (self._stored.info(name + ending) for ending in (BLOCKS, SCALES))
        *lead, rows, count = scales.shape
        return replace(
            blocks,
            shape=(*lead, count * BLOCK, rows),
            dtype=torch.bfloat16,
            nbytes=blocks.nbytes + scales.nbytes,
            stored="MXFP4",
        )

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        if name not in self._quantised:
            return self._stored.tensor(name)
        blocks, scales = (self._stored.tensor(name + ending) for ending in (BLOCKS, SCALES))
        return dequantise_mxfp4(blocks, scales).transpose(-2, -1)

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Part of a tensor; along any dimension but the second to last, only that is read."""
        if name not in self._quantised:
            return self._stored.slice(name, dim, start, stop)
        last = len(self.info(name).shape) - 1
        if dim == last - 1:
            return self.tensor(name).narrow(dim, start, stop - start)
        stored_dim = last - 1 if dim == last else dim
        blocks, scales = (
            self._stored.slice(name + ending, stored_dim, start, stop)
            for ending in (BLOCKS, SCALES)
        )
        return dequantise_mxfp4(blocks, scales).transpose(-2, -1)


def _stems(names: Sequence[str], ending: str) -> set[str]:
    return {name.removesuffix(ending) for name in names if name.endswith(ending)}
