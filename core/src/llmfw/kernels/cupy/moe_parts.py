"""Launchers of what the experts' op is made of: products of few and of many rows, order, sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmfw.kernels.cupy.compile import Constant, load
from llmfw.kernels.cupy.launch import Launcher, pointer
from llmfw.ops.kernel import OpContext

WARPS = 8
ORDER_THREADS = 512
COMBINE_THREADS = 128
GROUPED_THREADS = 128
SLICE_BYTES = 128  # of a row, in one stage of moe_grouped.cu
TILE_INTS = 4


@dataclass(frozen=True)
class Gemv:
    """How moe_gemv.cu shares its work: outputs a warp, warps that share them, packs in flight."""

    outputs: int
    sharers: int
    in_flight: int

    @property
    def made(self) -> int:
        """Outputs of a block."""
        return self.outputs * WARPS // self.sharers

    def constants(self) -> dict[str, Constant]:
        """The source's constants."""
        return {"OUTPUTS": self.outputs, "SHARERS": self.sharers, "IN_FLIGHT": self.in_flight}


@dataclass(frozen=True)
class Grouped:
    """The tile of moe_grouped.cu: rows of the weight, rows of x, stages of the copies."""

    wide: int
    rows: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.stages * (self.wide + self.rows) * SLICE_BYTES

    def constants(self) -> dict[str, Constant]:
        """The source's constants."""
        return {"WIDE": self.wide, "ROWS": self.rows, "STAGES": self.stages}


@dataclass(frozen=True)
class Shape:
    """The experts' sizes, and what their first product ends with."""

    experts: int
    hidden: int
    width: int
    code: str

    @classmethod
    def of(cls, context: OpContext) -> Shape:
        """From the op's context."""
        return cls(
            context["num_experts"],
            context["hidden_size"],
            context["intermediate_size"],
            context.code,
        )

    @property
    def up_outputs(self) -> int:
        """Values of a row that the first product leaves: gate and up where nothing is fused."""
        return self.width if self.code else 2 * self.width

    def up_constants(self) -> dict[str, Constant]:
        """Constants of the first product."""
        fused: dict[str, Constant] = {"ACTIVATION": self.code} if self.code else {}
        return {"IN": self.hidden, "GATED": int(bool(self.code)), **fused}

    def down_constants(self) -> dict[str, Constant]:
        """Constants of the second product."""
        return {"IN": self.width, "GATED": 0}


class GemvUp:
    """moe_up: the first product for each pair of a token and an expert."""

    def __init__(self, context: OpContext, how: Gemv) -> None:
        shape = Shape.of(context)
        self._outputs = shape.up_outputs
        constants = {**shape.up_constants(), **how.constants()}
        module = load("moe_gemv.cu", context.info.device, context.dtype, **constants)
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
        constants = {**shape.down_constants(), **how.constants()}
        module = load("moe_gemv.cu", context.info.device, context.dtype, **constants)
        self._launch = module.launcher("moe_down", "PPPPPPii")
        self._blocks = -(-self._outputs // how.made)

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
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
        constants = {"EXPERTS": self._experts, "ROWS": rows, "THREADS": ORDER_THREADS}
        module = load("moe_order.cu", context.info.device, context.dtype, **constants)
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
        own = shape.up_constants() if up else shape.down_constants()
        constants = {**own, **how.constants(), "UP": int(up)}
        module = load("moe_grouped.cu", context.info.device, context.dtype, **constants)
        self._launch: Launcher = module.launcher("moe_grouped", "PPPPPPii", how.shared_bytes)
        made = how.wide // 2 if own["GATED"] else how.wide
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
        module = load(
            "moe_combine.cu",
            context.info.device,
            context.dtype,
            HIDDEN=self._hidden,
            THREADS=COMBINE_THREADS,
        )
        self._launch = module.launcher("moe_combine", "PPPPPPi")
        self._blocks = -(-packs // COMBINE_THREADS)

    def __call__(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        bias: torch.Tensor | None,
        place: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [pairs, hidden] by pair, or by `place` -> [tokens, hidden]."""
        tokens, top_k = experts.shape
        out = torch.empty((tokens, self._hidden), dtype=x.dtype, device=x.device)
        self._launch(
            (self._blocks, tokens, 1),
            (COMBINE_THREADS, 1, 1),
            out.data_ptr(),
            x.data_ptr(),
            weights.data_ptr(),
            experts.data_ptr(),
            pointer(bias),
            pointer(place),
            top_k,
        )
        return out
