"""What the machine can do at best, and what it is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BYTES = 1 << 28
GPU_BYTES = 1 << 31
REPEATS = 7
RUNS_AT_ONCE = 4
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
CPUINFO = Path("/proc/cpuinfo")


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of reading memory: the best of a few sums, by torch's threads on a CPU."""
    size = GPU_BYTES if device.type == "cuda" else BYTES
    data = torch.ones(size // 8, dtype=torch.int64, device=device)
    return size / best_seconds(data.sum, device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written ones together, of torch's copy; the best of a few."""
    size = (GPU_BYTES if device.type == "cuda" else BYTES) // 2
    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of torch's product of two large square matrices; the best of a few."""
    size = MATRIX_SIZE.get(device.type, MATRIX_SIZE["cpu"])
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(lambda: a @ b, device)


def best_seconds(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The shortest of a few timed runs, after one that does not count."""
    run()
    if device.type == "cuda":
        return _best_on_gpu(run, repeats)
    best = float("inf")
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        run()
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return best


def _best_on_gpu(run: Callable[[], object], repeats: int) -> float:
    """Between events, several runs at a time: the host's part is hidden behind the first."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        begin.record()
        for _ in range(RUNS_AT_ONCE):
            run()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / RUNS_AT_ONCE / 1e3)
    return best


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware(device: torch.device) -> dict[str, Any]:
    """Name, memory and threads of what a figure was measured on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        for line in CPUINFO.read_text(encoding="ascii", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
