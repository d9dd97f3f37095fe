"""Tensor maps: where a matrix lies and how it is cut to boxes, for the copies of hopper.cuh."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from llmfw.errors import KernelError
from llmfw.kernels.cupy.launch import TENSOR_MAP_BYTES, driver

SPAN = 64  # values of a row of a box: 128 bytes, the span of the swizzle
TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CU_TENSOR_MAP_DATA_TYPE_...
ALIGNMENT = 64
INTERLEAVE_NONE, SWIZZLE_128B, PROMOTION_256B, FILL_ZEROS = 0, 3, 3, 0


@dataclass(frozen=True)
class Boxes:
    """16-bit values in memory, cut to boxes; what is innermost comes first.

    Args:
        address: Of the first value.
        dtype: Of the values.
        sizes: Values along each dimension.
        strides: Bytes from one to the next along each dimension but the first.
        box: A box's values along each dimension, SPAN along the first.
    """

    address: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int, rows: int, columns: int, dtype: torch.dtype, box_rows: int, whole: bool = False
) -> bytes:
    """The map of a row-major matrix and its boxes of `box_rows` rows and SPAN values.

    With `whole`, a box has all spans of its rows, one span's rows after another's; columns are then
    a multiple of SPAN. The map holds the address and sizes alone, so that it is good for whoever
    lies there.
    """
    if not whole:
        sizes: tuple[int, ...] = (columns, rows)
        return encode(Boxes(address, dtype, sizes, (columns * 2,), (SPAN, box_rows)))
    spans = columns // SPAN
    sizes, strides = (SPAN, rows, spans), (columns * 2, SPAN * 2)
    return encode(Boxes(address, dtype, sizes, strides, (SPAN, box_rows, spans)))


@functools.lru_cache(maxsize=4096)
def cache_map(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    box_rows: int,
) -> bytes:
    """The map of K or V [blocks, block_size, kv_heads, dim] and boxes of `box_rows` keys of a head.

    A head's values and the heads of a key lie one after the other, dim is a multiple of SPAN. The
    coordinates are columns within a span, the key in its block, the span, and the block.
    """
    blocks, block_size, kv_heads, dim = shape
    sizes = (SPAN, block_size, kv_heads * dim // SPAN, blocks)
    steps = (strides[1] * 2, SPAN * 2, strides[0] * 2)
    return encode(Boxes(address, dtype, sizes, steps, (SPAN, box_rows, dim // SPAN, 1)))


def encode(boxes: Boxes) -> bytes:
    """The map's bytes, to be given to a kernel by value.

    Raises:
        KernelError: If the driver refuses, as it does addresses and rows not aligned to 16 bytes.
    """
    memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + ALIGNMENT)
    start = -ctypes.addressof(memory) % ALIGNMENT
    rank = len(boxes.sizes)
    code = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory) + start),
        TYPES[boxes.dtype],
        rank,
        ctypes.c_void_p(boxes.address),
        (ctypes.c_uint64 * rank)(*boxes.sizes),
        (ctypes.c_uint64 * (rank - 1))(*boxes.strides),
        (ctypes.c_uint32 * rank)(*boxes.box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        INTERLEAVE_NONE,
        SWIZZLE_128B,
        PROMOTION_256B,
        FILL_ZEROS,
    )
    if code:
        raise KernelError(f"no tensor map for {boxes}: error {code}")
    return memory.raw[start : start + TENSOR_MAP_BYTES]
