"""Cases of the products that share an RMS norm, and every variant that can serve them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch

from gpu.kernel_cases import Arguments, Case, randn
from llmfw.kernels.cupy import normed_linear
from llmfw.kernels.cupy.gemv import Gemv, gemv_variants
from llmfw.kernels.cupy.normed_linear import bucket_of
from llmfw.kernels.cupy.products import Role
from llmfw.kernels.cupy.streamed import CUTS, Streamed, servable
from llmfw.ops.kernel import OpContext

OPS = ("add_linear", "normed_linear", "normed_gated_linear")
ROWS = (1, 2, 3, 4, 5, 8, 17, 32, 63, 64, 65)
# inputs, results, wide: within a tile, tiles not filled, more of them than blocks, those of models
SIZES = {
    "add_linear": (
        (64, 8, False),
        (192, 136, False),
        (1000, 264, False),
        (2048, 1024, True),
        (14336, 4096, True),
    ),
    "normed_linear": (
        (64, 8, False),
        (192, 136, False),
        (1000, 264, False),
        (4096, 6144, True),
    ),
    "normed_gated_linear": (
        (64, 8, False),
        (192, 136, False),
        (1000, 24, False),
        (1024, 3072, True),
    ),
}


def normed_cases() -> list[Case]:
    """Row counts of every bucket, and beyond."""
    return [case for op in OPS for size in SIZES[op] for case in cases_of(op, *size)]


def cases_of(op: str, inner: int, outer: int, wide: bool) -> Iterator[Case]:
    """One op and weight shape."""
    for rows in ROWS:
        label = f"{rows}x{inner}-{outer}"
        facts = {"rows": rows}
        if op == "add_linear":
            shape = {"in_features": inner, "out_features": outer}
            draw = adding(rows, inner, outer, float(rows % 2))
            yield Case(op, "bfloat16", shape, draw, label, mutated=(2,), wide=wide, facts=facts)
            continue
        name, each = ("out_features", 1) if op == "normed_linear" else ("intermediate_size", 2)
        for bias in (0, 1):
            shape = {"in_features": inner, name: outer, "bias": bias}
            draw = normed(rows, inner, outer * each, bias)
            yield Case(op, "bfloat16", shape, draw, label + "b" * bias, wide=wide, facts=facts)


def adding(rows: int, inner: int, outer: int, offset: float) -> Callable[..., Arguments]:
    """Draws what add_linear takes."""

    def draw(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        def values(*size: int, scale: float = 1.0) -> torch.Tensor:
            return randn(*size, device=device, dtype=dtype, generator=generator, scale=scale)

        weight = values(outer, inner, scale=inner**-0.5)
        return (values(rows, inner), weight, values(rows, outer), values(outer), offset), {}

    return draw


def normed(rows: int, inner: int, outer: int, biased: int) -> Callable[..., Arguments]:
    """Draws what normed_linear takes; rows differ in size, and squares lie in several parts."""

    def draw(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Arguments:
        def values(*size: int, scale: float = 1.0) -> torch.Tensor:
            return randn(*size, device=device, dtype=dtype, generator=generator, scale=scale)

        residual = values(rows, inner) * (1 + torch.arange(rows, device=device) % 5)[:, None]
        residual = residual.to(dtype)
        x = (residual.float() * torch.linspace(0.5, 2, inner, device=device)).to(dtype)
        parts = (4, 12, 132)[rows % 3]
        squares = torch.zeros(rows, parts, device=device)
        squares.index_add_(
            1, torch.arange(inner, device=device) * 7 % parts, residual.float().square()
        )
        weight = values(outer, inner, scale=inner**-0.5)
        bias = values(outer) if biased else None
        return (x, residual, squares, weight, bias, 1e-5), {}

    return draw


def normed_variants(
    context: OpContext, rows: int, without: Collection[str] = ()
) -> Iterator[Callable[..., Any]]:
    """The op by each variant that can serve so many rows, worth it or not.

    without: Sources whose variants are left out.
    """
    bucket = bucket_of(rows)
    if bucket is None:
        return
    role = Role.ADDS if context.op == "add_linear" else Role.NORMED
    is_gated = context.op == "normed_gated_linear"
    found: tuple[Gemv | Streamed, ...] = ()
    if bucket == 1:
        found = gemv_variants(bucket, context["in_features"], context.dtype, gated=is_gated)
    elif servable(context):
        found = tuple(Streamed(*cut, gated=is_gated) for cut in CUTS)
    for variant in (each for each in found if each.source not in without):
        yield getattr(normed_linear, context.op)(context, {bucket: replace(variant, role=role)})
