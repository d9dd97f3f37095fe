"""Launcher of penalise.cu: the op `penalise`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.ops import reference_draw
from llmfw.ops.kernel import OpContext

THREADS = 1024


def supports(context: OpContext) -> str | None:
    """Everything."""
    return None


def penalise(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `penalise`."""
    module = load("penalise.cu", context.info.device, context.dtype, THREADS=THREADS)
    launch = module.launcher("penalise", "PPPPPPPPqqi")

    def call(
        logits: torch.Tensor,
        rows: torch.Tensor,
        sequences: torch.Tensor,
        tokens: torch.Tensor,
        lens: torch.Tensor,
        prompt_lens: torch.Tensor,
        strengths: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        arguments = (logits, rows, sequences, tokens, lens, prompt_lens, strengths)
        if not all(each.stride(-1) == 1 for each in arguments) or not strengths.is_contiguous():
            return reference_draw.penalise(*arguments, longest)
        slots = 2 << max(longest - 1, 1).bit_length()  # at most half of them are taken
        table = torch.zeros((len(rows), slots, 2), dtype=torch.int32, device=logits.device)
        if len(rows):
            launch(
                (len(rows), 1, 1),
                (THREADS, 1, 1),
                logits.data_ptr(),
                rows.data_ptr(),
                sequences.data_ptr(),
                tokens.data_ptr(),
                lens.data_ptr(),
                prompt_lens.data_ptr(),
                strengths.data_ptr(),
                table.data_ptr(),
                logits.stride(0),
                tokens.stride(0),
                slots,
            )
        return logits

    return call
