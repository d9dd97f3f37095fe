"""Launch compiled kernels on torch's current stream with little work on the host.

Grid and arguments are packed into one buffer by a single `struct` call and handed to the driver;
nothing is wrapped, converted or looked up a launch. A launch is an ordinary stream operation, so
`torch.cuda.graph` captures it.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Callable
from typing import Any

import torch

from llmfw.errors import KernelError

INVALID_CONTEXT = 201
CONFIG = "7I4xQPI4x"  # CUlaunchConfig: grid, block, shared bytes, stream, attributes, their number
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_...
PROGRAMMATIC_SERIALIZATION = 6  # ..._PROGRAMMATIC_STREAM_SERIALIZATION
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...
UNASKED_SHARED_BYTES = 46 << 10  # more must be asked for: 48 KB with what a source declares itself
ATTRIBUTE_BYTES = 72  # CUlaunchAttribute: its number, padding, a union of 64 bytes
TENSOR_MAP = "T"  # in a signature: the bytes of a tensor map
TENSOR_MAP_BYTES = 128
Grid = tuple[int, int, int]


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver library, with the one function's types declared that is called often."""
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    declare(library)
    return library


def declare(library: ctypes.CDLL) -> None:
    """Declare cuLaunchKernelEx: configuration, function, arguments, extra."""
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p] * 4
    library.cuLaunchKernelEx.restype = ctypes.c_int


def raw_stream_getter() -> Callable[[int], int]:
    """torch's current stream of a device as a number; the quick private way where torch has it."""
    quick = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if quick is not None:
        return quick  # type: ignore[no-any-return]
    return lambda index: torch.cuda.current_stream(index).cuda_stream


class Launcher:
    """A kernel with its argument types: call it with a grid, a block and the arguments.

    Args:
        function: CuPy's loaded function; kept alive here.
        name: For messages.
        signature: One letter an argument: P pointer, q int64, i int32, f float32, T tensor map.
        index: Number of the device.
        overlaps: Whether the kernel may start before the one launched before it is done (it then
            waits itself, by `follow` in common.cuh).
        shared_bytes: Dynamic shared memory of a block, up to what the device can opt in to.
        cluster: Blocks of a cluster; the grid's first number is a multiple of it.

    The argument buffer is the launcher's own: one thread at a time may use it.
    """

    def __init__(
        self,
        function: Any,
        name: str,
        signature: str,
        index: int,
        overlaps: bool = False,
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        self.name = name
        self.index = index
        self._function = function
        self._handle = function.ptr
        self._shared_bytes = shared_bytes
        if shared_bytes > UNASKED_SHARED_BYTES:
            self._allow_shared(shared_bytes)
        codes = [f"{TENSOR_MAP_BYTES}s" if one == TENSOR_MAP else one for one in signature]
        packing = struct.Struct("@" + CONFIG + "".join(codes))
        self._buffer = ctypes.create_string_buffer(packing.size)
        self._pack_into = packing.pack_into
        self._config = ctypes.addressof(self._buffer)
        ends = [struct.calcsize("@" + CONFIG + "".join(codes[: i + 1])) for i in range(len(codes))]
        addresses = [
            self._config + end - struct.calcsize(code)
            for end, code in zip(ends, codes, strict=True)
        ]
        self._arguments = (ctypes.c_void_p * len(addresses))(*addresses)
        self._arguments_address = ctypes.addressof(self._arguments)
        attributes = [(PROGRAMMATIC_SERIALIZATION, 1, 0, 0)] * overlaps
        attributes += [(CLUSTER_DIMENSION, cluster, 1, 1)] * (cluster > 1)
        self._attributes = ctypes.create_string_buffer(max(1, len(attributes)) * ATTRIBUTE_BYTES)
        for i, attribute in enumerate(attributes):
            struct.pack_into("@i4x3I", self._attributes, i * ATTRIBUTE_BYTES, *attribute)
        self._attributes_address = ctypes.addressof(self._attributes) if attributes else 0
        self._attribute_count = len(attributes)
        self._launch = driver().cuLaunchKernelEx
        self._stream = raw_stream_getter()

    def __call__(self, grid: Grid, block: Grid, *args: float | bytes) -> None:
        """Launch on torch's current stream.

        Raises:
            KernelError: If the driver refuses the launch.
        """
        self._pack_into(
            self._buffer,
            0,
            *grid,
            *block,
            self._shared_bytes,
            self._stream(self.index),
            self._attributes_address,
            self._attribute_count,
            *args,
        )
        code = self._launch(self._config, self._handle, self._arguments_address, None)
        if code:
            self._failed(code, grid, block)

    def _allow_shared(self, size: int) -> None:
        """Raise the kernel's limit of dynamic shared memory.

        Raises:
            KernelError: If the device has less.
        """
        code = driver().cuFuncSetAttribute(
            ctypes.c_void_p(self._handle), MAX_DYNAMIC_SHARED_SIZE_BYTES, size
        )
        if code:
            raise KernelError(f"{self.name} needs {size} bytes of shared memory: error {code}")

    def _failed(self, code: int, grid: Grid, block: Grid) -> None:
        if code == INVALID_CONTEXT:  # a thread that has not used the device yet
            torch.cuda.set_device(self.index)
            code = self._launch(self._config, self._handle, self._arguments_address, None)
            if code == 0:
                return
        text = ctypes.c_char_p()
        driver().cuGetErrorName(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown"
        raise KernelError(
            f"launch of {self.name} with grid {grid}, block {block} failed: {reason} ({code})"
        )


def dense(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy of it, contiguous and aligned to 16 bytes."""
    if not x.is_contiguous():
        x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def pointer(x: torch.Tensor | None) -> int:
    """The address of the first element, 0 for None."""
    return 0 if x is None else x.data_ptr()
