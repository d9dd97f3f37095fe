"""A kernel pack: an op of its own, squared ReLU, and another RMSNorm than core's."""

from __future__ import annotations

from llmfw import Kernel, hookimpl


class AcmePack:
    """The object that the entry point names."""

    @hookimpl
    def llmfw_kernels(self, device):
        """What the pack offers on any device; only the factories import torch."""
        own = {
            "reference": "acme_kernels.ops:squared_relu_reference",
            "inputs": "acme_kernels.ops:squared_relu_inputs",
            "cost": "acme_kernels.ops:squared_relu_cost",
        }
        return [
            Kernel("squared_relu", "acme.squared_relu", "acme_kernels.ops:squared_relu", **own),
            Kernel(
                "squared_relu",
                "acme.squared_relu_wrong",  # for those who want to see a check fail
                "acme_kernels.ops:squared_relu_wrong",
                priority=-1,
                **own,
            ),
            Kernel(
                "rms_norm",
                "acme.rms_norm",
                "acme_kernels.ops:rms_norm",
                dtypes=("float32",),
                supports=lambda c: (
                    None if c["hidden_size"] % 8 == 0 else "hidden_size % 8 is not 0"
                ),
                priority=500,
            ),
        ]


pack = AcmePack()
