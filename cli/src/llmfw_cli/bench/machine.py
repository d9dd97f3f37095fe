"""What the machine can do at best: bytes a second read from its memory."""

from __future__ import annotations

import time

import torch

BYTES = 1 << 28
REPEATS = 7


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of reading memory: the best of a few sums over 256 MiB, torch's threads."""
    data = torch.ones(BYTES // 8, dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(REPEATS):
        _wait(device)
        started = time.perf_counter()
        data.sum()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return BYTES / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
