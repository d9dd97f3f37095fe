"""C++ kernels for CPUs with AVX2 or AVX-512, compiled at first use with the compiler at hand.

`pack` is what the entry point `cpu` names. Nothing is compiled before a kernel is wanted for a
model; where that cannot be done (no compiler, an older CPU), torch's references serve and one line
of the log says why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    from llmfw.ops.kernel import DeviceInfo, Kernel


class CpuPack:
    """The kernel pack "cpu"."""

    @hookimpl
    def llmfw_kernels(self, device: DeviceInfo) -> list[Kernel]:
        """The pack's kernels; none for a device that is not a CPU."""
        if "cpu" not in device.features:
            return []
        from llmfw.kernels.cpu.declare import kernels

        return kernels()


pack = CpuPack()
