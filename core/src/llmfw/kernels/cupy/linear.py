"""The op `linear`: own kernels for few rows where they are faster, cuBLAS for the rest.

gemv.cu serves 1, 2 and 4 rows, skinny.cu (tensor cores) 5 to 64; tune.py measures which variant, if
any, beats cuBLAS for a shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from llmfw.kernels.cupy.products import (
    BUCKETS,
    GEMV_ROWS,
    WARPS,
    Variant,
    by_rows,
    gemv_variant,
    serves,
)
from llmfw.kernels.cupy.tune import Contest, choices
from llmfw.ops.kernel import OpContext

# By bucket: outputs of a warp, warps that share them, packs in flight. Of 14 triples these come
# within 1.2 % of the best for every product of the models in docs/benchmarks.md.
GEMV_VARIANTS = {
    1: ((1, 8, 2), (2, 8, 2), (1, 2, 2), (1, 4, 4)),
    2: ((2, 8, 2), (2, 4, 4), (1, 8, 2), (1, 2, 4)),
    4: ((4, 2, 2), (2, 2, 2), (1, 4, 4), (2, 4, 4)),
}
SINGLE_WARPS = (1, 1, 4)  # for short rows
SKINNY_VARIANTS = {8: ((1, 8), (2, 8), (2, 2)), 16: ((1, 8), (2, 8), (2, 2))}


def supports(context: OpContext) -> str | None:
    """Rows of the weight must be whole 16-byte packs."""
    size, pack = context["in_features"], 16 // context.dtype.itemsize
    return f"{size} inputs are not a multiple of {pack}" if size % pack else None


def variants(bucket: int, in_features: int, dtype: torch.dtype) -> tuple[Variant, ...]:
    """The kernels that can serve up to `bucket` rows (exactly so many up to 4)."""
    if bucket in GEMV_ROWS:
        stretch = 32 * 16 // dtype.itemsize
        return tuple(
            gemv_variant("gemv", r, k, u)
            for r, k, u in (*GEMV_VARIANTS[bucket], SINGLE_WARPS)
            if (k * stretch <= in_features if k > 1 else in_features < 8 * stretch)
        )
    if dtype.itemsize != 2 or in_features % 64:
        return ()
    return tuple(
        Variant(
            "skinny.cu",
            f"skinny_t{t}_k{k}",
            16 * t * WARPS // k,
            (("WEIGHT_TILES", t), ("SHARERS", k)),
            takes_rows=True,
        )
        for t, k in SKINNY_VARIANTS.get(bucket, ())
        if k * 64 <= in_features
    )


def contest(context: OpContext) -> Contest:
    """What may serve the op for one weight shape."""
    in_features, outputs = context["in_features"], context["out_features"]
    return Contest(
        context,
        {bucket: variants(bucket, in_features, context.dtype) for bucket in BUCKETS},
        weight_rows=outputs,
        outputs=outputs,
        otherwise=F.linear,
    )


def linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `linear` for one weight shape, with the kernels that the tuning run chose."""
    in_features, out_features = context["in_features"], context["out_features"]
    table = by_rows(
        {
            bucket: variant.build(bucket, context, out_features)
            for bucket, variant in choices(contest(context)).items()
        }
    )
    limit = len(table)

    def call(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = x.numel() // in_features
        if rows < limit:
            run = table[rows]
            if run is not None and serves(x, weight):
                out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
                run(x, weight, bias, out, rows)
                return out
        return F.linear(x, weight, bias)

    return call
