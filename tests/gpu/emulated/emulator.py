"""Compile a `.cu` source as C++ and launch its kernels on CPU tensors, in `Module`'s place."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from llmfw.kernels.cupy import compile as cu_compile
from llmfw.kernels.cupy import paged_plan, tensor_map
from llmfw.kernels.cupy.launch import TENSOR_MAP, TENSOR_MAP_BYTES
from llmfw.kernels.cupy.tensor_map import Boxes

HERE = Path(__file__).parent
SMS = 3  # multiprocessors of the imagined GPU: few, so that plans differ from one split to many
PROPERTIES = {"multi_processor_count": SMS, "shared_memory_per_block_optin": 227 << 10}


class EmulatedModule:
    """One source with its constants; kernels are built when first asked for."""

    def __init__(
        self, source: str, defines: Mapping[str, cu_compile.Constant], folder: Path
    ) -> None:
        self.source = source
        self.defines = dict(defines)
        self.folder = folder

    def launcher(
        self, name: str, signature: str, shared_bytes: int = 0, cluster: int = 1
    ) -> EmulatedLauncher:
        """The kernel `name`, with the signature that its launcher declares."""
        library = build(self.source, name, self.defines, self.folder)
        return EmulatedLauncher(library, name, signature, cluster)


class EmulatedLauncher:
    """Called like `Launcher`: a grid, a block, the arguments.

    late: (place, values) of what the kernel before writes while this one already runs: the values
        are there once a thread has waited for that kernel, and the others have run ahead.
    """

    late: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def __init__(self, library: Path, name: str, signature: str, cluster: int) -> None:
        self.name = name
        self.signature = signature
        self.cluster = cluster
        self.library = ctypes.CDLL(str(library))
        self.run = getattr(self.library, "emulate_" + name)

    def __call__(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], *args: float | bytes
    ) -> None:
        """Run all clusters of blocks, one after another."""
        cells = [
            ctypes.create_string_buffer(struct.pack("@" + code, value), struct.calcsize(code))
            for code, value in zip(map(code_of, self.signature), args, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        for place, values in self.late:
            size = ctypes.c_size_t(values.nbytes)
            addresses = ctypes.c_void_p(place.data_ptr()), ctypes.c_void_p(values.data_ptr())
            self.library.emulate_late(*addresses, size)
        three = ctypes.c_uint * 3
        code = self.run(
            three(*grid), three(*block), self.cluster, pointers, self.signature.encode()
        )
        assert code == 0, f"{self.name} does not take {self.signature}"


def code_of(letter: str) -> str:
    """How `struct` packs an argument of this letter."""
    return f"{TENSOR_MAP_BYTES}s" if letter == TENSOR_MAP else letter


def encode(boxes: Boxes) -> bytes:
    """A tensor map that the emulated copies read: four of each, in 16-bit values."""
    rank = len(boxes.sizes)
    sizes = (*boxes.sizes, *[1] * (4 - rank))
    strides = (1, *(stride // 2 for stride in boxes.strides), *[0] * (4 - rank))
    box = (*boxes.box, *[1] * (4 - rank))
    return struct.pack("13q24x", boxes.address, *sizes, *strides, *box)


def build(source: str, name: str, defines: Mapping[str, cu_compile.Constant], folder: Path) -> Path:
    """The shared library with one kernel of `source`, kept by the digest of all that went in."""
    options = sorted(f"-D{key}={value}" for key, value in defines.items())
    texts = [path.read_bytes() for path in sorted(HERE.glob("*.*h"))]
    own = [cu_compile.FOLDER / file for file in (source, *cu_compile.HEADERS)]
    own = [path for path in own if not (HERE / path.name).exists()]
    texts += [path.read_bytes() for path in own]
    key = hashlib.sha256(
        b"\n".join([*texts, name.encode(), *map(str.encode, options)])
    ).hexdigest()[:20]
    library = folder / f"{name}-{key}.so"
    if library.exists():
        return library
    work = folder / key
    work.mkdir(parents=True, exist_ok=True)
    for path in (*own, *HERE.glob("*.*h")):
        shutil.copy(path, work)
    (work / "main.cpp").write_text(
        f'#include "emulate.h"\n#include "{source}"\n'
        f'extern "C" int emulate_{name}(const unsigned* grid, const unsigned* block, '
        "unsigned cluster, void** args, const char* types) "
        f"{{ return emulated::launch({name}, grid, block, cluster, args, types); }}\n"
        'extern "C" void emulate_late(void* to, const void* from, size_t bytes) '
        "{ emulated::late.push_back({to, from, bytes}); }\n"
    )
    command = [
        "g++",
        "-O1",
        "-std=c++17",
        "-w",
        "-shared",
        "-fPIC",
        *options,
        "main.cpp",
        "-o",
        "out.so",
    ]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{source} does not compile as C++:\n{done.stderr[-4000:]}"
    os.replace(work / "out.so", library)
    shutil.rmtree(work)
    return library


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> torch.device:
    """Make the pack's launchers build and run emulated kernels; returns the device to use."""

    def load(
        source: str, index: int, defines: tuple[tuple[str, cu_compile.Constant], ...]
    ) -> EmulatedModule:
        return EmulatedModule(source, dict(defines), folder)

    monkeypatch.setattr(cu_compile, "_load", load)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**PROPERTIES)
    )
    monkeypatch.setattr(paged_plan, "COUNTERS", 4096)
    monkeypatch.setattr(cu_compile, "overlap", lambda _: 1)
    monkeypatch.setattr(tensor_map, "encode", encode)
    return torch.device("cpu", 0)
