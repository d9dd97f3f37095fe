"""What an engine was built on, and what it is opened on: the device and the versions around it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from llmfw.ops.device import CPUINFO, cpu_features, cpu_flags

DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class MachineFacts:
    """A device and the versions that kernels and timings depend on; "" where there is none.

    Args:
        device: "cpu" or "cuda".
        name: What the device calls itself.
        capability: "9.0", or of a CPU the features that kernels ask for.
        memory: Bytes of a GPU; 0 for a CPU.
        flags: Digest of a CPU's flags, of which its compiled kernels depend.
        driver: Version of NVIDIA's driver.
        cuda: Version of CUDA that torch was built with.
        torch: Its version.
        cupy: Its version.
    """

    device: str
    name: str
    capability: str
    memory: int = 0
    flags: str = ""
    driver: str = ""
    cuda: str = ""
    torch: str = ""
    cupy: str = ""


def machine_facts(device: torch.device) -> MachineFacts:
    """The facts of a device of this machine."""
    if device.type == "cpu":
        flags = cpu_flags()
        return MachineFacts(
            device="cpu",
            name=_cpu_name(),
            capability=" ".join(sorted(cpu_features(flags))),
            flags=hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()[:16],
            torch=torch.__version__,
        )
    properties = torch.cuda.get_device_properties(device)
    return MachineFacts(
        device="cuda",
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory=int(properties.total_memory),
        driver=_driver(),
        cuda=torch.version.cuda or "",
        torch=torch.__version__,
        cupy=_cupy_version(),
    )


def _cpu_name() -> str:
    try:
        lines = CPUINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")


def _driver() -> str:
    """The kernel module's version, from the line that the driver gives of itself."""
    try:
        words = DRIVER.read_text(encoding="ascii", errors="replace").splitlines()[0].split()
    except (OSError, IndexError):
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


def _cupy_version() -> str:
    for name in ("cupy-cuda12x", "cupy-cuda13x", "cupy"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""
