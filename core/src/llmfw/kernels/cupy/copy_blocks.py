"""Launcher of copy_blocks.cu: blocks of all layers' caches in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.ops import reference_step
from llmfw.ops.kernel import OpContext

THREADS = 512
IN_FLIGHT = 4  # packs of a thread
PACK = 16  # bytes
MOST_LAYOUTS = 16  # of sets of caches, kept on the device
MOST_PAIRS = 65535  # of a grid


@dataclass(frozen=True)
class _Layout:
    """Where caches lie (int64 [tensors, 2], on the device), and the columns that a grid needs.

    No columns where the kernel does not serve them.
    """

    table: torch.Tensor
    columns: int

    @classmethod
    def of(cls, caches: Sequence[torch.Tensor], device: torch.device) -> _Layout:
        places = [(cache.data_ptr(), cache[0].nbytes) for cache in caches]
        whole = all(begin % PACK == 0 and nbytes % PACK == 0 for begin, nbytes in places)
        whole &= all(cache.is_contiguous() for cache in caches)
        largest = max(nbytes for _, nbytes in places)
        table = torch.tensor(places, dtype=torch.int64).to(device)
        return cls(table, -(-largest // (THREADS * IN_FLIGHT * PACK)) if whole else 0)


def supports(context: OpContext) -> str | None:
    """Everything."""
    return None


def copy_blocks(context: OpContext) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The op `copy_blocks`; where the caches lie is uploaded when they are first named."""
    device = context.info.device
    constants = {"THREADS": THREADS, "IN_FLIGHT": IN_FLIGHT}
    module = load("copy_blocks.cu", device, torch.bfloat16, **constants)
    launch = module.launcher("copy_blocks", "PPP")
    layouts: dict[object, _Layout] = {}

    def call(
        sources: torch.Tensor, targets: torch.Tensor, *caches: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        pairs = sources.shape[0]
        if not pairs or not caches:
            return caches
        key = tuple([(cache.data_ptr(), cache.stride(0), cache.shape) for cache in caches])
        layout = layouts.get(key)
        if layout is None:
            if len(layouts) == MOST_LAYOUTS:
                layouts.clear()
            layout = layouts[key] = _Layout.of(caches, device)
        if not layout.columns or pairs > MOST_PAIRS:
            return reference_step.copy_blocks(sources, targets, *caches)
        launch(
            (layout.columns, pairs, len(caches)),
            (THREADS, 1, 1),
            layout.table.data_ptr(),
            sources.data_ptr(),
            targets.data_ptr(),
        )
        return caches

    return call
