"""The op `linear`: own kernels for few rows where they are faster, cuBLAS for the rest.

gemv.cu serves 1, 2 and 4 rows, streamed.cu (tensor cores) 5 to 64, tiled.cu 65 to 256; tune.py
measures which variant, if any, beats cuBLAS for a shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from llmfw.kernels.cupy.gemv import gemv_variants
from llmfw.kernels.cupy.products import (
    Variant,
    by_rows,
    served_buckets,
    serves,
    unannounced_bias,
)
from llmfw.kernels.cupy.streamed import streamed_variants
from llmfw.kernels.cupy.tile_plan import tiled_variants
from llmfw.kernels.cupy.tune import Contest, choices, details
from llmfw.ops.kernel import OpContext


def supports(context: OpContext) -> str | None:
    """Rows of the weight must be whole 16-byte packs."""
    size, pack = context["in_features"], 16 // context.dtype.itemsize
    return f"{size} inputs are not a multiple of {pack}" if size % pack else None


def variants(bucket: int, context: OpContext) -> tuple[Variant, ...]:
    """The kernels that can serve up to `bucket` rows (exactly so many up to 4)."""
    return (
        *gemv_variants(bucket, context["in_features"], context.dtype),
        *streamed_variants(bucket, context, context["out_features"]),
        *tiled_variants(bucket, context, context["out_features"]),
    )


def contest(context: OpContext) -> Contest:
    """What may serve the op for one weight shape."""
    return Contest(
        context,
        {bucket: variants(bucket, context) for bucket in served_buckets()},
        weight_rows=context["out_features"],
        outputs=context["out_features"],
        otherwise=F.linear,
    )


def linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `linear` for one weight shape, with the kernels that the tuning run chose."""
    in_features, out_features = context["in_features"], context["out_features"]
    competing = contest(context)
    chosen = choices(competing)
    table = by_rows({b: variant.build(b, context, out_features) for b, variant in chosen.items()})
    limit, biased = len(table), bool(context["bias"])

    def call(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if bias is not None and not biased:
            raise unannounced_bias(context)
        rows = x.numel() // in_features
        if rows < limit:
            run = table[rows]
            if run is not None and serves(x, weight):
                out = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
                run(x, weight, bias, out, rows)
                return out
        return F.linear(x, weight, bias)

    call.details = details(competing, chosen)  # type: ignore[attr-defined]
    return call
