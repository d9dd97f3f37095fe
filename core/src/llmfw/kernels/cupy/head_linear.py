"""Launcher of head_linear.cu: the op `head_linear`, by an own kernel up to some tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import dense
from llmfw.ops.kernel import OpContext
from llmfw.ops.reference import head_linear as batched

WARPS = 4
MOST_TOKENS = 64  # that the kernel is quicker for than cuBLAS
TOKENS_OF_A_BLOCK = 16  # 8 more cost it 0.8 us, another block reads the weight from L2


def sharers_of(in_features: int) -> int | None:
    """Warps that divide the summed dimension: each takes at most 128 of it, in steps of 32."""
    for sharers in (1, 2, 4):
        if in_features % (32 * sharers) == 0 and in_features // sharers <= 128:
            return sharers
    return None


def supports(context: OpContext) -> str | None:
    """Sizes of whole mma tiles that a block's registers hold."""
    if sharers_of(context["in_features"]) is None:
        return f"{context['in_features']} inputs are not whole steps of 32 for up to four warps"
    if context["out_features"] % 16:
        return f"{context['out_features']} outputs are not a multiple of 16"
    return None


def head_linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `head_linear` for one shape; cuBLAS where there are many tokens."""
    heads, width, outs = context["num_heads"], context["in_features"], context["out_features"]
    sharers = sharers_of(width)
    assert sharers is not None
    launch = load(
        "head_linear.cu",
        context.info.device,
        context.dtype,
        IN=width,
        OUT=outs,
        SHARERS=sharers,
    ).launcher("head_linear", "PPPqqqqqi")
    blocks = -(-outs // (16 * WARPS // sharers))

    def call(
        x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        tokens = x.shape[0]
        if not 0 < tokens <= MOST_TOKENS or weight.stride()[1:] != (width, 1):
            return batched(x, weight, out)
        if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16:
            x = dense(x)
        if out is None:
            out = torch.empty((tokens, heads, outs), dtype=x.dtype, device=x.device)
        launch(
            (blocks, heads, -(-tokens // TOKENS_OF_A_BLOCK)),
            (WARPS * 32, 1, 1),
            out.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            x.stride(0),
            x.stride(1),
            weight.stride(0),
            out.stride(0),
            out.stride(1),
            tokens,
        )
        return out

    def prepare(weight: torch.Tensor) -> torch.Tensor:
        """A copy where the rows of a head are not stored one after the other, or not aligned."""
        rows_in_order = weight.stride()[1:] == (width, 1) and weight.stride(0) % 8 == 0
        return weight if rows_in_order and weight.data_ptr() % 16 == 0 else weight.contiguous()

    call.prepare = prepare  # type: ignore[attr-defined]
    return call
