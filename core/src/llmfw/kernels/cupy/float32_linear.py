"""Launcher of float32_linear.cu: the op of that name, by the library for many rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy.compile import compile_ahead, load
from llmfw.kernels.cupy.launch import Launcher, pointer
from llmfw.ops import reference
from llmfw.ops.kernel import OpContext

THREADS = 256
# Rows and outputs of a block, by the greatest number of rows that it serves.
TILES = ((1, (1, 1)), (4, (4, 2)), (128, (8, 4)))


def supports(context: OpContext) -> str | None:
    """A row of x must be whole 16-byte packs."""
    size, pack = context["in_features"], 16 // context.dtype.itemsize
    return f"{size} inputs are not a multiple of {pack}" if size % pack else None


def constants_of(context: OpContext, tile: tuple[int, int]) -> dict[str, int]:
    """The source's compile-time constants."""
    return {"IN": context["in_features"], "ROWS": tile[0], "OUTPUTS": tile[1]}


def float32_linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `float32_linear` for one weight shape."""
    device, dtype, size = context.info.device, context.dtype, context["in_features"]
    uses = [("float32_linear.cu", constants_of(context, tile)) for _, tile in TILES]
    if device.type == "cuda":
        compile_ahead(device, dtype, uses)
    launchers: list[tuple[int, int, int, Launcher]] = []
    for (most, tile), (source, constants) in zip(TILES, uses, strict=True):
        module = load(source, device, dtype, **constants)
        launchers.append((most, *tile, module.launcher("float32_linear", "PPPPii")))

    def call(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows, outputs = x.numel() // size, weight.shape[0]
        aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0
        if not aligned or x.dtype is not dtype or not x.is_contiguous() or rows > TILES[-1][0]:
            return reference.float32_linear(x, weight, bias)
        out = torch.empty((*x.shape[:-1], outputs), dtype=torch.float32, device=x.device)
        if rows:
            _, made, wide, launch = next(each for each in launchers if rows <= each[0])
            launch(
                (-(-rows // made), -(-outputs // wide), 1),
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
