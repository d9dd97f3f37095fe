"""The products of the CuPy pack as an engine calls them: what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llmfw.errors import KernelError, UsageError
from llmfw.kernels.cupy import gated_linear, linear, normed_linear
from llmfw.kernels.cupy.products import BUCKETS, served_buckets
from llmfw.ops import reference
from llmfw.ops.kernel import DeviceInfo, OpContext

CPU = DeviceInfo(torch.device("cpu"), frozenset({"cpu"}))
WIDTH, OUTPUTS, ROWS = 16, 8, 3
NORMED = {"normed_linear", "normed_gated_linear"}


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Callable[..., torch.Tensor]]:
    """An op's callable as it is where no own kernel won; the argument: whether there is a bias."""
    for module in (linear, gated_linear):
        monkeypatch.setattr(module, "choices", lambda contest: {})
        monkeypatch.setattr(module, "details", lambda contest, chosen: "")
    monkeypatch.setattr(gated_linear, "gated_activation", lambda _: reference.silu_and_mul)

    def built(op: str, bias: int) -> Callable[..., torch.Tensor]:
        outputs = "intermediate_size" if "gated" in op else "out_features"
        shape = {"in_features": WIDTH, outputs: OUTPUTS, "bias": bias}
        context = OpContext(op, torch.float32, CPU, shape)
        if op in NORMED:
            return getattr(normed_linear, op)(context, chosen={})  # type: ignore[no-any-return]
        factory = linear.linear if op == "linear" else gated_linear.gated_linear
        return factory(context)

    return built


@pytest.mark.parametrize("op", ["linear", "gated_linear", *sorted(NORMED)])
def test_a_bias_that_the_shape_did_not_announce_is_refused(
    op: str, build: Callable[[str, int], Callable[..., torch.Tensor]]
) -> None:
    """Code compiled without one would leave it out in silence."""
    rows = OUTPUTS * (1 + ("gated" in op))
    x, weight, bias = torch.randn(ROWS, WIDTH), torch.randn(rows, WIDTH), torch.randn(rows)
    between = (torch.randn(ROWS, WIDTH), None) if op in NORMED else ()
    wanted = reference.REFERENCES[op]
    without, announced = build(op, 0), build(op, 1)
    for call, given in ((without, None), (announced, None), (announced, bias)):
        arguments = (x, *between, weight, given)
        torch.testing.assert_close(call(*arguments), wanted(*arguments))
    with pytest.raises(KernelError, match=f"{op} was built for a product without a bias") as error:
        without(x, *between, weight, bias)
    assert "bias=True" in str(error.value.hint)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [(None, BUCKETS), ("256", BUCKETS), ("64", BUCKETS[:-2]), ("4", (1, 2, 4)), ("0", ())],
)
def test_own_products_serve_as_many_rows_as_the_variable_says(
    rows: str | None, wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "variants", lambda bucket, context: ())
    if rows is None:
        monkeypatch.delenv("LLMFW_PRODUCT_ROWS", raising=False)
    else:
        monkeypatch.setenv("LLMFW_PRODUCT_ROWS", rows)
    shape = {"in_features": WIDTH, "out_features": OUTPUTS, "bias": 0}
    contest = linear.contest(OpContext("linear", torch.bfloat16, CPU, shape))
    assert tuple(contest.variants) == wanted


@pytest.mark.parametrize("value", ["many", "-1", "6.4", ""])
def test_rows_that_are_no_number_are_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFW_PRODUCT_ROWS", value)
    with pytest.raises(UsageError, match="LLMFW_PRODUCT_ROWS is") as error:
        served_buckets()
    assert "0 to 256" in str(error.value.hint)
