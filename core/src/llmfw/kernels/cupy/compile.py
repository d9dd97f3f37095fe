"""Compile `.cu` sources with NVRTC through CuPy, keep the machine code on disk, load it."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmfw.cache import cache_dir as user_cache
from llmfw.cache import find
from llmfw.errors import KernelError, UsageError

if TYPE_CHECKING:
    from llmfw.kernels.cupy.launch import Launcher

logger = logging.getLogger("llmfw.kernels.cupy")

FOLDER = Path(__file__).parent
HEADERS = (
    "common.cuh",
    "ptx.cuh",
    "draw.cuh",
    "hopper.cuh",
    "joined.cuh",
    "latent.cuh",
    "paged.cuh",
    "paged_tiles.cuh",
    "rotary.cuh",
    "streamed_norm.cuh",
    "tile_results.cuh",
    "turned.cuh",
    "wgmma.cuh",
)
OVERLAPS = ("0", "1", "2")
DEFAULT_OVERLAP = "1"
Constant = int | str  # of a source; a text is C++ as it stands
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def cache_dir() -> Path:
    """Where machine code and timings lie."""
    return user_cache() / "kernels"


def options_for(arch: str, defines: Mapping[str, Constant]) -> tuple[str, ...]:
    """NVRTC's options for one architecture ("sm_90") and the source's compile-time constants."""
    return (
        f"-arch={arch}",
        "-std=c++17",
        "-default-device",
        *(f"-D{name}={value}" for name, value in sorted(defines.items())),
    )


@functools.cache
def _texts(source: str) -> tuple[str, tuple[str, ...]]:
    return (FOLDER / source).read_text(), tuple((FOLDER / header).read_text() for header in HEADERS)


def source_digest(*sources: str) -> str:
    """A short digest of these sources and the headers they share."""
    digest = hashlib.sha256()
    for source in sources:
        text, headers = _texts(source)
        for part in (text, *headers):
            digest.update(part.encode())
    return digest.hexdigest()[:16]


def compile_cubin(source: str, arch: str, defines: Mapping[str, Constant]) -> bytes:
    """Machine code of `source` for `arch`, from the cache on disk or from NVRTC. Needs no GPU.

    Raises:
        KernelError: If the source does not compile; the message ends with NVRTC's log.
    """
    from cupy.cuda import nvrtc

    options = options_for(arch, defines)
    version = ".".join(map(str, nvrtc.getVersion()))
    key = hashlib.sha256(
        "\n".join((source_digest(source), version, *options)).encode()
    ).hexdigest()[:32]
    name = f"kernels/{Path(source).stem}-{key}.cubin"
    kept = find(name)
    if kept is not None:
        return kept.read_bytes()
    start = time.perf_counter()
    cubin = _run_nvrtc(source, options)
    logger.info(
        "compiled %s for %s in %.2f s (%s)",
        source,
        arch,
        time.perf_counter() - start,
        ", ".join(f"{name} {value}" for name, value in sorted(defines.items())),
    )
    _keep(user_cache() / name, cubin)
    find(name)  # counts as used
    return cubin


def _run_nvrtc(source: str, options: tuple[str, ...]) -> bytes:
    from cupy.cuda import nvrtc

    text, headers = _texts(source)
    contents = [header.encode() for header in headers]
    names = [name.encode() for name in HEADERS]
    program = nvrtc.createProgram(text, source, contents, names)
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as exc:
            log = nvrtc.getProgramLog(program)
            raise KernelError(
                f"{source} does not compile ({' '.join(options)}): {exc}\n{log}",
                hint="--kernels reference runs without own kernels",
            ) from exc
        return bytes(nvrtc.getCUBIN(program))
    finally:
        nvrtc.destroyProgram(program)


def _keep(path: Path, cubin: bytes) -> None:
    """Write beside, then rename, so that a reader never sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.{id(cubin)}")
        partial.write_bytes(cubin)
        partial.replace(path)
    except OSError as exc:
        logger.warning("compiled kernels are not kept: %s cannot be written: %s", path, exc)


class Module:
    """One compiled source on one device."""

    def __init__(self, source: str, device: torch.device, defines: Mapping[str, Constant]) -> None:
        import cupy

        self.index = device_index(device)
        self.source = source
        self._overlaps = int(defines.get("PDL", 0)) > 0
        with torch.cuda.device(self.index), cupy.cuda.Device(self.index):
            torch.cuda.current_stream().synchronize()  # the primary context exists and is current
            self._module: Any = cupy.cuda.function.Module()
            self._module.load(compile_cubin(source, arch_of(self.index), defines))

    def launcher(
        self, name: str, signature: str, shared_bytes: int = 0, cluster: int = 1
    ) -> Launcher:
        """The function `name`; see `Launcher` for the signature, shared memory and cluster."""
        from llmfw.kernels.cupy.launch import Launcher

        function = self._module.get_function(name)
        return Launcher(
            function, name, signature, self.index, self._overlaps, shared_bytes, cluster
        )


@functools.cache
def _load(source: str, index: int, defines: tuple[tuple[str, Constant], ...]) -> Module:
    return Module(source, torch.device("cuda", index), dict(defines))


def load(source: str, device: torch.device, dtype: torch.dtype, **defines: Constant) -> Module:
    """`source` compiled for this device, dtype and constants; the same module on every call."""
    constants = constants_of(device, dtype, defines)
    return _load(source, device_index(device), tuple(sorted(constants.items())))


def compile_ahead(
    device: torch.device, dtype: torch.dtype, uses: Iterable[tuple[str, Mapping[str, Constant]]]
) -> None:
    """Fill the cache of machine code for sources and their constants, several at once."""
    arch = arch_of(device_index(device))
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        started = [
            pool.submit(compile_cubin, source, arch, constants_of(device, dtype, constants))
            for source, constants in uses
        ]
        for job in started:
            job.result()


def constants_of(
    device: torch.device, dtype: torch.dtype, defines: Mapping[str, Constant]
) -> dict[str, Constant]:
    """All compile-time constants of a source: its own, the dtype, and how launches overlap."""
    return {"DTYPE": DTYPE_CODES[dtype], "PDL": overlap(device), **defines}


def overlap(device: torch.device) -> int:
    """How kernels overlap with the one before: 0 not, 1 or 2 as common.cuh's `follow` tells.

    `LLMFW_PDL` overrides it. Needs compute capability 9.0.

    Raises:
        UsageError: If `LLMFW_PDL` is not one of OVERLAPS.
    """
    asked = os.environ.get("LLMFW_PDL", DEFAULT_OVERLAP)
    if asked not in OVERLAPS:
        raise UsageError(f"LLMFW_PDL is {asked!r}", hint=f"use one of {', '.join(OVERLAPS)}")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return 0
    return int(asked)


def device_index(device: torch.device) -> int:
    """The device's number; "cuda" alone means the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    return torch.cuda.get_device_properties(device_index(device)).multi_processor_count


@functools.cache
def arch_of(index: int) -> str:
    """The newest architecture that both the device and NVRTC know, as "sm_89".

    9.0 has instructions that no other has, and that hopper.cuh uses: "sm_90a".
    """
    from cupy.cuda import nvrtc

    major, minor = torch.cuda.get_device_capability(index)
    own = major * 10 + minor
    known = [arch for arch in nvrtc.getSupportedArchs() if arch // 10 == major and arch <= own]
    if not known:
        raise KernelError(
            f"NVRTC {nvrtc.getVersion()} cannot compile for compute capability {major}.{minor}",
            hint="install a newer CuPy and CUDA runtime, or run with --kernels reference",
        )
    newest = max(known)
    return f"sm_{newest}{'a' if newest == 90 else ''}"
