"""Weights in the model's own dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from llmfw.config import ModelConfig
    from llmfw.layers.linear import Linear


class _Widened:
    """A float32 product whose inputs are brought to float32 first."""

    def __init__(self, product: Callable[..., torch.Tensor]) -> None:
        self.product = product
        self.prepare = getattr(product, "prepare", None)

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return self.product(x.float(), weight, bias)


class UnquantizedLinearMethod:
    """y = x W^T + b through the op `linear`; in float32 for a float32 layer of another model."""

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
        dtype = module.dtype or config.dtype
        shape = {
            "in_features": module.local_in,
            "out_features": module.local_out,
            "bias": int(module.has_bias),
        }
        if dtype is not torch.float32 or config.dtype is torch.float32:
            return config.ops.resolve("linear", dtype, **shape)
        own = config.ops.find("float32_linear", config.dtype, **shape)
        return own or _Widened(config.ops.resolve("linear", dtype, **shape))

    def post_load(self, module: Linear, kernel: Callable[..., torch.Tensor]) -> None:
        """Let a kernel that owns its layout prepare the weight once."""
        prepare = getattr(kernel, "prepare", None)
        if prepare is None or module.weight.is_meta or module.prepared:
            return
        module.prepared = True
        prepared = prepare(module.weight)
        if prepared is not module.weight:
            module.weight = nn.Parameter(prepared, requires_grad=False)
