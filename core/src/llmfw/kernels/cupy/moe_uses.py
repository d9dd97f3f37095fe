"""How the experts' kernels share their work, and the sources with constants that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from llmfw.kernels.cupy.compile import Constant
from llmfw.ops.kernel import OpContext

WARPS = 8
ORDER_THREADS = 512
ROW_THREADS = 128
GROUPED_THREADS = 128
SLICE_BYTES = 128  # of a row, in one stage of moe_grouped.cu
TILE_INTS = 4

Use = tuple[str, dict[str, Constant]]  # a source and its constants


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


def gemv_use(shape: Shape, how: Gemv, *, up: bool) -> Use:
    """moe_gemv.cu for one of the two products."""
    own = shape.up_constants() if up else shape.down_constants()
    return "moe_gemv.cu", {**own, **how.constants()}


def grouped_use(shape: Shape, how: Grouped, *, up: bool) -> Use:
    """moe_grouped.cu for one of the two products."""
    own = shape.up_constants() if up else shape.down_constants()
    return "moe_grouped.cu", {**own, **how.constants(), "UP": int(up)}


def order_use(shape: Shape, rows: int) -> Use:
    """moe_order.cu for tiles of so many rows."""
    return "moe_order.cu", {"EXPERTS": shape.experts, "ROWS": rows, "THREADS": ORDER_THREADS}


def combine_use(shape: Shape) -> Use:
    """moe_combine.cu."""
    return "moe_combine.cu", {"HIDDEN": shape.hidden, "THREADS": ROW_THREADS}


def activation_use(shape: Shape) -> Use:
    """moe_activation.cu, for an activation that has code."""
    constants = {"WIDTH": shape.width, "THREADS": ROW_THREADS}
    return "moe_activation.cu", {**constants, "ACTIVATION": shape.code}
