"""The op `moe_experts`: own kernels while weights are what is waited for, the library above.

A few tokens go pair by pair through moe_gemv.cu, more in tiles of rows through moe_grouped.cu, many
(a prompt) through torch's grouped product, between the same order and sum.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from llmfw.kernels import vendor
from llmfw.kernels.cupy.launch import dense
from llmfw.kernels.cupy.moe_parts import (
    Combine,
    Gemv,
    GemvDown,
    GemvUp,
    Grouped,
    GroupedProduct,
    Order,
)
from llmfw.ops.kernel import OpContext

SLICE = 64  # values of the summed dimension that moe_grouped.cu takes at a time
LANES = 32
FEW_TOKENS = 4  # that go pair by pair
UP = Gemv(1, 4, 2)
DOWN = Gemv(1, 4, 2)
TILES = (Grouped(64, 16, 4), Grouped(64, 32, 4), Grouped(128, 64, 3))
MANY_ROWS = 128  # of an expert on average, from which the library serves

Act = Callable[[torch.Tensor], torch.Tensor]


def supports(context: OpContext) -> str | None:
    """Both summed dimensions must be whole slices."""
    for name in ("hidden_size", "intermediate_size"):
        if context[name] % SLICE:
            return f"{name} {context[name]} is not a multiple of {SLICE}"
    return None


class TileProducts:
    """Order, both products and the sum, for tiles of one size."""

    def __init__(self, context: OpContext, how: Grouped) -> None:
        self.order = Order(context, how.rows)
        self.up = GroupedProduct(context, how, up=True)
        self.down = GroupedProduct(context, how, up=False)


class CupyExperts:
    """The op for one shape and activation; called as the reference is."""

    def __init__(self, context: OpContext) -> None:
        self._experts = context["num_experts"]
        self._fused = bool(context.code)
        product = vendor.grouped_product()
        self._library = product if context.dtype == torch.bfloat16 else None
        with ThreadPoolExecutor(max_workers=4) as pool:
            tiles = [pool.submit(TileProducts, context, how) for how in TILES]
            up, down = pool.submit(GemvUp, context, UP), pool.submit(GemvDown, context, DOWN)
            self._tiles = {how.rows: job.result() for how, job in zip(TILES, tiles, strict=True)}
            self._gemv_up, self._gemv_down = up.result(), down.result()
        self._combine = Combine(context)

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
    ) -> torch.Tensor:
        """See `llmfw.ops.reference_moe.moe_experts`."""
        x, (tokens, top_k) = dense(x), experts.shape
        if not tokens:
            return torch.empty_like(x)
        weights, experts = weights.contiguous(), experts.contiguous()
        act = _nothing if self._fused else act_and_mul
        if tokens <= FEW_TOKENS and top_k <= LANES:
            inner = act(self._gemv_up(x, experts, gate_up, gate_up_bias))
            return self._gemv_down(inner, weights, experts, down, down_bias)
        mean = tokens * top_k / self._experts
        if mean >= MANY_ROWS and self._library is not None:
            return self._by_library(
                x, weights, experts, gate_up, down, gate_up_bias, down_bias, act_and_mul
            )
        tiles = self._tiles[rows_of_tile(mean)]
        ordered = tiles.order(experts)
        inner = act(tiles.up(x, ordered, top_k, gate_up, gate_up_bias))
        out = tiles.down(inner, ordered, top_k, down)
        return self._combine(out, weights, experts, down_bias)

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
    ) -> torch.Tensor:
        assert self._library is not None
        ordered = self._tiles[TILES[-1].rows].order(experts)
        rows = x.index_select(0, ordered.order // experts.shape[1])  # [pairs, hidden]
        inner = self._library(rows, gate_up.transpose(1, 2), offs=ordered.ends)
        if gate_up_bias is not None:
            inner += gate_up_bias[experts.flatten().index_select(0, ordered.order)]
        out = self._library(act_and_mul(inner), down.transpose(1, 2), offs=ordered.ends)
        return self._combine(out, weights, experts, down_bias, ordered.place)


def rows_of_tile(mean: float) -> int:
    """The tile for so many rows of an expert on average: most experts need one."""
    return next((how.rows for how in TILES if how.rows >= 2 * mean), TILES[-1].rows)


def _nothing(x: torch.Tensor) -> torch.Tensor:
    return x


def moe_experts(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `moe_experts` for one shape and activation."""
    return CupyExperts(context)
