"""Launchers of norm.cu: rms_norm, add_rms_norm, layer_norm, gated_rms_norm."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy.compile import Module, load
from llmfw.kernels.cupy.launch import Grid, dense, pointer
from llmfw.ops import reference, reference_state
from llmfw.ops.kernel import OpContext

MAX_THREADS = 1024
MAX_PACKS_PER_LANE = 4


def supports(context: OpContext) -> str | None:
    """Rows must be whole 16-byte packs that fit one block's registers."""
    hidden, pack = _width(context), 16 // context.dtype.itemsize
    if hidden % pack:
        return f"rows of {hidden} values are no multiple of {pack}"
    if hidden > pack * MAX_THREADS * MAX_PACKS_PER_LANE:
        return f"rows of {hidden} values are too large for one block"
    return None


def _width(context: OpContext) -> int:
    """Values that one normalisation takes."""
    return context["hidden_size"] // context.shape.get("num_groups", 1)


def launch_shape(hidden: int, itemsize: int) -> tuple[int, int]:
    """(threads a row, rows a block): two packs a thread, small rows by single warps."""
    packs = hidden * itemsize // 16
    if packs <= 64:
        return 32, 4
    threads = 32 * -(-packs // 64)
    return min(max(threads, 128 if packs >= 128 else 64), MAX_THREADS), 1


def _module(context: OpContext) -> tuple[Module, int, int]:
    hidden = _width(context)
    threads, rows = launch_shape(hidden, context.dtype.itemsize)
    return (
        load(
            "norm.cu", context.info.device, context.dtype, HIDDEN=hidden, THREADS=threads, ROWS=rows
        ),
        threads,
        rows,
    )


def rms_norm(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `rms_norm` for one hidden size."""
    module, threads, block_rows = _module(context)
    launch = module.launcher("rms_norm", "PPPiff")
    hidden, block = context["hidden_size"], (threads, block_rows, 1)

    def call(
        x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
    ) -> torch.Tensor:
        if weight.dtype is not x.dtype:
            return reference.rms_norm(x, weight, eps, offset)
        x = dense(x)
        out = torch.empty_like(x)
        if rows := x.numel() // hidden:
            grid = (-(-rows // block_rows), 1, 1)
            launch(grid, block, out.data_ptr(), x.data_ptr(), weight.data_ptr(), rows, eps, offset)
        return out

    return call


def add_rms_norm(context: OpContext) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The op `add_rms_norm` for one hidden size; it overwrites both inputs and returns them."""
    module, threads, block_rows = _module(context)
    launch = module.launcher("add_rms_norm", "PPPiff")
    launch_wide = module.launcher("add_rms_norm_wide", "PPPiff")
    hidden, block = context["hidden_size"], (threads, block_rows, 1)

    def call(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if weight.dtype is not x.dtype or residual.dtype not in (x.dtype, torch.float32):
            return reference.add_rms_norm(x, residual, weight, eps, offset)
        x, residual = dense(x), dense(residual)
        if rows := x.numel() // hidden:
            grid: Grid = (-(-rows // block_rows), 1, 1)
            addresses = x.data_ptr(), residual.data_ptr(), weight.data_ptr()
            add = launch if residual.dtype is x.dtype else launch_wide
            add(grid, block, *addresses, rows, eps, offset)
        return x, residual

    return call


def layer_norm(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `layer_norm` for one hidden size."""
    module, threads, block_rows = _module(context)
    launch = module.launcher("layer_norm", "PPPPif")
    hidden, block = context["hidden_size"], (threads, block_rows, 1)

    def call(
        x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        if any(part is not None and part.dtype is not x.dtype for part in (weight, bias)):
            return reference.layer_norm(x, weight, bias, eps)
        x = dense(x)
        out = torch.empty_like(x)
        if rows := x.numel() // hidden:
            grid = (-(-rows // block_rows), 1, 1)
            launch(
                grid, block, out.data_ptr(), x.data_ptr(), pointer(weight), pointer(bias), rows, eps
            )
        return out

    return call


def gated_rms_norm(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `gated_rms_norm` for one hidden size and number of groups."""
    module, threads, block_rows = _module(context)
    launch = module.launcher("gated_rms_norm", "PPPPifqi")
    hidden, groups, block = context["hidden_size"], context["num_groups"], (threads, block_rows, 1)

    def call(
        x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, groups: int = groups
    ) -> torch.Tensor:
        if weight.dtype is not x.dtype or gate.dtype is not x.dtype:
            return reference_state.gated_rms_norm(x, gate, weight, eps, groups)
        x = dense(x)
        if gate.stride(-1) != 1 or (gate.stride(0) * gate.itemsize | gate.data_ptr()) % 16:
            gate = dense(gate)
        out = torch.empty_like(x)
        if rows := x.numel() // hidden * groups:
            launch(
                (-(-rows // block_rows), 1, 1),
                block,
                out.data_ptr(),
                x.data_ptr(),
                gate.data_ptr(),
                weight.data_ptr(),
                rows,
                eps,
                gate.stride(0),
                groups,
            )
        return out

    return call
