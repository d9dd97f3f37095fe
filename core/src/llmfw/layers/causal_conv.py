"""The short convolution over a request's last tokens that stands before recurrent layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmfw.attention.metadata import AttentionMetadata
from llmfw.attention.state import StateTensor
from llmfw.layers.activation import activation
from llmfw.layers.layer import Layer

if TYPE_CHECKING:
    from llmfw.config import ModelConfig

STATE = "conv"


class CausalConv1d(Layer):
    """Each channel's weighted sum of a token and those before it, with an activation.

    The weight [channels, 1, kernel_size] is torch.nn.Conv1d's. The module that owns it declares
    `state_tensors()` as part of its `state_spec()`: the inputs that the next token needs.

    Args:
        channels: Width of x.
        kernel_size: Tokens that a sum takes.
        bias: Whether there is a bias.
        act: Activation by its name in configurations, None for none.
    """

    def __init__(
        self, channels: int, kernel_size: int, *, bias: bool = True, act: str | None = "silu"
    ) -> None:
        super().__init__()
        self.channels, self.kernel_size = channels, kernel_size
        self._fused = act in ("silu", "swish")
        self._act = None if act is None or self._fused else activation(act)
        self.weight: torch.Tensor = _empty(channels, 1, kernel_size)
        self.bias: torch.Tensor | None
        self.register_parameter("bias", _empty(channels) if bias else None)

    def state_tensors(self, dtype: torch.dtype) -> dict[str, StateTensor]:
        """What it keeps of each request, for a model of that dtype."""
        return {STATE: StateTensor((self.kernel_size - 1, self.channels), dtype)}

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Give the parameters the model's dtype and resolve the kernel."""
        for key, value in self._parameters.items():
            if value is not None:
                self._parameters[key] = _empty(*value.shape, dtype=config.dtype)
        self._conv: Callable[..., torch.Tensor] = config.ops.resolve(
            "causal_conv1d", config.dtype, channels=self.channels, kernel_size=self.kernel_size
        )

    def forward(
        self,
        x: torch.Tensor,
        state: Mapping[str, torch.Tensor],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """x [tokens, channels] -> [tokens, channels]; `state` is the owner's, by name."""
        weight = self.weight.squeeze(1)
        out = self._conv(x, weight, self.bias, state[STATE], attn_metadata, self._fused)
        return out if self._act is None else self._act(out)

    def extra_repr(self) -> str:
        """Shape, for print(model)."""
        return f"{self.channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}"


def _empty(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
