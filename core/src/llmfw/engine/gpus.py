"""GPUs by name, for planning without having one: NVIDIA's data sheets."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from llmfw.errors import UsageError

GB = 10**9


@dataclass(frozen=True)
class GPU:
    """What planning asks of a GPU.

    Args:
        name: As NVIDIA calls it.
        memory: Bytes; vendors count in GiB here.
        capability: CUDA's compute capability.
        bandwidth: Bytes a second of its memory.
    """

    name: str
    memory: int
    capability: tuple[int, int]
    bandwidth: int


def _gpu(name: str, gib: int, major: int, minor: int, gb_per_second: int) -> GPU:
    return GPU(name, gib << 30, (major, minor), gb_per_second * GB)


GPUS: dict[str, GPU] = {
    "v100": _gpu("NVIDIA V100 SXM2 32 GB", 32, 7, 0, 900),
    "t4": _gpu("NVIDIA T4", 16, 7, 5, 320),
    "a100-40gb": _gpu("NVIDIA A100 40 GB", 40, 8, 0, 1555),
    "a100-80gb": _gpu("NVIDIA A100 80 GB SXM", 80, 8, 0, 2039),
    "a10": _gpu("NVIDIA A10", 24, 8, 6, 600),
    "a6000": _gpu("NVIDIA RTX A6000", 48, 8, 6, 768),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 24, 8, 6, 936),
    "l4": _gpu("NVIDIA L4", 24, 8, 9, 300),
    "l40s": _gpu("NVIDIA L40S", 48, 8, 9, 864),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 24, 8, 9, 1008),
    "h100": _gpu("NVIDIA H100 80 GB SXM", 80, 9, 0, 3350),
    "h100-pcie": _gpu("NVIDIA H100 80 GB PCIe", 80, 9, 0, 2000),
    "h200": _gpu("NVIDIA H200", 141, 9, 0, 4800),
    "b200": _gpu("NVIDIA B200", 180, 10, 0, 8000),
    "rtx5090": _gpu("NVIDIA GeForce RTX 5090", 32, 12, 0, 1792),
}


def gpu_named(name: str) -> GPU:
    """A GPU of the table.

    Raises:
        UsageError: If it is not there.
    """
    key = name.lower().replace(" ", "").replace("_", "-")
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=1)
        raise UsageError(
            f"GPU {name!r} is not in the table",
            hint=f"did you mean {near[0]}?" if near else f"known: {', '.join(GPUS)}",
        )
    return GPUS[key]
