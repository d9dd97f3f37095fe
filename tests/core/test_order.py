"""The order in which products' weights are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llmfw.layers.linear import Linear
from llmfw.models.order import link_products


class Block(nn.Module):
    def __init__(self, tells: bool = True) -> None:
        super().__init__()
        self.first, self.second = (Linear(8, 8, bias=False) for _ in range(2))
        if tells:
            self.products = lambda: (self.first, self.second)


def decoder(*blocks: Block) -> Any:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(blocks)
    model.lm_head = Linear(8, 16, bias=False)
    link_products(model)
    for index, module in enumerate(one for one in model.modules() if isinstance(one, Linear)):
        module.weight = nn.Parameter(torch.full((1,), float(index)), requires_grad=False)
    return model


def told(layer: Linear) -> float | None:
    """The first value of the weight that the layer's product is told of."""
    found: list[float | None] = []

    def product(x: Any, weight: Any, bias: Any, ahead: Any = None) -> torch.Tensor:
        found.append(None if ahead is None else float(ahead[0]))
        return x  # type: ignore[no-any-return]

    product.takes_ahead = True  # type: ignore[attr-defined]
    layer.multiply(product, torch.zeros(1))
    return found[0]


def test_each_product_is_told_of_the_next_one() -> None:
    model = decoder(Block(), Block())
    a, b = model.model.layers
    assert [told(one) for one in (a.first, a.second, b.first, b.second)] == [1, 2, 3, 4]
    assert told(model.lm_head) is None


def test_what_does_not_tell_its_order_is_a_gap() -> None:
    a, silent, c = decoder(Block(), Block(tells=False), Block()).model.layers
    assert told(a.first) == 1
    assert told(a.second) is told(silent.first) is told(silent.second) is None
    assert told(c.first) == 5


def test_a_kernel_that_takes_no_more_than_weight_and_bias_is_given_no_more() -> None:
    layer = decoder(Block()).model.layers[0].first
    assert layer.multiply(lambda x, weight, bias: x, torch.ones(1)) == 1


def test_a_model_without_layers_is_left_alone() -> None:
    link_products(Linear(8, 8))
