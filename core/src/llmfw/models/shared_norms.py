"""The stock decoder's layers for few rows: each norm divided between the two products beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from llmfw.layers.activation import gated_op
from llmfw.layers.attention import Attention
from llmfw.layers.linear import Linear, is_plain
from llmfw.layers.mlp import GatedMLP
from llmfw.layers.norm import RMSNorm

if TYPE_CHECKING:
    from llmfw.attention.metadata import AttentionMetadata
    from llmfw.config import ModelConfig

MOST_ROWS = 256  # beyond, norms are a small part of a layer


@dataclass(frozen=True)
class Product:
    """A linear layer, and the op that does its product and a part of the norm beside it."""

    layer: Linear
    op: Callable[..., Any]

    def serves_rows(self, rows: int) -> bool:
        """Whether the op does so for so many rows; one that does not say does for any."""
        serves = getattr(self.op, "serves_rows", None)
        return serves is None or bool(serves(rows))


@dataclass(frozen=True)
class DividedLayer:
    """What one decoder layer is made of."""

    norm: RMSNorm
    qkv: Product
    attention: Attention
    o: Product
    post_norm: RMSNorm
    gate_up: Product
    down: Product

    @property
    def products(self) -> tuple[Product, ...]:
        """All four, in their order."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class Place:
    """Where a module stood when its layer was divided, and what it was."""

    owner: nn.Module
    name: str
    module: nn.Module
    kind: type[nn.Module]

    @property
    def untouched(self) -> bool:
        """Whether it still stands there, runs its class's forward, and nobody listens to it."""
        module = self.module
        return (
            self.owner._modules.get(self.name) is module
            and type(module) is self.kind
            and "forward" not in module.__dict__
            and not module._forward_hooks
            and not module._forward_pre_hooks
        )


class SharedNorms:
    """All layers of a stock decoder, with no kernel of a norm between their products.

    The product before a norm adds its results to the stream and multiplies it by the norm's
    weight; the one after divides its sums by the root mean square (ops `add_linear`,
    `normed_linear`, `normed_gated_linear`). The first layer's norm and the decoder's last one stay
    as they are.

    Args:
        divided: Of each decoder layer, its parts.
        layers: The decoder's layers.
    """

    def __init__(self, divided: Sequence[DividedLayer], layers: nn.ModuleList) -> None:
        self._divided, self._layers = divided, layers
        self._places = tuple(
            Place(owner, name, module, type(module))
            for owner in layers.modules()
            for name, module in owner._modules.items()
            if module is not None
        )

    @cached_property
    def rows(self) -> frozenset[int]:
        """The numbers of rows that the kernels of all products serve."""
        products = [product for layer in self._divided for product in layer.products]
        return frozenset(
            rows
            for rows in range(1, MOST_ROWS + 1)
            if all(product.serves_rows(rows) for product in products)
        )

    @property
    def weights_as_loaded(self) -> bool:
        """Whether no kernel brought a weight into a layout of its own."""
        return not any(getattr(place.module, "prepared", False) for place in self._places)

    @property
    def untouched(self) -> bool:
        """Whether all modules are those of the build, and nobody listens to what they return."""
        return (
            len(self._layers) == len(self._divided)
            and not _global_forward_hooks
            and not _global_forward_pre_hooks
            and all(place.untouched for place in self._places)
        )

    def serves(self, layers: nn.ModuleList, hidden: torch.Tensor) -> bool:
        """Whether the kernels serve so many rows, and no module's own forward is asked for.

        layers: The decoder's, as they are now.
        """
        return hidden.shape[0] in self.rows and layers is self._layers and self.untouched

    def __call__(
        self, position_ids: torch.Tensor, hidden: torch.Tensor, metadata: AttentionMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedded tokens [tokens, hidden_size], overwritten -> what the last layer gives."""
        stream, first = hidden, self._divided[0]
        qkv = first.qkv.layer(first.norm(stream))
        for layer, following in zip(self._divided, (*self._divided[1:], None), strict=True):
            attended = layer.attention.attend(qkv, position_ids, metadata)
            gated = through_norm(layer.o, attended, stream, layer.post_norm, layer.gate_up)
            if following is not None:
                qkv = through_norm(layer.down, gated, stream, following.norm, following.qkv)
        return self._divided[-1].down.layer(gated), stream


def through_norm(
    before: Product, x: torch.Tensor, stream: torch.Tensor, norm: RMSNorm, after: Product
) -> torch.Tensor:
    """after(norm(stream + before(x))); stream [tokens, hidden_size] becomes that sum."""
    scaled, squares = before.op(x, before.layer.weight, stream, norm.weight, norm.offset)
    weight, bias = after.layer.weight, after.layer.bias
    return after.op(scaled, stream, squares, weight, bias, norm.eps)  # type: ignore[no-any-return]


def shared_norms(layers: nn.ModuleList, name: str, config: ModelConfig[Any]) -> SharedNorms | None:
    """For a stock decoder; None where a layer is made otherwise or a kernel does not stand in.

    Args:
        layers: Its layers.
        name: Its place in the tree, by which its layers' weights are known.
        config: The model's configuration.
    """
    divided: list[DividedLayer] = []
    for index, layer in enumerate(layers):
        parts = divide(layer, f"{name}.layers.{index}", config)
        if parts is None:
            return None
        divided.append(parts)
    return SharedNorms(divided, layers) if divided else None


def divide(layer: Any, name: str, config: ModelConfig[Any]) -> DividedLayer | None:
    """A decoder layer's parts, each of core's own class, its products with ops that stand in."""
    if not getattr(layer, "divides_norms", False) or config.mapping.tp_size > 1:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if type(attention) is not Attention or type(mlp) is not GatedMLP:
        return None
    if any(type(norm) is not RMSNorm or norm.dtype not in (None, config.dtype) for norm in norms):
        return None
    if gated_op(mlp.act_name) != "silu_and_mul":
        return None
    products = {
        f"self_attn.{each}": attention._modules[each] for each in ("qkv_proj", attention.out_name)
    }
    products |= {f"mlp.{each}": mlp._modules[each] for each in ("gate_up_proj", "down_proj")}
    found: list[Product] = []
    for (place, linear), op in zip(products.items(), OPS, strict=True):
        if type(linear) is not Linear or not is_plain(linear, f"{name}.{place}", config):
            return None
        product = divided_product(linear, op, layer.hidden_size, config)
        if product is None:
            return None
        found.append(product)
    qkv, o, gate_up, down = found
    return DividedLayer(norms[0], qkv, attention, o, norms[1], gate_up, down)


OPS = ("normed_linear", "add_linear", "normed_gated_linear", "add_linear")  # of a layer's products


def divided_product(
    linear: Linear, op: str, hidden_size: int, config: ModelConfig[Any]
) -> Product | None:
    """The layer with the kernel that does its product and a part of a norm, None without one."""
    shape = {"in_features": linear.in_features, "bias": int(linear.has_bias)}
    part = "linear"
    if op == "normed_gated_linear":
        part, shape["intermediate_size"] = "gated_linear", linear.out_features // 2
    else:
        shape["out_features"] = linear.out_features
    if op == "add_linear" and linear.has_bias:
        return None
    norm = {"hidden_size": hidden_size}
    found = config.ops.stand_in(op, config.dtype, {part: shape, "add_rms_norm": norm})
    return None if found is None else Product(linear, found)
