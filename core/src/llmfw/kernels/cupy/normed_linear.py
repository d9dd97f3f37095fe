"""The ops `add_linear`, `normed_linear`, `normed_gated_linear`: an RMS norm inside two products.

The product before the norm adds to the residual and multiplies by the norm's weight where it stores
its results, the one after it divides its sums by the root mean square: no kernel lies between them.
gemv.cu (1, 2 and 4 rows) and streamed.cu (5 to 64) serve, by the variants that tune.py chose for
the same product alone; for other rows the product does, with torch's operations beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from llmfw.kernels.cupy import gated_linear as gated
from llmfw.kernels.cupy import linear as plain
from llmfw.kernels.cupy.compile import compile_ahead
from llmfw.kernels.cupy.gemv import Gemv
from llmfw.kernels.cupy.launch import pointer
from llmfw.kernels.cupy.products import (
    NormArguments,
    NormedProduct,
    Role,
    Variant,
    bucket_of,
    serves,
)
from llmfw.kernels.cupy.streamed import PARTS_MULTIPLE, Streamed
from llmfw.kernels.cupy.tune import choices
from llmfw.ops.kernel import OpContext
from llmfw.ops.reference_normed import row_squares

PACK = 8  # values of 16 bytes
Chosen = Mapping[int, Gemv | Streamed]  # by bucket of rows


def supports(context: OpContext) -> str | None:
    """Rows of inputs and of results must be whole 16-byte packs."""
    odd = [name for name, size in context.shape.items() if name != "bias" and size % PACK]
    return f"{', '.join(odd)} not a multiple of {PACK}" if odd else None


def with_role(chosen: Mapping[int, Variant], role: Role) -> Chosen:
    """What was chosen for the product alone, with a role, where it can have one."""
    return {
        bucket: replace(variant, role=role)
        for bucket, variant in chosen.items()
        if isinstance(variant, Gemv | Streamed)
    }


class Products:
    """The kernels of one op and shape, by rows.

    Args:
        context: Of the op.
        outputs: Values of a row of the result.
        chosen: A kernel for each bucket that is served.
    """

    def __init__(self, context: OpContext, outputs: int, chosen: Chosen) -> None:
        device, dtype = context.info.device, context.dtype
        if device.type == "cuda":
            uses = [(one.source, one.constants(rows, context)) for rows, one in chosen.items()]
            compile_ahead(device, dtype, uses)
        self._names = {rows: one.name for rows, one in chosen.items()}
        self._built = {
            rows: (one.build(rows, context, outputs), one.parts(outputs))
            for rows, one in chosen.items()
        }

    @property
    def details(self) -> str:
        """Which kernel serves how many rows."""
        rows = "; ".join(f"up to {rows} rows: {name}" for rows, name in self._names.items())
        return rows or "no own kernel"

    def serves_rows(self, rows: int) -> bool:
        """Whether one of them serves so many rows."""
        return bucket_of(rows) in self._built

    def of(self, rows: int) -> tuple[NormedProduct, int] | None:
        """The kernel for so many rows and the parts of squares that it writes, None without one."""
        bucket = bucket_of(rows)
        return None if bucket is None else self._built.get(bucket)


def add_linear(
    context: OpContext, chosen: Chosen | None = None
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """The op `add_linear` for one weight shape; `chosen` in place of the tuning's choice."""
    in_features, outputs = context["in_features"], context["out_features"]
    product = _linear_context(context)
    otherwise = plain.linear(product)
    if chosen is None:
        chosen = with_role(choices(plain.contest(product)), Role.ADDS)
    products = Products(context, outputs, chosen)

    def call(
        x: torch.Tensor,
        weight: torch.Tensor,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        offset: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = x.numel() // in_features
        found = products.of(rows)
        alike = x.dtype is residual.dtype is norm_weight.dtype
        if found is None or not alike or not (serves(x, weight) and serves(residual, norm_weight)):
            residual += otherwise(x, weight)
            scaled = residual.float() * (offset + norm_weight.float())
            return scaled.to(x.dtype), row_squares(residual)[..., None]
        run, parts = found
        scaled, squares = torch.empty_like(residual), None
        if parts:
            size = (*residual.shape[:-1], parts)
            squares = torch.empty(size, dtype=torch.float32, device=x.device)
        beside = residual.data_ptr(), norm_weight.data_ptr(), pointer(squares)
        run(x, weight, None, scaled, rows, NormArguments(*beside, parts, offset))
        return scaled, squares

    call.serves_rows = products.serves_rows  # type: ignore[attr-defined]
    call.details = products.details  # type: ignore[attr-defined]
    return call


def normed_linear(context: OpContext, chosen: Chosen | None = None) -> Callable[..., torch.Tensor]:
    """The op `normed_linear` for one weight shape; `chosen` in place of the tuning's choice."""
    product = _linear_context(context)
    if chosen is None:
        chosen = with_role(choices(plain.contest(product)), Role.NORMED)
    return _normed(context, context["out_features"], chosen, plain.linear(product))


def normed_gated_linear(
    context: OpContext, chosen: Chosen | None = None
) -> Callable[..., torch.Tensor]:
    """The op `normed_gated_linear` for one shape; `chosen` in place of the tuning's choice."""
    product = OpContext("gated_linear", context.dtype, context.info, context.shape)
    if chosen is None:
        chosen = with_role(choices(gated.contest(product)), Role.NORMED)
    return _normed(context, context["intermediate_size"], chosen, gated.gated_linear(product))


def _normed(
    context: OpContext, outputs: int, chosen: Chosen, otherwise: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """What the two ops after a norm share."""
    in_features, products = context["in_features"], Products(context, outputs, chosen)
    streamed = {bucket for bucket, one in chosen.items() if isinstance(one, Streamed)}

    def readable(
        rows: int, x: torch.Tensor, residual: torch.Tensor, squares: torch.Tensor | None
    ) -> bool:
        if bucket_of(rows) not in streamed:
            return residual.dtype is x.dtype and serves(residual, x)
        if squares is None or squares.shape[-1] % PARTS_MULTIPLE:
            return False
        return squares.dtype is torch.float32 and serves(squares, x)

    def call(
        x: torch.Tensor,
        residual: torch.Tensor,
        squares: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> torch.Tensor:
        rows = x.numel() // in_features
        found = products.of(rows)
        if found is None or not serves(x, weight) or not readable(rows, x, residual, squares):
            scale = torch.rsqrt(row_squares(residual, squares) / in_features + eps)
            return otherwise((x.float() * scale[..., None]).to(x.dtype), weight, bias)
        run, _ = found
        out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
        parts = 0 if squares is None else squares.shape[-1]
        norm = NormArguments(residual.data_ptr(), 0, pointer(squares), parts, eps)
        run(x, weight, bias, out, rows, norm)
        return out

    call.serves_rows = products.serves_rows  # type: ignore[attr-defined]
    call.details = products.details  # type: ignore[attr-defined]
    return call


def _linear_context(context: OpContext) -> OpContext:
    """That of `linear` for the same weight."""
    shape = {"bias": 0, **context.shape}
    return OpContext("linear", context.dtype, context.info, shape)
