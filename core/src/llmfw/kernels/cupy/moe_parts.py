"""Launchers of what the experts' op is made of: products of few and of many rows, order, sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmfw.kernels.cupy.compile import Module, load
from llmfw.kernels.cupy.launch import Launcher, pointer
from llmfw.kernels.cupy.moe_uses import (
    GROUPED_THREADS,
    ORDER_THREADS,
    ROW_THREADS,
    TILE_INTS,
    WARPS,
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


def loaded(context: OpContext, use: Use) -> Module:
    """The source on the context's device."""
    source, constants = use
    return load(source, context.info.device, context.dtype, **constants)


class GemvUp:
    """moe_up: the first product for each pair of a token and an expert."""

    def __init__(self, context: OpContext, how: Gemv) -> None:
        shape = Shape.of(context)
        self._outputs = shape.up_outputs
        module = loaded(context, gemv_use(shape, how, up=True))
        self._launch = module.launcher("moe_up", "PPPPPii")
        self._blocks = -(-self._outputs // how.made)

    def __call__(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [tokens, hidden], experts int64 [tokens, top_k] -> [tokens * top_k, outputs]."""
        pairs = experts.numel()
        out = torch.empty((pairs, self._outputs), dtype=x.dtype, device=x.device)
        self._launch(
            (pairs, self._blocks, 1),
            (WARPS * 32, 1, 1),
            out.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            pointer(bias),
            experts.data_ptr(),
            self._outputs,
            experts.shape[1],
        )
        return out


class GemvDown:
    """moe_down: the second product and the weighted sum over a token's experts."""

    def __init__(self, context: OpContext, how: Gemv) -> None:
        shape = Shape.of(context)
        self._outputs = shape.hidden
        module = loaded(context, gemv_use(shape, how, up=False))
        self._launch = module.launcher("moe_down", "PPPPPPPii")
        self._blocks = -(-self._outputs // how.made)

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        added: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [tokens * top_k, width], weights and experts [tokens, top_k] -> [tokens, hidden]."""
        tokens, top_k = experts.shape
        out = torch.empty((tokens, self._outputs), dtype=x.dtype, device=x.device)
        self._launch(
            (tokens, self._blocks, 1),
            (WARPS * 32, 1, 1),
            out.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            pointer(bias),
            weights.data_ptr(),
            experts.data_ptr(),
            pointer(added),
            self._outputs,
            top_k,
        )
        return out


@dataclass(frozen=True)
class Ordered:
    """Pairs in the experts' order: all int32 on the device.

    Args:
        order: [pairs], the pair at each place.
        place: [pairs], the place of each pair.
        ends: [experts], where each expert's places end.
        tiles: [1 + most, 4], as moe_order.cu tells.
    """

    order: torch.Tensor
    place: torch.Tensor
    ends: torch.Tensor
    tiles: torch.Tensor

    @property
    def most_tiles(self) -> int:
        """Tiles there is room for."""
        return self.tiles.shape[0] - 1


class Order:
    """moe_order: the pairs by expert, cut into tiles of up to `rows`."""

    def __init__(self, context: OpContext, rows: int) -> None:
        self._experts, self._rows = context["num_experts"], rows
        module = loaded(context, order_use(Shape.of(context), rows))
        self._launch = module.launcher("moe_order", "PPPPPi")

    def __call__(self, experts: torch.Tensor) -> Ordered:
        """experts int64 [tokens, top_k], contiguous."""
        pairs = experts.numel()
        most = min(self._experts, pairs) + pairs // self._rows
        sizes = [TILE_INTS * (1 + most), pairs, pairs, self._experts]
        memory = torch.empty(sum(sizes), dtype=torch.int32, device=experts.device)
        tiles, order, place, ends = memory.split(sizes)
        self._launch(
            (1, 1, 1),
            (ORDER_THREADS, 1, 1),
            order.data_ptr(),
            place.data_ptr(),
            ends.data_ptr(),
            tiles.data_ptr(),
            experts.data_ptr(),
            pairs,
        )
        return Ordered(order, place, ends, tiles.view(-1, TILE_INTS))


class GroupedProduct:
    """moe_grouped: one of the two products over tiles of rows that share an expert."""

    def __init__(self, context: OpContext, how: Grouped, *, up: bool) -> None:
        shape = Shape.of(context)
        self._outputs = shape.up_outputs if up else shape.hidden
        module = loaded(context, grouped_use(shape, how, up=up))
        self._launch: Launcher = module.launcher("moe_grouped", "PPPPPPii", how.shared_bytes)
        made = how.wide // 2 if up and shape.code else how.wide
        self._blocks = -(-self._outputs // made)

    def __call__(
        self,
        x: torch.Tensor,
        ordered: Ordered,
        top_k: int,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Up: x [tokens, hidden] -> by place. Down: x by place -> [pairs, hidden] by pair."""
        out = torch.empty((ordered.order.shape[0], self._outputs), dtype=x.dtype, device=x.device)
        self._launch(
            (ordered.most_tiles, self._blocks, 1),
            (GROUPED_THREADS, 1, 1),
            out.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            pointer(bias),
            ordered.tiles.data_ptr(),
            ordered.order.data_ptr(),
            self._outputs,
            top_k,
        )
        return out


class Combine:
    """moe_combine: the weighted sum of each token's rows."""

    def __init__(self, context: OpContext) -> None:
        self._hidden = context["hidden_size"]
        packs = self._hidden * context.dtype.itemsize // 16
        module = loaded(context, combine_use(Shape.of(context)))
        self._launch = module.launcher("moe_combine", "PPPPPPPi")
        self._blocks = -(-packs // ROW_THREADS)

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        bias: torch.Tensor | None,
        added: torch.Tensor | None,
        place: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [pairs, hidden] by pair, or by `place` -> [tokens, hidden]."""
        tokens, top_k = experts.shape
        out = torch.empty((tokens, self._hidden), dtype=x.dtype, device=x.device)
        self._launch(
            (tokens, self._blocks, 1),
            (ROW_THREADS, 1, 1),
            out.data_ptr(),
            x.data_ptr(),
            weights.data_ptr(),
            experts.data_ptr(),
            pointer(bias),
            pointer(place),
            pointer(added),
            top_k,
        )
        return out


class GroupedActivation:
    """moe_activation: the activation that has code, and the bias before it, over ordered rows."""

    def __init__(self, context: OpContext) -> None:
        shape = Shape.of(context)
        self._width = shape.width
        self._launch = loaded(context, activation_use(shape)).launcher("moe_activation", "PPPPP")
        packs = shape.width * context.dtype.itemsize // 16
        self._blocks = -(-packs // ROW_THREADS)

    def __call__(
        self,
        x: torch.Tensor,
        ordered: Ordered,
        experts: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [pairs, 2 * width] by place, experts [tokens, top_k] -> [pairs, width] by place."""
        pairs = x.shape[0]
        out = torch.empty((pairs, self._width), dtype=x.dtype, device=x.device)
        self._launch(
            (pairs, self._blocks, 1),
            (ROW_THREADS, 1, 1),
            out.data_ptr(),
            x.data_ptr(),
            pointer(bias),
            ordered.order.data_ptr(),
            experts.data_ptr(),
        )
        return out
