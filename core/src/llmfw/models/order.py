"""The order in which a decoder reads its products' weights: each is told of the next one."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from llmfw.layers.linear import Linear


def link_products(model: nn.Module) -> None:
    """Tell each linear layer which one comes next, where decoder layers tell their order.

    A module tells it by a method `products`; what does not is a gap, over which nothing is told.
    The head follows the last layer.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return
    order = [product for layer in layers for product in products_of(layer)]
    for product, following in pairwise([*order, getattr(model, "lm_head", None)]):
        if isinstance(product, Linear) and isinstance(following, Linear):
            product.comes_before(following)


def products_of(module: nn.Module) -> tuple[nn.Module | None, ...]:
    """A module's linear layers in the order of their use; one None for those that do not tell."""
    told = getattr(module, "products", None)
    return tuple(told()) if callable(told) else (None,)
