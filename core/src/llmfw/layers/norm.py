"""Normalisation layers, each with the residual addition that usually stands before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmfw.layers.layer import Layer

if TYPE_CHECKING:
    from llmfw.config import ModelConfig


class RMSNorm(Layer):
    """x / rms(x) * (offset + weight) over the last dimension (arXiv:1910.07467).

    Args:
        hidden_size: Width of x.
        eps: Added to the mean square.
        offset: Added to the weight: 1 for checkpoints that store weight - 1.
        dtype: Type of the weight; the model's when left out.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        offset: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.offset = offset
        self.dtype = dtype
        self.weight: torch.Tensor = nn.Parameter(
            torch.empty(hidden_size, dtype=dtype, device="meta"), requires_grad=False
        )

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Give the weight the model's dtype and resolve both forms."""
        dtype = self.dtype or config.dtype
        self.weight = nn.Parameter(
            torch.empty(self.hidden_size, dtype=dtype, device="meta"), requires_grad=False
        )
        self._norm: Callable[..., Any] = config.ops.resolve(
            "rms_norm", dtype, hidden_size=self.hidden_size
        )
        self._add_norm: Callable[..., Any] = config.ops.resolve(
            "add_rms_norm", dtype, hidden_size=self.hidden_size
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """norm(x), or with a residual (norm(x + residual), x + residual): [tokens, hidden_size].

        The residual may be float32 in any model.
        """
        if residual is None:
            return self._norm(x, self.weight, self.eps, self.offset)
        return self._add_norm(x, residual, self.weight, self.eps, self.offset)

    def extra_repr(self) -> str:
        """Shape and constants, for print(model)."""
        return f"{self.hidden_size}, eps={self.eps}, offset={self.offset}"


class GatedRMSNorm(Layer):
    """RMS norm of x silu(gate), each of a number of equal groups of features by itself.

    Args:
        hidden_size: Width of x.
        eps: Added to the mean square.
        groups: Groups of features.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, *, groups: int = 1) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.groups = hidden_size, eps, groups
        self.weight: torch.Tensor = nn.Parameter(
            torch.empty(hidden_size, device="meta"), requires_grad=False
        )

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Give the weight the model's dtype and resolve the kernel."""
        self.weight = nn.Parameter(
            torch.empty(self.hidden_size, dtype=config.dtype, device="meta"), requires_grad=False
        )
        self._norm: Callable[..., torch.Tensor] = config.ops.resolve(
            "gated_rms_norm", config.dtype, hidden_size=self.hidden_size, num_groups=self.groups
        )

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x, gate [tokens, hidden_size] -> [tokens, hidden_size]."""
        return self._norm(x, gate, self.weight, self.eps, self.groups)

    def extra_repr(self) -> str:
        """Shape and constants, for print(model)."""
        return f"{self.hidden_size}, eps={self.eps}, groups={self.groups}"


class LayerNorm(Layer):
    """(x - mean) / std * weight + bias over the last dimension (arXiv:1607.06450).

    Args:
        hidden_size: Width of x.
        eps: Added to the variance.
        bias: Whether there is a bias.
        elementwise_affine: Whether there are a weight and a bias at all.
        dtype: Type of the parameters; the model's when left out.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        elementwise_affine: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.dtype = dtype
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        if elementwise_affine:
            self.weight = nn.Parameter(
                torch.empty(hidden_size, dtype=dtype, device="meta"), requires_grad=False
            )
        if elementwise_affine and bias:
            self.bias = nn.Parameter(
                torch.empty(hidden_size, dtype=dtype, device="meta"), requires_grad=False
            )

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Give the parameters the model's dtype and resolve the kernel."""
        dtype = self.dtype or config.dtype
        for key, value in self._parameters.items():
            if value is not None:
                empty = torch.empty(self.hidden_size, dtype=dtype, device="meta")
                self._parameters[key] = nn.Parameter(empty, requires_grad=False)
        self._norm: Callable[..., torch.Tensor] = config.ops.resolve(
            "layer_norm", dtype, hidden_size=self.hidden_size
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """norm(x), or with a residual (norm(x + residual), x + residual): [tokens, hidden_size]."""
        if residual is None:
            return self._norm(x, self.weight, self.bias, self.eps)
        total = x + residual
        return self._norm(total, self.weight, self.bias, self.eps), total
