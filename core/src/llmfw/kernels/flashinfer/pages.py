"""Block tables as FlashInfer wants them: all requests' pages in one list, and where each begins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True)
class Pages:
    """Where the keys of the leading requests of a batch lie, as numbers on the host.

    Args:
        counts: Pages of each request.
        starts: First page of each request in the list, and its length: [requests + 1].
        last: Keys in the last page of each request, at least 1.
    """

    counts: tuple[int, ...]
    starts: tuple[int, ...]
    last: tuple[int, ...]


def pages_of(kv_lens: Sequence[int], block_size: int) -> Pages:
    """The pages of requests with so many keys each."""
    counts = tuple(-(-length // block_size) for length in kv_lens)
    last = tuple(
        length - (count - 1) * block_size for length, count in zip(kv_lens, counts, strict=True)
    )
    return Pages(counts, starts_of(counts), last)


def starts_of(lengths: Sequence[int]) -> tuple[int, ...]:
    """0, then the sum of all lengths up to each: [requests + 1]."""
    return (0, *accumulate(lengths))


def indices_of(pages: Pages, block_tables: torch.Tensor) -> torch.Tensor:
    """The list of pages, int32 [pages], from block tables [requests or more, most blocks].

    The host knows how many entries of each row count, so nothing waits for the device.
    """
    width = block_tables.shape[1]
    rows = enumerate(pages.counts)
    places = torch.cat([torch.arange(count, device="cpu") + row * width for row, count in rows])
    if block_tables.is_cuda:
        places = places.pin_memory().to(block_tables.device, non_blocking=True)
    return block_tables.reshape(-1).index_select(0, places)


def host_ints(values: Iterable[int], device: torch.device) -> torch.Tensor:
    """int32 on the host, page-locked where they go to a GPU."""
    pinned = device.type == "cuda"
    return torch.tensor(list(values), dtype=torch.int32, device="cpu", pin_memory=pinned)
