"""Products of torch that only some devices and versions have: the kernel pack "torch".

They wait for no value of the device, so they can be captured in CUDA graphs, which the references
of the same ops cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmfw.plugins import hookimpl

if TYPE_CHECKING:
    import torch

    from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext

ALIGNMENT = 8  # elements: torch's grouped product reads rows of 16 bytes
SERVED = (9, 10)  # compute capabilities (major); on others torch loops over the groups on the host


class TorchPack:
    """The kernel pack "torch"."""

    @hookimpl
    def llmfw_kernels(self, device: DeviceInfo) -> list[Kernel]:
        """The pack's kernels; none for a device without CUDA."""
        if "cuda" not in device.features:
            return []
        from llmfw.ops.kernel import Kernel

        return [
            Kernel(
                op="grouped_linear",
                name="torch.grouped_linear",
                factory="llmfw.kernels.vendor:grouped_linear",
                requires=("cuda", "sm_90"),
                dtypes=("bfloat16",),
                supports=_grouped_refusal,
                priority=5,
            )
        ]


def _grouped_refusal(context: OpContext) -> str | None:
    if grouped_product(context.info) is None:
        return "torch has no grouped product for this device"
    widths = (context["in_features"], context["out_features"])
    if any(width % ALIGNMENT for width in widths):
        return f"serves widths that are multiples of {ALIGNMENT}, not {widths[0]} x {widths[1]}"
    return None


def grouped_linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """One launch for all groups."""
    product = grouped_product(context.info)
    assert product is not None

    def run(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 0:
            return x.new_empty(0, weight.shape[1])
        return product(x, weight.transpose(1, 2), offs=ends)  # type: ignore[no-any-return]

    return run


def grouped_product(info: DeviceInfo) -> Callable[..., Any] | None:
    """torch's grouped product (x by group, weight [groups, in, out], offs=ends).

    None where torch has none, or where it would read `offs` on the host: no graph can capture that.
    """
    import torch

    levels = [int(name[3:]) for name in info.features if name.startswith("sm_")]
    if max(levels, default=0) // 10 not in SERVED:
        return None
    return getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


pack = TorchPack()
