"""Launcher of ssd_chunks.cu: the op `ssd_scan` whose prompts go by products within chunks.

Single tokens and short prompts go as in `scans`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy import scans
from llmfw.kernels.cupy.compile import load
from llmfw.ops.kernel import OpContext

CHUNK, THREADS = 64, 128  # as in ssd_chunks.cu
HEAD_DIM, MAX_STATE = 64, 128
PADDING = 8  # numbers at the end of a row in shared memory
FEWEST = 9  # tokens from which products pay


def supports(context: OpContext) -> str | None:
    """Heads of 64, which four warps divide, and a state that fits their registers."""
    head_dim, size = context["head_dim"], context["state_size"]
    if head_dim != HEAD_DIM:
        return f"serves heads of {HEAD_DIM}, not {head_dim}"
    if size % 32 or size > MAX_STATE:
        return f"serves states of up to {MAX_STATE} numbers a row, a multiple of 32, not {size}"
    return scans.supports(context)


def ssd_scan(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `ssd_scan` for one layout of heads."""
    names = {"num_heads": "HEADS", "num_groups": "GROUPS", "state_size": "STATE"}
    constants = {name: context[key] for key, name in names.items()}
    module = load("ssd_chunks.cu", context.info.device, context.dtype, **constants)
    launch = module.launcher(
        "ssd_chunks", "PPPPPPPPPPPqqqqqffi", shared_bytes=shared_bytes(context["state_size"])
    )
    chunks = scans.Chunks(launch, 2 * context["num_heads"], (THREADS, 1, 1), FEWEST)
    return scans.ssd_scan(context, chunks)


def shared_bytes(size: int) -> int:
    """Two stages of b, c and half of x, and half of a head's state, in bfloat16."""
    wide, part = size + PADDING, HEAD_DIM // 2
    return 2 * (2 * CHUNK * (2 * wide + part + PADDING) + part * wide)
