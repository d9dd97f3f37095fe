"""Two products that share a norm give what the product, the norm and the product give."""

from __future__ import annotations

import pytest
import torch

from llmfw.ops import reference
from llmfw.ops.check import check_kernel, relative_error
from llmfw.ops.kernel import DeviceInfo, Kernel, OpContext
from llmfw.ops.reference_normed import (
    add_linear,
    normed_gated_linear,
    normed_linear,
    row_squares,
)

IN, HIDDEN, OUT, EPS = 24, 40, 32, 1e-5


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_a_norm_between_two_products(
    dtype: torch.dtype, limit: float, biased: bool, offset: float
) -> None:
    x = drawn(5, IN, seed=0, dtype=dtype)
    first = drawn(HIDDEN, IN, seed=1, dtype=dtype)
    residual = 3 * drawn(5, HIDDEN, seed=2, dtype=dtype)
    norm_weight = drawn(HIDDEN, seed=3, dtype=dtype)
    second = drawn(OUT, HIDDEN, seed=4, dtype=dtype)
    bias = drawn(OUT, seed=5, dtype=dtype) if biased else None

    product = reference.linear(x, first, None)
    normed, total = reference.add_rms_norm(product, residual, norm_weight, EPS, offset)
    scaled, squares = add_linear(x, first, residual, norm_weight, offset)
    assert torch.equal(residual, total)
    assert squares.dtype is torch.float32
    assert torch.equal(squares.sum(-1), row_squares(total))

    wanted = reference.linear(normed, second, bias)
    for given in (squares, None):
        out = normed_linear(scaled, residual, given, second, bias, EPS)
        assert out.dtype is dtype
        assert relative_error(out, wanted) < limit
        gated = normed_gated_linear(scaled, residual, given, second, bias, EPS)
        assert relative_error(gated, reference.silu_and_mul(wanted)) < 3 * limit


def squares_left_out(context: OpContext) -> object:
    def run(*args: object) -> tuple[torch.Tensor, None]:
        scaled, _ = add_linear(*args)  # type: ignore[arg-type]
        return scaled, None

    return run


def squares_in_parts(context: OpContext) -> object:
    def run(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        scaled, squares = add_linear(*args)  # type: ignore[arg-type]
        return scaled, squares.expand(-1, 4) / 4

    return run


def wrong_squares(context: OpContext) -> object:
    def run(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        scaled, squares = add_linear(*args)  # type: ignore[arg-type]
        return scaled, squares * 1.1

    return run


@pytest.mark.parametrize(
    ("factory", "passes"),
    [("squares_left_out", True), ("squares_in_parts", True), ("wrong_squares", False)],
)
def test_a_kernel_may_give_squares_in_any_parts_or_none(factory: str, passes: bool) -> None:
    kernel = Kernel("add_linear", "mine.add_linear", f"{__name__}:{factory}")
    info = DeviceInfo(torch.device("cpu"), frozenset())
    report = check_kernel(kernel, info, dtypes=["float32"])
    assert report.passed is passes
