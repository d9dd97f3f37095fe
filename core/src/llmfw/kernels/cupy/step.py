"""Launchers of argmax.cu and prepare_decode.cu: what a decode step does around the model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy.compile import load, multiprocessors
from llmfw.kernels.cupy.launch import pointer
from llmfw.ops import reference_step
from llmfw.ops.kernel import OpContext

ARGMAX_THREADS = 512
PREPARE_THREADS = 128
MAX_ROWS = 4096
BLOCKS_PER_SM = 2


def supports(context: OpContext) -> str | None:
    """Everything."""
    return None


def argmax(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `argmax` for one vocabulary. Its launches must follow each other on one stream."""
    vocab, device = context["vocab_size"], context.info.device
    width = 16 // context.dtype.itemsize
    while vocab % width:
        width //= 2
    constants = {"VOCAB": vocab, "WIDTH": width, "THREADS": ARGMAX_THREADS}
    launch = load("argmax.cu", device, context.dtype, **constants).launcher("argmax", "PPPPPPq")
    most = -(-vocab // (width * ARGMAX_THREADS))
    sms = multiprocessors(device)
    best = torch.zeros(MAX_ROWS, dtype=torch.int64, device=device)
    counters = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)

    def call(
        logits: torch.Tensor,
        tokens: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = logits.shape[0]
        aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % width == 0
        if rows > MAX_ROWS or logits.stride(1) != 1 or not aligned:
            return reference_step.argmax(logits, tokens, places)
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
        if rows:
            parts = max(1, min(most, BLOCKS_PER_SM * sms // rows))
            launch(
                (parts, rows, 1),
                (ARGMAX_THREADS, 1, 1),
                out.data_ptr(),
                logits.data_ptr(),
                best.data_ptr(),
                counters.data_ptr(),
                pointer(tokens),
                pointer(places),
                logits.stride(0),
            )
        return out

    return call


def prepare_decode(context: OpContext) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The op `prepare_decode`."""
    module = load("prepare_decode.cu", context.info.device, context.dtype, THREADS=PREPARE_THREADS)
    launch = module.launcher("prepare_decode", "PPPPPPPPPPPqqii")

    def call(
        rows: torch.Tensor,
        last: torch.Tensor,
        advance: torch.Tensor,
        tokens: torch.Tensor,
        blocks: torch.Tensor,
        max_model_len: int,
        block_size: int,
    ) -> tuple[torch.Tensor, ...]:
        count, width = rows.shape[0], blocks.shape[1]
        wide = torch.empty((4, count), dtype=torch.int64, device=rows.device)
        kv_lens = torch.empty(count, dtype=torch.int32, device=rows.device)
        tables = torch.empty((count, width), dtype=torch.int32, device=rows.device)
        input_ids, positions, targets, slots = wide.unbind()
        if count:
            launch(
                (count, 1, 1),
                (PREPARE_THREADS, 1, 1),
                input_ids.data_ptr(),
                positions.data_ptr(),
                targets.data_ptr(),
                slots.data_ptr(),
                kv_lens.data_ptr(),
                tables.data_ptr(),
                rows.data_ptr(),
                last.data_ptr(),
                advance.data_ptr(),
                tokens.data_ptr(),
                blocks.data_ptr(),
                blocks.stride(0),
                max_model_len,
                block_size,
                width,
            )
        return input_ids, positions, targets, slots, kv_lens, tables

    return call
