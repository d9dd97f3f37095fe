"""The op `gated_linear`: gate and up in one product with silu(gate) * up at its end, for few rows.

gemv.cu (1, 2 and 4 rows), streamed.cu (5 to 64) and tiled.cu (65 to 256) serve where they beat the
product and the activation apart; these serve the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmfw.kernels.cupy import linear as plain
from llmfw.kernels.cupy.activation import gated_activation
from llmfw.kernels.cupy.activation import supports as activation_supports
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
    """What the product and the activation support."""
    return plain.supports(_product(context)) or activation_supports(_activation(context))


def variants(bucket: int, context: OpContext) -> tuple[Variant, ...]:
    """The kernels that can serve up to `bucket` rows (exactly so many up to 4)."""
    return (
        *gemv_variants(bucket, context["in_features"], context.dtype, gated=True),
        *streamed_variants(bucket, context, 2 * context["intermediate_size"]),
        *tiled_variants(bucket, context, 2 * context["intermediate_size"]),
    )


def contest(context: OpContext) -> Contest:
    """What may serve the op for one weight shape."""
    width = context["intermediate_size"]
    product, act = plain.linear(_product(context)), gated_activation(_activation(context))

    def apart(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return act(product(x, weight, bias))

    return Contest(
        context,
        {bucket: variants(bucket, context) for bucket in served_buckets()},
        weight_rows=2 * width,
        outputs=width,
        otherwise=apart,
    )


def gated_linear(context: OpContext) -> Callable[..., torch.Tensor]:
    """The op `gated_linear` for one weight shape."""
    in_features, width = context["in_features"], context["intermediate_size"]
    competing = contest(context)
    apart, chosen = competing.otherwise, choices(competing)
    table = by_rows({b: variant.build(b, context, width) for b, variant in chosen.items()})
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
                out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
                run(x, weight, bias, out, rows)
                return out
        return apart(x, weight, bias)

    call.details = details(competing, chosen)  # type: ignore[attr-defined]
    return call


def _product(context: OpContext) -> OpContext:
    shape = {
        "in_features": context["in_features"],
        "out_features": 2 * context["intermediate_size"],
        "bias": context["bias"],
    }
    return OpContext("linear", context.dtype, context.info, shape)


def _activation(context: OpContext) -> OpContext:
    shape = {"intermediate_size": context["intermediate_size"]}
    return OpContext("silu_and_mul", context.dtype, context.info, shape)
