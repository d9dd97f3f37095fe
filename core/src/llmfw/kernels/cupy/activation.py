"""Launchers of activation.cu: silu_and_mul, gelu_and_mul, gelu_tanh_and_mul."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import dense
from llmfw.ops.kernel import OpContext

THREADS = 256


def supports(context: OpContext) -> str | None:
    """Both halves of a row must be whole 16-byte packs."""
    width, pack = context["intermediate_size"], 16 // context.dtype.itemsize
    return f"intermediate size {width} is not a multiple of {pack}" if width % pack else None


def gated_activation(context: OpContext) -> Callable[[torch.Tensor], torch.Tensor]:
    """The op that `context` names, for one intermediate size."""
    width = context["intermediate_size"]
    module = load("activation.cu", context.info.device, context.dtype, WIDTH=width, THREADS=THREADS)
    launch = module.launcher(context.op, "PPq")
    pack = 16 // context.dtype.itemsize

    def call(x: torch.Tensor) -> torch.Tensor:
        x = dense(x)
        out = x.new_empty(*x.shape[:-1], width)
        if packs := out.numel() // pack:
            launch(
                (-(-packs // THREADS), 1, 1), (THREADS, 1, 1), out.data_ptr(), x.data_ptr(), packs
            )
        return out

    return call
