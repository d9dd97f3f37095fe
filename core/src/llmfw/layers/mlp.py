"""The two feed-forward blocks: plain and gated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from llmfw.layers.activation import (
    Activation,
    GatedActivation,
    activation,
    gated_op,
    gated_product,
)
from llmfw.layers.layer import Layer
from llmfw.layers.linear import is_plain

if TYPE_CHECKING:
    from llmfw.config import ModelConfig


class MLP(Layer):
    """down(act(up(x))).

    Args:
        hidden_size: Width of x.
        intermediate_size: Width between.
        bias: Whether both linear layers have a bias.
        activation: Function or its name in configurations.
        config: The model's configuration.
        layer_idx: Index of the decoder layer.
        up_name: Name of the first layer, as the checkpoint has it.
        down_name: Name of the second layer.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = True,
        activation: str | Activation = "gelu",
        config: ModelConfig[Any],
        layer_idx: int | None = None,
        up_name: str = "up_proj",
        down_name: str = "down_proj",
    ) -> None:
        super().__init__()
        self.act = _activation(activation)
        self.up_name, self.down_name = up_name, down_name
        sizes = {up_name: (hidden_size, intermediate_size, "column")}
        sizes[down_name] = (intermediate_size, hidden_size, "row")
        for name, (in_features, out_features, parallel) in sizes.items():
            linear = config.make(
                "linear",
                name,
                layer_idx=layer_idx,
                in_features=in_features,
                out_features=out_features,
                bias=bias,
                parallel=parallel,
            )
            self.add_module(name, linear)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """x [tokens, hidden_size] -> [tokens, hidden_size]."""
        up, down = getattr(self, self.up_name), getattr(self, self.down_name)
        return down(self.act(up(x)))  # type: ignore[no-any-return]


class GatedMLP(Layer):
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202), with gate and up fused into one product.

    Args:
        hidden_size: Width of x.
        intermediate_size: Width of gate and of up.
        bias: Whether the linear layers have a bias.
        activation: Function, its name in configurations, or a `GatedActivation`.
        config: The model's configuration.
        layer_idx: Index of the decoder layer.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        activation: str | Activation | GatedActivation = "silu",
        config: ModelConfig[Any],
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.has_bias = bias
        self.act_name = activation
        self.gate_up_proj = config.make(
            "linear",
            "gate_up_proj",
            layer_idx=layer_idx,
            in_features=hidden_size,
            out_features=2 * intermediate_size,
            bias=bias,
            shards=(("gate_proj", intermediate_size), ("up_proj", intermediate_size)),
            parallel="column",
        )
        self.down_proj = config.make(
            "linear",
            "down_proj",
            layer_idx=layer_idx,
            in_features=intermediate_size,
            out_features=hidden_size,
            bias=bias,
            parallel="row",
        )

    def bind(self, name: str, config: ModelConfig[Any]) -> None:
        """Resolve the gated activation, and its product with it where a kernel fuses them."""
        local = self.intermediate_size // config.mapping.tp_size
        self._act_and_mul = gated_product(self.act_name, config, local)
        self._gated_linear: Callable[..., torch.Tensor] | None = None
        product = f"{name}.gate_up_proj"
        silu = gated_op(self.act_name) == "silu_and_mul"
        if silu and is_plain(self.gate_up_proj, product, config):
            self._gated_linear = config.ops.find(
                "gated_linear",
                config.dtype,
                in_features=self.hidden_size,
                intermediate_size=local,
                bias=int(self.has_bias),
            )

    def post_load(self) -> None:
        """Keep to the product's own kernel where it brought the weight into a layout of its own."""
        if getattr(self.gate_up_proj, "prepared", False):
            self._gated_linear = None

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """x [tokens, hidden_size] -> [tokens, hidden_size]."""
        product = self.gate_up_proj
        if self._gated_linear is not None:
            gated = self._gated_linear(x, product.weight, product.bias)
        else:
            gated = self._act_and_mul(product(x))
        return self.down_proj(gated)  # type: ignore[no-any-return]


def _activation(name: str | Activation) -> Activation:
    return activation(name)
