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
class Matrix:
    """A row-major matrix of 16-bit values and its boxes of `box_rows` rows and SPAN values.

    With `whole`, a box has all spans of its rows, one span's rows after another's; columns are then
    a multiple of SPAN.
    """

    address: int
    rows: int
    columns: int
    dtype: torch.dtype
    box_rows: int
    whole: bool = False


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int, rows: int, columns: int, dtype: torch.dtype, box_rows: int, whole: bool = False
) -> bytes:
    """The map's bytes; it holds the address and sizes alone, so that it is good for whoever lies
    there."""
    return encode(Matrix(address, rows, columns, dtype, box_rows, whole))


def encode(matrix: Matrix) -> bytes:
    """The map's bytes, to be given to a kernel by value.

    Raises:
        KernelError: If the driver refuses, as it does addresses and rows not aligned to 16 bytes.
    """
    memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES + ALIGNMENT)
    start = -ctypes.addressof(memory) % ALIGNMENT
    row_bytes, spans = matrix.columns * 2, matrix.columns // SPAN
    sizes: tuple[int, ...] = (matrix.columns, matrix.rows)
    strides: tuple[int, ...] = (row_bytes,)
    box: tuple[int, ...] = (SPAN, matrix.box_rows)
    if matrix.whole:
        sizes, strides, box = (SPAN, matrix.rows, spans), (row_bytes, SPAN * 2), (*box, spans)
    rank = len(sizes)
    code = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory) + start),
        TYPES[matrix.dtype],
        rank,
        ctypes.c_void_p(matrix.address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        INTERLEAVE_NONE,
        SWIZZLE_128B,
        PROMOTION_256B,
        FILL_ZEROS,
    )
    if code:
        raise KernelError(f"no tensor map for {matrix}: error {code}")
    return memory.raw[start : start + TENSOR_MAP_BYTES]
