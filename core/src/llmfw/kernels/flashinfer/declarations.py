"""What the FlashInfer pack offers, and what it needs."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import replace
from pathlib import Path

from packaging.version import Version

from llmfw.kernels.cupy.declarations import KERNELS
from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext
from llmfw.plugins import hookimpl

DISTRIBUTION = "flashinfer-python"
OLDEST = "0.7"
READY_MADE = "flashinfer_jit_cache"  # the import name of its package of compiled kernels
HEAD_DIMS = (64, 128, 256)
CUDA_FOLDER = Path("/usr/local/cuda")  # where FlashInfer looks last
BASES = ("cupy.paged_streamed", "cupy.paged_attention")
AHEAD = 10  # of the kernel it builds on, where that was measured to be slower;
ON_REQUEST = -1  # elsewhere it serves only when asked for by name


def available(info: DeviceInfo) -> str | None:
    """None where FlashInfer is installed and has or can compile its kernels, else what it lacks."""
    if importlib.util.find_spec("flashinfer") is None:
        return "FlashInfer is not installed: pip install 'llmfw-core[flashinfer]'"
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return f"the module flashinfer is not of {DISTRIBUTION}"
    if Version(version) < Version(OLDEST):
        return f"{DISTRIBUTION} {version} is older than {OLDEST}"
    return None if has_ready_made() else compiler_refusal()


def has_ready_made() -> bool:
    """Whether compiled kernels are installed; which ones, FlashInfer tells when it loads them."""
    if importlib.util.find_spec(READY_MADE) is not None:
        return True
    spec = importlib.util.find_spec("flashinfer")
    folders = (spec.submodule_search_locations if spec else None) or ()
    return any(Path(folder, "data", "aot").is_dir() for folder in folders)


def compiler_refusal() -> str | None:
    """Why FlashInfer cannot compile here, or None when it can."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or CUDA_FOLDER
    found = {
        "nvcc": shutil.which("nvcc") or Path(home, "bin", "nvcc").exists(),
        "ninja": shutil.which("ninja") or importlib.util.find_spec("ninja"),
        "c++": shutil.which(os.environ.get("CXX") or "c++"),
    }
    lacks = [tool for tool, there in found.items() if not there]
    if not lacks:
        return None
    return (
        f"FlashInfer compiles its kernels at first use and finds no {', no '.join(lacks)}; "
        "install them, or flashinfer-jit-cache, which brings kernels"
    )


def supports(base: Kernel, context: OpContext) -> str | None:
    """What both FlashInfer and the kernel for generation requests serve."""
    reason = base.refusal(context)
    if reason is not None:
        return reason
    head_dim, v_dim = context["head_dim"], context.shape.get("v_head_dim") or context["head_dim"]
    if head_dim != v_dim or head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        return f"serves one head size of {sizes}, not {head_dim} and {v_dim}"
    return None


def backend_of(device: DeviceInfo) -> str:
    """FlashInfer's kernels for a device: FlashAttention 3's way on 9.0, else FlashAttention 2's."""
    hopper = "sm_90" in device.features and "sm_100" not in device.features
    return "fa3" if hopper else "fa2"


class FlashInferPack:
    """The plugin object of the entry point `flashinfer`."""

    @hookimpl
    def llmfw_kernels(self, device: DeviceInfo) -> list[Kernel]:
        """A kernel on each of the CuPy pack's; they say themselves what they require."""
        return [built_on(base, device) for base in KERNELS if base.name in BASES]


def built_on(base: Kernel, device: DeviceInfo) -> Kernel:
    """The kernel that leaves to `base` what is not FlashInfer's."""
    name = base.name.removeprefix("cupy.")
    return replace(
        base,
        name=f"flashinfer.{name}",
        factory=f"llmfw.kernels.flashinfer.attention:{name}",
        supports=functools.partial(supports, base),
        priority=base.priority + AHEAD if backend_of(device) == "fa3" else ON_REQUEST,
        available=lambda info: base.missing(info) or available(info),
        builds_on=base.name,
    )
