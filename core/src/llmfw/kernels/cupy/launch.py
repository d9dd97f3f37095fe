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
PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...
STATIC_SHARED_BYTES = 48 << 10  # more must be asked for
ATTRIBUTE_BYTES = 72  # CUlaunchAttribute: its number, padding, a union of 64 bytes
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
        signature: One letter an argument: P pointer, q int64, i int32, f float32.
        index: Number of the device.
        overlaps: Whether the kernel may start before the one launched before it is done (it then
            waits itself, by `follow` in common.cuh).
        shared_bytes: Dynamic shared memory of a block, up to what the device can opt in to.

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
    ) -> None:
        self.name = name
        self.index = index
        self._function = function
        self._handle = function.ptr
        self._shared_bytes = shared_bytes
        if shared_bytes > STATIC_SHARED_BYTES:
            self._allow_shared(shared_bytes)
        packing = struct.Struct("@" + CONFIG + signature)
        self._buffer = ctypes.create_string_buffer(packing.size)
        self._pack_into = packing.pack_into
        self._config = ctypes.addressof(self._buffer)
        ends = [struct.calcsize("@" + CONFIG + signature[: i + 1]) for i in range(len(signature))]
        addresses = [
            self._config + end - struct.calcsize(letter)
            for end, letter in zip(ends, signature, strict=True)
        ]
        self._arguments = (ctypes.c_void_p * len(addresses))(*addresses)
        self._arguments_address = ctypes.addressof(self._arguments)
        self._attributes = ctypes.create_string_buffer(ATTRIBUTE_BYTES)
        struct.pack_into("@i4xi", self._attributes, 0, PROGRAMMATIC_SERIALIZATION, 1)
        self._attributes_address = ctypes.addressof(self._attributes) if overlaps else 0
        self._attribute_count = int(overlaps)
        self._launch = driver().cuLaunchKernelEx
        self._stream = raw_stream_getter()

    def __call__(self, grid: Grid, block: Grid, *args: float) -> None:
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
