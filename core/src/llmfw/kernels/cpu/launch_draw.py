"""The factory of `draw_tokens`; inputs that are not as declared go to the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cpu import library
from llmfw.kernels.cpu.launch import SUFFIXES
from llmfw.ops import reference_draw
from llmfw.ops.kernel import OpContext

_threads = torch.get_num_threads


def draw_tokens(context: OpContext) -> Callable[..., torch.Tensor]:
    """A seeded draw for each row; rows are shared out over the threads."""
    native = library.functions()[f"draw_tokens_{SUFFIXES[context.dtype]}"]
    vocab, dtype = context["vocab_size"], context.dtype

    def run(
        logits: torch.Tensor,
        best: torch.Tensor,
        parameters: torch.Tensor,
        cuts: bool,
        tokens: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = logits.shape[0]
        if (
            logits.dtype is not dtype
            or logits.shape[1] != vocab
            or logits.stride(1) != 1
            or not logits.is_cpu
            or not parameters.is_contiguous()
            or not best.is_contiguous()
        ):
            return reference_draw.draw_tokens(logits, best, parameters, cuts, tokens, places)
        out = torch.empty_like(best)
        native(
            logits.data_ptr(),
            best.data_ptr(),
            parameters.data_ptr(),
            out.data_ptr(),
            rows,
            vocab,
            logits.stride(0),
            _threads(),
        )
        if tokens is not None and places is not None:
            tokens.index_copy_(0, places, out.clamp_min(0).int())
        return out

    return run
