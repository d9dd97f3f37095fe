"""Launcher of embedding.cu: the op of that name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import dense
from llmfw.ops import reference
from llmfw.ops.kernel import OpContext

EACH = 2  # packs that a lane has under way
BLOCK = 128  # threads


def supports(context: OpContext) -> str | None:
    """A row must be whole 16-byte packs."""
    width, pack = context["embedding_dim"], 16 // context.dtype.itemsize
    return f"rows of {width} values are no multiple of {pack}" if width % pack else None


def launch_shape(packs: int) -> tuple[int, int]:
    """(threads a row, rows a block): short rows share a block."""
    threads = min(BLOCK, 32 * -(-packs // (32 * EACH)))
    return threads, BLOCK // threads


def embedding(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `embedding` for one width of the table."""
    width = context["embedding_dim"]
    packs = width * context.dtype.itemsize // 16
    threads, rows = launch_shape(packs)
    constants = {"HIDDEN": width, "THREADS": threads, "ROWS": rows, "EACH": EACH}
    module = load("embedding.cu", context.info.device, context.dtype, **constants)
    launch = module.launcher("embedding", "PPPqqif")
    block, parts, dtype = (threads, rows, 1), -(-packs // (threads * EACH)), context.dtype

    def call(
        input_ids: torch.Tensor,
        weight: torch.Tensor,
        first: int | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        if weight.dtype is not dtype or weight.data_ptr() % 16 or not weight.is_contiguous():
            return reference.embedding(input_ids, weight, first, scale)
        ids = dense(input_ids.long())
        out = torch.empty((*ids.shape, width), dtype=dtype, device=weight.device)
        if tokens := ids.numel():
            launch(
                (-(-tokens // rows), parts, 1),
                block,
                out.data_ptr(),
                ids.data_ptr(),
                weight.data_ptr(),
                first or 0,
                weight.shape[0],
                tokens,
                1.0 if scale is None else scale,
            )
        return out

    return call
