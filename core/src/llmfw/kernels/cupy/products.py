"""What the products of few rows share: buckets of rows, variants of a kernel, and their launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import Launcher
from llmfw.ops.kernel import OpContext

WARPS = 8
GEMV_ROWS = (1, 2, 4)  # of exactly so many rows
SKINNY_ROWS = (8, 16, 32, 64)
BUCKETS = GEMV_ROWS + SKINNY_ROWS  # greatest number of rows that one choice serves

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, int], None]


@dataclass(frozen=True)
class Variant:
    """One kernel for one bucket of rows.

    Args:
        source: Its file; the function has the file's name.
        name: For messages and results.
        outputs: That one block makes.
        defines: Constants of the source besides IN and ROWS.
        takes_rows: Whether it is told the number of rows; else it serves exactly its bucket.
    """

    source: str
    name: str
    outputs: int
    defines: tuple[tuple[str, int], ...]
    takes_rows: bool = False

    def constants(self, bucket: int, context: OpContext) -> dict[str, int]:
        """The source's compile-time constants."""
        return {"IN": context["in_features"], "ROWS": bucket, **dict(self.defines)}

    def build(self, bucket: int, context: OpContext, outputs: int) -> Product:
        """Compile; the result is called with (x, weight, bias, out, rows)."""
        constants = self.constants(bucket, context)
        module = load(self.source, context.info.device, context.dtype, **constants)
        grid, block = (-(-outputs // self.outputs), 1, 1), (WARPS * 32, 1, 1)
        launch = module.launcher(
            self.source.removesuffix(".cu"), "PPPPii" if self.takes_rows else "PPPPi"
        )
        return (_with_rows if self.takes_rows else _exact)(launch, grid, block, outputs)


def gemv_variant(name: str, r: int, k: int, u: int, **more: int) -> Variant:
    """gemv.cu with r outputs a warp, k warps that share them and u packs in flight."""
    defines = (("OUTPUTS", r), ("SHARERS", k), ("IN_FLIGHT", u), *more.items())
    return Variant("gemv.cu", f"{name}_r{r}_k{k}_u{u}", r * WARPS // k, defines)


def bucket_of(rows: int) -> int | None:
    """The bucket that serves `rows` (1 to 64), None where none does."""
    if rows in GEMV_ROWS:
        return rows
    return next((bucket for bucket in SKINNY_ROWS if GEMV_ROWS[-1] < rows <= bucket), None)


def by_rows(compiled: Mapping[int, Product]) -> tuple[Product | None, ...]:
    """The product for each number of rows, from those by bucket; ends with the last row served."""
    buckets = [bucket_of(rows) for rows in range(BUCKETS[-1] + 1)]
    table = [None if bucket is None else compiled.get(bucket) for bucket in buckets]
    while table and table[-1] is None:
        table.pop()
    return tuple(table)


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether own kernels can read these tensors."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0 and weight.is_contiguous()


def _exact(
    launch: Launcher, grid: tuple[int, int, int], block: tuple[int, int, int], outputs: int
) -> Product:
    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        rows: int,
    ) -> None:
        bias_pointer = 0 if bias is None else bias.data_ptr()
        launch(grid, block, out.data_ptr(), x.data_ptr(), weight.data_ptr(), bias_pointer, outputs)

    return run


def _with_rows(
    launch: Launcher, grid: tuple[int, int, int], block: tuple[int, int, int], outputs: int
) -> Product:
    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        rows: int,
    ) -> None:
        bias_pointer = 0 if bias is None else bias.data_ptr()
        launch(
            grid,
            block,
            out.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            bias_pointer,
            outputs,
            rows,
        )

    return run
