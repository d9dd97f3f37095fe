"""Launcher of float32_linear.cu: the op of that name, by the library where there is much to do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy.compile import compile_ahead, load, multiprocessors
from llmfw.kernels.cupy.launch import pointer
from llmfw.ops import reference
from llmfw.ops.kernel import OpContext

THREADS = 256
TILES = ((16, 8), (16, 4), (8, 4), (4, 4), (2, 1), (1, 1))  # rows and outputs of a block
LEAST_SHARE = 0.6  # of the multiprocessors that a tile has to give a block
MOST_PRODUCTS = 1 << 28  # from which the library is quicker


def supports(context: OpContext) -> str | None:
    """A row of x must be whole 16-byte packs."""
    size, pack = context["in_features"], 16 // context.dtype.itemsize
    return f"{size} inputs are not a multiple of {pack}" if size % pack else None


def blocks_of(tile: tuple[int, int], rows: int, outputs: int) -> tuple[int, int]:
    """Blocks along rows and along outputs."""
    return -(-rows // tile[0]), -(-outputs // tile[1])


def tile_for(rows: int, outputs: int, multiprocessors: int) -> int:
    """The largest tile that still gives most multiprocessors a block, else the smallest."""
    for number, tile in enumerate(TILES):
        down, across = blocks_of(tile, rows, outputs)
        if down * across >= LEAST_SHARE * multiprocessors:
            return number
    return len(TILES) - 1


def float32_linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `float32_linear` for one weight shape."""
    device, dtype, size = context.info.device, context.dtype, context["in_features"]
    outputs = context["out_features"]
    sms = multiprocessors(device)
    uses = [
        ("float32_linear.cu", {"IN": size, "ROWS": rows, "OUTPUTS": made}) for rows, made in TILES
    ]
    if device.type == "cuda":
        compile_ahead(device, dtype, uses)
    launches = [
        load(source, device, dtype, **constants).launcher("float32_linear", "PPPPii")
        for source, constants in uses
    ]
    most_rows = MOST_PRODUCTS // (size * outputs)

    def call(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = x.numel() // size
        aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0
        if not aligned or x.dtype is not dtype or not x.is_contiguous() or rows > most_rows:
            return reference.float32_linear(x, weight, bias)
        out = torch.empty((*x.shape[:-1], outputs), dtype=torch.float32, device=x.device)
        if rows:
            number = tile_for(rows, outputs, sms)
            launches[number](
                (*blocks_of(TILES[number], rows, outputs), 1),
                (THREADS, 1, 1),
                out.data_ptr(),
                x.data_ptr(),
                weight.data_ptr(),
                pointer(bias),
                rows,
                outputs,
            )
        return out

    return call
