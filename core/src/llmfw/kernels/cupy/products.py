"""What the products of few rows share: buckets of rows, the kinds of kernel, who serves which."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple, Protocol

import torch

from llmfw.errors import KernelError, UsageError
from llmfw.ops.kernel import OpContext

GEMV_ROWS = (1, 2, 4)  # of exactly so many rows
STREAMED_ROWS = (8, 16, 32, 64)
TILED_ROWS = (128, 256)
BUCKETS = GEMV_ROWS + STREAMED_ROWS + TILED_ROWS  # most rows that one choice serves

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, int], None]


class Role(Enum):
    """What a product does for an RMS norm that is divided between two of them."""

    PLAIN = "nothing"
    ADDS = "adds to the residual, multiplies by the norm's weight"
    NORMED = "divides by the root mean square"

    @property
    def constants(self) -> dict[str, int]:
        """For gemv.cu and streamed.cu."""
        return {"ADDS": int(self is Role.ADDS), "NORMED": int(self is Role.NORMED)}


class NormArguments(NamedTuple):
    """What a kernel with such a role is given besides: addresses and numbers.

    Args:
        residual: ADDS: added to; NORMED: whose mean square is taken where no squares are given.
        norm_weight: ADDS.
        squares: Sums of parts of the residual's squares, written or read.
        parts: Their number a row.
        number: ADDS: the norm's offset; NORMED: its eps.
    """

    residual: int = 0
    norm_weight: int = 0
    squares: int = 0
    parts: int = 0
    number: float = 0.0


NO_NORM = NormArguments()


class NormedProduct(Protocol):
    """A product that may be given what its role needs."""

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        rows: int,
        norm: NormArguments = NO_NORM,
    ) -> None:
        """Launch it."""


class Variant(Protocol):
    """One kernel with its constants, for one bucket of rows."""

    @property
    def source(self) -> str:
        """Its file."""

    @property
    def name(self) -> str:
        """For messages and results."""

    def constants(self, bucket: int, context: OpContext) -> dict[str, int]:
        """The source's compile-time constants."""

    def build(self, bucket: int, context: OpContext, outputs: int) -> Product:
        """Compile; the result is called with (x, weight, bias, out, rows)."""


def served_buckets() -> tuple[int, ...]:
    """The buckets that own kernels may serve: all, or those up to `LLMFW_PRODUCT_ROWS`.

    64 leaves tiles (tiled.cu) to the library, 4 all products by tensor cores, 0 everything.

    Raises:
        UsageError: If the variable is not a number of rows.
    """
    value = os.environ.get("LLMFW_PRODUCT_ROWS", str(BUCKETS[-1]))
    if not (value.isascii() and value.isdigit()):
        raise UsageError(
            f"LLMFW_PRODUCT_ROWS is {value!r}", hint=f"use a number from 0 to {BUCKETS[-1]}"
        )
    return tuple(bucket for bucket in BUCKETS if bucket <= int(value))


def bucket_of(rows: int) -> int | None:
    """The bucket that serves `rows` (1 to 256), None where none does."""
    if rows <= GEMV_ROWS[-1]:
        return rows if rows in GEMV_ROWS else None
    return next((bucket for bucket in BUCKETS if rows <= bucket), None)


def by_rows(compiled: Mapping[int, Product]) -> tuple[Product | None, ...]:
    """The product for each number of rows, from those by bucket; ends with the last row served."""
    buckets = [bucket_of(rows) for rows in range(BUCKETS[-1] + 1)]
    table = [None if bucket is None else compiled.get(bucket) for bucket in buckets]
    while table and table[-1] is None:
        table.pop()
    return tuple(table)


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether own kernels can read these tensors."""
    aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0
    return aligned and x.is_contiguous() and weight.is_contiguous()


def unannounced_bias(context: OpContext) -> KernelError:
    """The error for a bias given to code that was built for a shape without one."""
    sizes = " ".join(f"{name}={size}" for name, size in context.shape.items())
    return KernelError(
        f"{context.op} was built for a product without a bias ({sizes}), and is called with one",
        hint="build the layer with bias=True, or resolve the op with bias=1",
    )
