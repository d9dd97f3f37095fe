"""Weights in the model's own dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from llmfw.config import ModelConfig
    from llmfw.layers.linear import Linear


class UnquantizedLinearMethod:
    """y = x W^T + b through the op `linear`."""

    def create_weights(self, module: Linear, dtype: torch.dtype) -> None:
        """weight [out, in] and, where there is one, bias [out], on the meta device."""
        shape = (module.local_out, module.local_in)
        module.weight = nn.Parameter(
            torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False
        )
        if module.has_bias:
            bias = torch.empty(module.local_out, dtype=dtype, device="meta")
            module.bias = nn.Parameter(bias, requires_grad=False)

    def resolve(self, module: Linear, config: ModelConfig[Any]) -> Callable[..., torch.Tensor]:
        """The kernel for this module's static shape."""
        return config.ops.resolve(
            "linear",
            module.dtype or config.dtype,
            in_features=module.local_in,
            out_features=module.local_out,
            bias=int(module.has_bias),
        )

    def post_load(self, module: Linear, kernel: Callable[..., torch.Tensor]) -> None:
        """Let a kernel that owns its layout prepare the weight once."""
        prepare = getattr(kernel, "prepare", None)
        if prepare is None or module.weight.is_meta or module.prepared:
            return
        module.prepared = True
        prepared = prepare(module.weight)
        if prepared is not module.weight:
            module.weight = nn.Parameter(prepared, requires_grad=False)
