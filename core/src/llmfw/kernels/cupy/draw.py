"""Launcher of draw_cut.cu and draw_tokens.cu: a seeded draw by temperature, top_k, top_p and min_p,
in one or two launches, without sorting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmfw.kernels.cupy.compile import load, multiprocessors
from llmfw.kernels.cupy.launch import pointer
from llmfw.ops import reference_draw
from llmfw.ops.kernel import OpContext

THREADS = 512
EACH = 16  # tokens of a lane in a warp's step
MIN_BLOCKS = 2  # of a multiprocessor, for which registers are left
BINS = 3072  # of a row's distances
SLOTS = 2048  # of the table in shared memory that holds the masses of all tiles
ROOM = 4096  # listed tokens of a row
BLOCKS_PER_SM = 2
LEAST_ROWS = 32  # that the first workspace is made for


@dataclass(frozen=True)
class _Workspace:
    """Memory of so many rows; tables, counters and totals are zeros between launches."""

    rows: int
    tables: torch.Tensor
    counters: torch.Tensor
    cuts: torch.Tensor
    totals: torch.Tensor
    masses: torch.Tensor
    near: torch.Tensor

    @classmethod
    def of(cls, rows: int, tiles: int, device: torch.device) -> _Workspace:
        def wide(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            rows,
            torch.zeros(rows, BINS, dtype=torch.int32, device=device),
            torch.zeros(rows, 3, dtype=torch.int32, device=device),
            wide(rows, 2),
            wide(rows),
            wide(rows, tiles),
            wide(rows, ROOM),
        )


def supports(context: OpContext) -> str | None:
    """Vocabularies whose tiles fit one table."""
    vocab = context["vocab_size"]
    return f"a vocabulary of {vocab} is too large" if vocab > SLOTS * 32 * EACH else None


def draw_tokens(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `draw_tokens` for one vocabulary; one stream at a time may use it."""
    vocab, device = context["vocab_size"], context.info.device
    width = 16 // context.dtype.itemsize
    while vocab % width:
        width //= 2
    constants = {"VOCAB": vocab, "WIDTH": width, "THREADS": THREADS, "EACH": EACH}
    constants["MIN_BLOCKS"] = MIN_BLOCKS
    cutting = load("draw_cut.cu", device, context.dtype, **constants)
    drawing = load("draw_tokens.cu", device, context.dtype, ROOM=ROOM, **constants)
    cut_rows = cutting.launcher("cut_rows", "PPPPPPq")
    draw = drawing.launcher("draw_tokens", "PPPPPPPPPPPq")
    tiles = -(-vocab // (32 * EACH))
    most = -(-tiles // (THREADS // 32))
    sms = multiprocessors(device)
    space = _Workspace.of(LEAST_ROWS, tiles, device)

    def call(
        logits: torch.Tensor,
        best: torch.Tensor,
        parameters: torch.Tensor,
        cuts: bool,
        tokens: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        nonlocal space
        rows = logits.shape[0]
        aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % width == 0
        if logits.stride(1) != 1 or not aligned or not parameters.is_contiguous():
            return reference_draw.draw_tokens(logits, best, parameters, cuts, tokens, places)
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
        if not rows:
            return out
        if rows > space.rows:
            space = _Workspace.of(1 << (rows - 1).bit_length(), tiles, device)
        grid = (max(1, min(most, BLOCKS_PER_SM * sms // rows)), rows, 1)
        block, stride = (THREADS, 1, 1), logits.stride(0)
        source, greedy, numbers = logits.data_ptr(), best.data_ptr(), parameters.data_ptr()
        counters, cut = space.counters.data_ptr(), space.cuts.data_ptr()
        if cuts:
            tables = space.tables.data_ptr()
            cut_rows(grid, block, source, greedy, numbers, tables, counters, cut, stride)
        draw(
            grid,
            block,
            out.data_ptr(),
            source,
            greedy,
            numbers,
            counters,
            cut,
            space.totals.data_ptr(),
            space.masses.data_ptr(),
            space.near.data_ptr(),
            pointer(tokens),
            pointer(places),
            stride,
        )
        return out

    return call
