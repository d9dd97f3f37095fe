"""The op `moe_experts`: own kernels while weights are what is waited for, the library above.

One token, or as few as leave an expert no more than a row on average, go pair by pair through
moe_gemv.cu, more in tiles of rows through moe_grouped.cu, many (a prompt) through torch's grouped
product, between the same order and sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels import vendor
from llmfw.kernels.cupy.compile import compile_ahead
from llmfw.kernels.cupy.launch import dense
from llmfw.kernels.cupy.moe_parts import (
    Combine,
    GemvDown,
    GemvUp,
    GroupedActivation,
    GroupedProduct,
    Order,
)
from llmfw.kernels.cupy.moe_uses import (
    Gemv,
    Grouped,
    Shape,
    Use,
    activation_use,
    combine_use,
    gemv_use,
    grouped_use,
    order_use,
)
from llmfw.ops.kernel import OpContext

SLICE = 64  # values of the summed dimension that moe_grouped.cu takes at a time
LANES = 32
MANY_ROWS = 48  # of an expert on average, from which the library serves
# The best of eight ways for the shapes of docs/design/kernels-cupy-layers.md, within 4 %.
UP_ONE, UP_FEW = Gemv(1, 4, 2), Gemv(1, 1, 2)  # of one token, of more
DOWN_SHORT, DOWN_LONG = Gemv(4, 4, 2), Gemv(2, 8, 2)
LONG = 2048  # values of a row
TILES = ((8, Grouped(64, 16, 6)), (MANY_ROWS, Grouped(128, 32, 3)))  # up to so many rows on average

Act = Callable[[torch.Tensor], torch.Tensor]


def supports(context: OpContext) -> str | None:
    """Both summed dimensions must be whole slices."""
    for name in ("hidden_size", "intermediate_size"):
        if context[name] % SLICE:
            return f"{name} {context[name]} is not a multiple of {SLICE}"
    return None


class TileProducts:
    """Order and both products for tiles of one size."""

    def __init__(self, context: OpContext, how: Grouped) -> None:
        self.order = Order(context, how.rows)
        self.up = GroupedProduct(context, how, up=True)
        self.down = GroupedProduct(context, how, up=False)


def ways_of(shape: Shape) -> tuple[Gemv, Gemv, Gemv]:
    """How pairs are multiplied: up for one token, up for more, down."""
    return UP_ONE, UP_FEW, DOWN_LONG if shape.width >= LONG else DOWN_SHORT


def uses_of(shape: Shape) -> list[Use]:
    """Every source that the op may launch, with its constants."""
    one, few, down = ways_of(shape)
    gemv = [gemv_use(shape, how, up=True) for how in (one, few)]
    tiles = [
        use
        for _, how in TILES
        for use in (
            order_use(shape, how.rows),
            grouped_use(shape, how, up=True),
            grouped_use(shape, how, up=False),
        )
    ]
    ends = [combine_use(shape), *([activation_use(shape)] if shape.code else [])]
    return [*gemv, gemv_use(shape, down, up=False), *tiles, *ends]


class CupyExperts:
    """The op for one shape and activation; called as the reference is."""

    def __init__(self, context: OpContext) -> None:
        shape = Shape.of(context)
        if context.info.device.type == "cuda":
            compile_ahead(context.info.device, context.dtype, uses_of(shape))
        self._experts = shape.experts
        product = vendor.grouped_product(context.info)
        self._library = product if context.dtype == torch.bfloat16 else None
        one, few, down = ways_of(shape)
        self._up_one, self._up_few = GemvUp(context, one), GemvUp(context, few)
        self._down = GemvDown(context, down)
        self._tiles = [(most, TileProducts(context, how)) for most, how in TILES]
        self._combine = Combine(context)
        self._activation = GroupedActivation(context) if shape.code else None

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        act_and_mul: Act,
        added: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `llmfw.ops.reference_moe.moe_experts`."""
        x, (tokens, top_k) = dense(x), experts.shape
        added = None if added is None else dense(added.to(x.dtype))
        if not tokens:
            return torch.empty_like(x)
        weights, experts = weights.float().contiguous(), experts.long().contiguous()
        act = self._between(act_and_mul)
        mean = tokens * top_k / self._experts  # rows of an expert
        if (mean <= 1 or tokens == 1) and top_k <= LANES:
            up = self._up_one if tokens == 1 else self._up_few
            inner = act(up(x, experts, gate_up, gate_up_bias))
            return self._down(inner, weights, experts, down, down_bias, added)
        if mean >= MANY_ROWS and self._library is not None:
            return self._by_library(
                x, weights, experts, gate_up, down, gate_up_bias, down_bias, act_and_mul, added
            )
        tiles = next((each for most, each in self._tiles if mean <= most), self._tiles[-1][1])
        ordered = tiles.order(experts)
        inner = act(tiles.up(x, ordered, top_k, gate_up, gate_up_bias))
        out = tiles.down(inner, ordered, top_k, down)
        return self._combine(out, weights, experts, down_bias, added)

    def _between(self, act_and_mul: Act) -> Act:
        """What stands between own products: nothing where the first ends with the activation."""
        if self._activation is not None:
            return _nothing
        return lambda inner: dense(act_and_mul(inner).to(inner.dtype))

    def _by_library(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        act_and_mul: Act,
        added: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self._library is not None
        ordered = self._tiles[-1][1].order(experts)
        rows = x.index_select(0, ordered.order // experts.shape[1])  # [pairs, hidden]
        inner = self._library(rows, gate_up.transpose(1, 2), offs=ordered.ends)
        if self._activation is not None:
            inner = self._activation(inner, ordered, experts, gate_up_bias)
        else:
            if gate_up_bias is not None:
                inner += gate_up_bias[experts.flatten().index_select(0, ordered.order)]
            inner = self._between(act_and_mul)(inner)
        out = self._library(inner, down.transpose(1, 2), offs=ordered.ends)
        return self._combine(out, weights, experts, down_bias, added, ordered.place)


def _nothing(x: torch.Tensor) -> torch.Tensor:
    return x


def moe_experts(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `moe_experts` for one shape and activation."""
    return CupyExperts(context)
