"""The ops `add_linear`, `normed_linear`, `normed_gated_linear`: an RMS norm inside two products.

The product before the norm adds to the residual and multiplies by the norm's weight where it stores
its results, the one after it divides its sums by the root mean square: no kernel lies between them.
gemv.cu (one row) and streamed.cu (2 to 64) serve, by the variants that tune.py found best for the
same product alone; the reference for other rows, which a model does not ask for.
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
    STREAMED_ROWS,
    NormArguments,
    NormedProduct,
    Role,
    Variant,
    serves,
    unannounced_bias,
)
from llmfw.kernels.cupy.streamed import PARTS_MULTIPLE, Streamed
from llmfw.kernels.cupy.tune import choices
from llmfw.ops import reference_normed
from llmfw.ops.kernel import OpContext

PACK = 8  # values of 16 bytes
BUCKETS = (1, *STREAMED_ROWS)  # gemv.cu would read the residual as often as x, and that costs
MARGIN = 1.05  # of the time of the product alone, for a kernel and a boundary are saved
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
        if bucket in BUCKETS and isinstance(variant, Gemv | Streamed)
    }


def bucket_of(rows: int) -> int | None:
    """The bucket that serves `rows` (1 to 64), None where none does."""
    return next((bucket for bucket in BUCKETS if 0 < rows <= bucket), None)


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
    if chosen is None:
        competing = plain.contest(_linear_context(context))
        chosen = with_role(choices(competing, MARGIN), Role.ADDS)
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
            return reference_normed.add_linear(x, weight, residual, norm_weight, offset)
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
    if chosen is None:
        competing = plain.contest(_linear_context(context))
        chosen = with_role(choices(competing, MARGIN), Role.NORMED)
    return _normed(context, context["out_features"], chosen, reference_normed.normed_linear)


def normed_gated_linear(
    context: OpContext, chosen: Chosen | None = None
) -> Callable[..., torch.Tensor]:
    """The op `normed_gated_linear` for one shape; `chosen` in place of the tuning's choice."""
    if chosen is None:
        alone = OpContext("gated_linear", context.dtype, context.info, context.shape)
        chosen = with_role(choices(gated.contest(alone), MARGIN), Role.NORMED)
    width = context["intermediate_size"]
    return _normed(context, width, chosen, reference_normed.normed_gated_linear)


def _normed(
    context: OpContext, outputs: int, chosen: Chosen, otherwise: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """What the two ops after a norm share."""
    in_features, biased = context["in_features"], bool(context["bias"])
    products = Products(context, outputs, chosen)
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
        if bias is not None and not biased:
            raise unannounced_bias(context)
        rows = x.numel() // in_features
        found = products.of(rows)
        if found is None or not serves(x, weight) or not readable(rows, x, residual, squares):
            return otherwise(x, residual, squares, weight, bias, eps)
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
