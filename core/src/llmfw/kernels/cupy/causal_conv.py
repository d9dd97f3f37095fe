"""Launcher of causal_conv1d.cu: the op of that name.

Lengths and slots are read on the device, so steps can be captured; inputs that are not as declared
go to the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import pointer
from llmfw.kernels.cupy.recurrent import Spans, in_rows, slots_address, whole
from llmfw.ops import reference_state as reference
from llmfw.ops.kernel import OpContext

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata

THREADS = 128
TILE = 8  # tokens a thread, where requests have more than one
MAX_TAPS = 9


def supports(context: OpContext) -> str | None:
    """Windows that fit registers."""
    taps = context["kernel_size"]
    return None if 2 <= taps <= MAX_TAPS else f"serves sums of 2 to {MAX_TAPS} tokens, not {taps}"


def causal_conv1d(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `causal_conv1d` for one number of channels and length of the sum."""
    channels, taps, dtype = context["channels"], context["kernel_size"], context.dtype
    width = next(n for n in (4, 2, 1) if channels % n == 0)
    tile = max(TILE, taps - 1)
    constants = {"CHANNELS": channels, "TAPS": taps, "THREADS": THREADS}
    widths = {1: width, tile: min(width, 2)}  # channels a thread, by tokens a thread
    launches = {
        size: load(
            "causal_conv1d.cu", context.info.device, dtype, **constants, WIDTH=wide, TILE=size
        ).launcher("causal_conv1d", "PPPPPPPqqii")
        for size, wide in widths.items()
    }
    spans, block = Spans(), (THREADS, 1, 1)

    def call(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        metadata: AttentionMetadata,
        silu: bool = True,
    ) -> torch.Tensor:
        plain = (
            in_rows(width, dtype, x, state)
            and whole(dtype, weight)
            and (bias is None or whole(dtype, bias))
            and state.shape[1:] == (taps - 1, channels)
        )
        if not plain:
            return reference.causal_conv1d(x, weight, bias, state, metadata, silu)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        for span in spans.of(metadata):
            size = 1 if span.longest == 1 else tile
            blocks = -(-channels // (widths[size] * THREADS))
            launches[size](
                (blocks, -(-span.longest // size), span.requests),
                block,
                out.data_ptr(),
                x.data_ptr(),
                weight.data_ptr(),
                pointer(bias),
                state.data_ptr(),
                slots_address(metadata),
                metadata.cu_query_lens.data_ptr(),
                x.stride(0),
                state.stride(0),
                span.first,
                silu,
            )
        return out

    return call
