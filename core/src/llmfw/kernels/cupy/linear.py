"""The op `linear`: own kernels for few rows where they are faster, cuBLAS for the rest.

gemv.cu serves 1 to 4 rows, skinny.cu (tensor cores) up to 64; tune.py measures which variant, if
any, beats cuBLAS for a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmfw.kernels.cupy.compile import load
from llmfw.kernels.cupy.launch import Launcher
from llmfw.ops.kernel import OpContext

WARPS = 8
GEMV_ROWS = (1, 2, 3, 4)
SKINNY_ROWS = (8, 16, 32, 64)
BUCKETS = GEMV_ROWS + SKINNY_ROWS  # greatest number of rows that one choice serves
CUBLAS = "cublas"
GEMV_VARIANTS = (
    (1, 1, 4),
    (1, 2, 2),
    (1, 2, 4),
    (1, 4, 2),
    (1, 4, 4),
    (1, 8, 2),
    (2, 1, 2),
    (2, 1, 4),
    (2, 2, 2),
    (2, 4, 2),
    (2, 4, 4),
    (2, 8, 2),
    (4, 2, 2),
    (4, 8, 1),
)
SKINNY_VARIANTS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (2, 8))

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, int], None]


@dataclass(frozen=True)
class Variant:
    """One kernel for one bucket of rows: its source, its name, and the outputs of a block."""

    source: str
    name: str
    outputs: int


def variants(bucket: int, in_features: int, dtype: torch.dtype) -> tuple[Variant, ...]:
    """The kernels that can serve up to `bucket` rows (exactly so many up to 4)."""
    if bucket in GEMV_ROWS:
        stretch = 32 * 16 // dtype.itemsize
        return tuple(
            Variant("gemv.cu", f"gemv_r{r}_k{k}_u{u}", r * WARPS // k)
            for r, k, u in GEMV_VARIANTS
            if k * stretch <= in_features
        )
    if dtype.itemsize != 2 or in_features % 64:
        return ()
    return tuple(
        Variant("skinny.cu", f"skinny_t{t}_k{k}", 16 * t * WARPS // k)
        for t, k in SKINNY_VARIANTS
        if k * 64 <= in_features and (t == 1 or bucket <= 32)
    )


def supports(context: OpContext) -> str | None:
    """Rows of the weight must be whole 16-byte packs."""
    size, pack = context["in_features"], 16 // context.dtype.itemsize
    return f"{size} inputs are not a multiple of {pack}" if size % pack else None


def product(variant: Variant, bucket: int, context: OpContext) -> Product:
    """Compile a variant; the result is called with (x, weight, bias, out, rows)."""
    module = load(
        variant.source, context.info.device, context.dtype, IN=context["in_features"], ROWS=bucket
    )
    outputs = context["out_features"]
    grid, block = (-(-outputs // variant.outputs), 1, 1), (WARPS * 32, 1, 1)
    if variant.source == "gemv.cu":
        return _gemv(module.launcher(variant.name, "PPPPi"), grid, block, outputs)
    return _skinny(module.launcher(variant.name, "PPPPii"), grid, block, outputs)


def _gemv(
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


def _skinny(
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


def bucket_of(rows: int) -> int:
    """The bucket that `rows` (1 to 64) falls into."""
    return next(bucket for bucket in BUCKETS if rows <= bucket)


def linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `linear` for one weight shape, with the kernels that the tuning run chose."""
    from llmfw.kernels.cupy.tune import choices

    in_features, out_features = context["in_features"], context["out_features"]
    chosen = choices(context)
    compiled = {
        bucket: product(variant, bucket, context)
        for bucket, variant in chosen.items()
        if variant is not None
    }
    table = (None, *(compiled.get(bucket_of(rows)) for rows in range(1, BUCKETS[-1] + 1)))
    limit = max((rows for rows, entry in enumerate(table) if entry is not None), default=0)

    def call(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = x.numel() // in_features
        if 0 < rows <= limit:
            run = table[rows]
            if (
                run is not None
                and x.is_contiguous()
                and x.data_ptr() % 16 == 0
                and weight.is_contiguous()
            ):
                out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
                run(x, weight, bias, out, rows)
                return out
        return F.linear(x, weight, bias)

    return call
