"""Launchers of selective_scan.cu and ssd_scan.cu: the ops of these names.

Each has a kernel for requests of one token and one for any number of them. Lengths and slots are
read on the device, so steps can be captured; inputs that are not as declared go to the references.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.recurrent import Spans, in_rows, slots_address, whole
from llmfw.ops import reference_state as reference
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata
    from llmfw.kernels.cupy.launch import Grid, Launcher

WARP = 32
SELECTIVE_THREADS = 128
SELECTIVE_ROWS = 2  # most channels of a lane where a request has one token
SSD_ROWS, SSD_WARPS = 4, 4
MAX_STATE = 512


def supports(context: OpContext) -> str | None:
    """Rows of the state that are whole packs of four numbers, and groups of equal size."""
    size = context["state_size"]
    if size % 4 or size > MAX_STATE:
        return f"serves states of up to {MAX_STATE} numbers a row, a multiple of 4, not {size}"
    shape = context.shape
    if context.op == "ssd_scan" and shape["num_heads"] % shape["num_groups"]:
        return f"{shape['num_heads']} heads are no multiple of {shape['num_groups']} groups"
    return None


def selective_scan(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `selective_scan` for one number of channels and size of their state."""
    channels, size, dtype = context["channels"], context["state_size"], context.dtype
    constants = {"CHANNELS": channels, "STATE": size, "THREADS": SELECTIVE_THREADS}
    constants["MOST_ROWS"] = SELECTIVE_ROWS
    module = load("selective_scan.cu", context.info.device, dtype, **constants)
    one = module.launcher("selective_update", "PPPPPPPPPPPqqqqqqii")
    many = module.launcher("selective_scan", "PPPPPPPPPPPPqqqqqqi")
    lanes = lanes_for(size)
    blocks = -(-channels * lanes // SELECTIVE_THREADS)
    update_blocks = -(-channels * lanes // (SELECTIVE_THREADS * min(lanes, SELECTIVE_ROWS)))
    spans, block = Spans(), (SELECTIVE_THREADS, 1, 1)

    def call(
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor,
        z: torch.Tensor,
        dt_bias: torch.Tensor,
        state: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        plain = (
            in_rows(1, dtype, x, dt, z)
            and in_rows(4, dtype, b, c)
            and in_rows(4, torch.float32, state)
            and whole(torch.float32, a, d, dt_bias)
            and state.shape[1:] == (channels, size)
        )
        if not plain:
            return reference.selective_scan(x, dt, a, b, c, d, z, dt_bias, state, metadata)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        addresses = [part.data_ptr() for part in (out, x, dt, a, b, c, d, z, dt_bias, state)]
        strides = [part.stride(0) for part in (x, dt, b, c, z, state)]
        for span in spans.of(metadata):
            arguments = (*addresses, slots_address(metadata))
            if span.longest == 1:
                grid = (update_blocks, span.requests, 1)
                one(grid, block, *arguments, *strides, span.first, span.first_token)
            else:
                ends, grid = metadata.cu_query_lens.data_ptr(), (blocks, span.requests, 1)
                many(grid, block, *arguments, ends, *strides, span.first)
        return out

    return call


class Chunks(NamedTuple):
    """Another kernel for prompts: launcher, blocks a request, block, fewest tokens it takes."""

    launch: Launcher
    blocks: int
    block: Grid
    fewest: int


def ssd_scan(context: OpContext, chunks: Chunks | None = None) -> Callable[..., torch.Tensor]:
    """The op `ssd_scan` for one layout of heads."""
    heads, head_dim, dtype = context["num_heads"], context["head_dim"], context.dtype
    groups, size = context["num_groups"], context["state_size"]
    rows, warps = ssd_shape(head_dim, size)
    module = load(
        "ssd_scan.cu",
        context.info.device,
        dtype,
        HEADS=heads,
        HEAD_DIM=head_dim,
        GROUPS=groups,
        STATE=size,
        ROWS=rows,
        WARPS=warps,
    )
    one = module.launcher("ssd_update", "PPPPPPPPPPqqqqqffii")
    many = module.launcher("ssd_scan", "PPPPPPPPPPPqqqqqffi")
    blocks = heads * -(-head_dim // (rows * warps * (WARP // lanes_for(size))))
    spans, block = Spans(), (WARP * warps, 1, 1)

    def call(
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        d: torch.Tensor,
        dt_bias: torch.Tensor,
        dt_limit: tuple[float, float],
        state: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        plain = (
            in_rows(1, dtype, x, dt)
            and in_rows(4, dtype, b, c)
            and in_rows(4, torch.float32, state)
            and whole(torch.float32, a, d, dt_bias)
            and x.shape[1:] == (heads, head_dim)
            and state.shape[1:] == (heads, head_dim, size)
        )
        if not plain:
            return reference.ssd_scan(x, dt, a, b, c, d, dt_bias, dt_limit, state, metadata)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        addresses = [part.data_ptr() for part in (out, x, dt, a, b, c, d, dt_bias, state)]
        strides = [part.stride(0) for part in (x, dt, b, c, state)]
        for span in spans.of(metadata):
            grid = (blocks, span.requests, 1)
            arguments = (*addresses, slots_address(metadata))
            if span.longest == 1:
                one(grid, block, *arguments, *strides, *dt_limit, span.first, span.first_token)
                continue
            rest = metadata.cu_query_lens.data_ptr(), *strides, *dt_limit, span.first
            if chunks is not None and span.longest >= chunks.fewest and in_rows(8, dtype, x, b, c):
                chunks.launch((chunks.blocks, span.requests, 1), chunks.block, *arguments, *rest)
            else:
                many(grid, block, *arguments, *rest)
        return out

    return call


def lanes_for(size: int) -> int:
    """Lanes of a warp that share a row of the state, as common.cuh's function of that name."""
    quads = size // 4
    return min(WARP, quads & -quads)


def ssd_shape(head_dim: int, size: int) -> tuple[int, int]:
    """(rows of a head a lane, warps a block): no more than a head has."""
    each, rows, warps = WARP // lanes_for(size), SSD_ROWS, SSD_WARPS
    while rows > 1 and rows * each > head_dim:
        rows //= 2
    while warps > 1 and rows * each * warps > head_dim:
        warps //= 2
    return rows, warps
