"""Launcher of copy_blocks.cu: blocks of all layers' caches in one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.ops import reference_step
from llmfw.ops.kernel import OpContext

THREADS = 256
IN_FLIGHT = 4  # packs of a thread
PACK = 16  # bytes
MOST_PAIRS = 65535  # of a grid


def supports(context: OpContext) -> str | None:
    """Everything."""
    return None


def copy_blocks(context: OpContext) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The op `copy_blocks`; where the caches lie is uploaded when they are first named."""
    device = context.info.device
    constants = {"THREADS": THREADS, "IN_FLIGHT": IN_FLIGHT}
    module = load("copy_blocks.cu", device, torch.bfloat16, **constants)
    launch = module.launcher("copy_blocks", "PPP")
    tables: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}

    def call(
        sources: torch.Tensor, targets: torch.Tensor, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        places = tuple((cache.data_ptr(), cache[0].nbytes) for cache in caches)
        whole = all(begin % PACK == 0 and nbytes % PACK == 0 for begin, nbytes in places)
        pairs = sources.shape[0]
        if not whole or pairs > MOST_PAIRS or not all(cache.is_contiguous() for cache in caches):
            return reference_step.copy_blocks(sources, targets, *caches)
        if not pairs or not caches:
            return caches
        table = tables.get(places)
        if table is None:
            table = torch.tensor(places, dtype=torch.int64).to(device)
            tables.clear()
            tables[places] = table
        largest = max(nbytes for _, nbytes in places)
        columns = -(-largest // (THREADS * IN_FLIGHT * PACK))
        launch(
            (columns, pairs, len(caches)),
            (THREADS, 1, 1),
            table.data_ptr(),
            sources.data_ptr(),
            targets.data_ptr(),
        )
        return caches

    return call
