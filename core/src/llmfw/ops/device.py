"""What a device can do, as feature strings that kernels require."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from llmfw.ops.kernel import DeviceInfo

CPUINFO = Path("/proc/cpuinfo")

# Our names -> the flags of /proc/cpuinfo that must all be there.
CPU_FEATURES: dict[str, tuple[str, ...]] = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512f": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"),
    "avx512_vnni": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"),
    "amx_bf16": ("amx_tile", "amx_bf16"),
    "amx_int8": ("amx_tile", "amx_int8"),
}

# Compute capabilities at which something was added that a kernel may require.
CUDA_LEVELS = (70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def device_info(device: torch.device) -> DeviceInfo:
    """The device and its features, as `DeviceInfo` lists them.

    CuPy is only looked for, never imported; CUDA is asked only for a cuda device. Features of the
    CPU are not those of a cuda device: kernels of the other kind never match.
    """
    if device.type == "cpu":
        found = {"cpu", *cpu_features(cpu_flags())}
        if find_compiler():
            found.add("compiler")
        return DeviceInfo(device, frozenset(found))
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = {"cuda", *cuda_features(major, minor)}
        if importlib.util.find_spec("cupy") is not None:
            found.add("cupy")
        return DeviceInfo(device, frozenset(found))
    return DeviceInfo(device, frozenset({device.type}))


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one of this thread meanwhile; does nothing for a CPU.

    Tensors know their device; streams, events, captures and the launches of own kernels are of the
    current one.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def cpu_features(flags: Iterable[str]) -> frozenset[str]:
    """Our names of what the flags of /proc/cpuinfo amount to."""
    have = set(flags)
    return frozenset(name for name, needs in CPU_FEATURES.items() if have.issuperset(needs))


def cuda_features(major: int, minor: int) -> frozenset[str]:
    """ "sm_80" and so on, for every level up to the device's own, which is always among them."""
    own = 10 * major + minor
    return frozenset(f"sm_{level}" for level in (*CUDA_LEVELS, own) if level <= own)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The CPU's flags as Linux lists them; none where there is no such list."""
    try:
        text = CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def find_compiler() -> str | None:
    """The C++ compiler: `CXX` if set, else g++, clang++ or c++ on the path; Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "clang++", "c++"):
        path = shutil.which(name)
        if path:
            return path
    return None
