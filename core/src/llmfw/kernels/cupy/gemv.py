"""Variants of gemv.cu: products of exactly 1, 2 or 4 rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import pointer
from llmfw.kernels.cupy.products import GEMV_ROWS, NO_NORM, NormArguments, NormedProduct, Role
from llmfw.ops.kernel import OpContext

WARPS = 8
PACK_BYTES = 16

# By bucket: outputs of a warp, warps that share them, packs in flight. Of 14 triples these come
# within 1.2 % of the best for every product of the models in docs/benchmarks.md.
TRIPLES = {
    1: ((1, 8, 2), (2, 8, 2), (1, 2, 2), (1, 4, 4)),
    2: ((2, 8, 2), (2, 4, 4), (1, 8, 2), (1, 2, 4)),
    4: ((4, 2, 2), (2, 2, 2), (1, 4, 4), (2, 4, 4)),
}
GATED_TRIPLES = ((1, 1, 2), (1, 2, 2), (1, 4, 2), (1, 8, 2))
SINGLE_WARPS = (1, 1, 4)  # for short rows


@dataclass(frozen=True)
class Gemv:
    """gemv.cu with its constants.

    Args:
        outputs: Of a warp (GATED: pairs of rows of the weight).
        sharers: Warps that share them.
        in_flight: Packs of each row that a lane has asked for.
        gated: Whether silu(gate) * up ends the product.
        role: What it does for a norm beside it.
    """

    outputs: int
    sharers: int
    in_flight: int
    gated: bool = False
    role: Role = Role.PLAIN
    source: str = "gemv.cu"

    @property
    def name(self) -> str:
        """For messages and results."""
        kind = "gated" if self.gated else "gemv"
        return f"{kind}_r{self.outputs}_k{self.sharers}_u{self.in_flight}"

    def constants(self, bucket: int, context: OpContext) -> dict[str, int]:
        """The source's compile-time constants."""
        return {
            "IN": context["in_features"],
            "ROWS": bucket,
            "OUTPUTS": self.outputs,
            "SHARERS": self.sharers,
            "IN_FLIGHT": self.in_flight,
            "GATED": int(self.gated),
            **self.role.constants,
        }

    def parts(self, outputs: int) -> int:
        """Parts of the squares that it writes: none, the next product reads the residual."""
        return 0

    def build(self, bucket: int, context: OpContext, outputs: int) -> NormedProduct:
        """Compile; the result is called with (x, weight, bias, out, rows) and what its role needs.

        It serves exactly `bucket` rows.
        """
        constants = self.constants(bucket, context)
        module = load(self.source, context.info.device, context.dtype, **constants)
        launch = module.launcher("gemv", "PPPPiPPf")
        grid = (-(-outputs * self.sharers // (self.outputs * WARPS)), 1, 1)
        block = (WARPS * 32, 1, 1)

        def run(
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            out: torch.Tensor,
            rows: int,
            norm: NormArguments = NO_NORM,
        ) -> None:
            launch(
                grid,
                block,
                out.data_ptr(),
                x.data_ptr(),
                weight.data_ptr(),
                pointer(bias),
                outputs,
                norm.residual,
                norm.norm_weight,
                norm.number,
            )

        return run


def gemv_variants(
    bucket: int, in_features: int, dtype: torch.dtype, gated: bool = False
) -> tuple[Gemv, ...]:
    """What may serve exactly `bucket` rows: no warp without a part of them."""
    if bucket not in GEMV_ROWS:
        return ()
    stretch = 32 * PACK_BYTES // dtype.itemsize
    triples = GATED_TRIPLES if gated else (*TRIPLES[bucket], SINGLE_WARPS)
    return tuple(
        Gemv(*triple, gated=gated)
        for triple in triples
        if (triple[1] * stretch <= in_features if triple[1] > 1 else in_features < WARPS * stretch)
    )
