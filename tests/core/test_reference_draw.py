"""draw_tokens: masses, the plain definition, what it does not depend on, and the CPU kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfw.kernels.cpu.declare import kernels
from llmfw.ops.device import device_info
from llmfw.ops.kernel import OpContext
from llmfw.ops.reference_draw import FULL, UNIT, draw_tokens, masses
from llmfw.ops.reference_step import argmax

LOG2E = float(torch.tensor(math.log2(math.e)))


def by_definition(logits: torch.Tensor, numbers: list[float]) -> int:
    """One row's token, token by token with whole numbers."""
    scale, top_k, top_p, farthest, uniform = numbers
    distance = (logits.max() - logits) * torch.tensor(scale / UNIT, dtype=torch.float32)
    distance.clamp_max_(1.0)
    mass = [int(each) for each in masses(distance)]
    far = distance.tolist()
    order = sorted(range(len(far)), key=far.__getitem__)
    first = order[: int(top_k)] if top_k else order
    limit = min(farthest / UNIT, far[first[-1]])
    if top_p < 1.0:
        wanted = Fraction(float(sum(mass[i] for i in first)) * top_p)
        reached, index = 0, -1
        while reached < wanted:
            index += 1
            reached += mass[first[index]]
        limit = min(limit, far[first[index]])
    kept = [mass[i] if far[i] <= limit else 0 for i in range(len(far))]
    wanted = int(float(sum(kept)) * uniform)
    reached = 0
    for token, each in enumerate(kept):
        reached += each
        if reached > wanted:
            return token
    raise AssertionError("the mass ended before the draw")


def own_kernels(vocab: int, dtype: torch.dtype) -> list[Callable[..., torch.Tensor]]:
    """The CPU kernel, where it can be built."""
    info = device_info(torch.device("cpu"))
    context = OpContext("draw_tokens", dtype, info, {"vocab_size": vocab})
    found = [kernel for kernel in kernels() if kernel.op == "draw_tokens"]
    return [kernel.build(context) for kernel in found if kernel.refusal(context) is None]


def test_masses_are_powers_of_two() -> None:
    distance = torch.linspace(0, 16, 100_001)
    exact = torch.exp2(FULL - distance.double())
    assert (masses(distance / UNIT) / exact - 1).abs().max() < 5e-7
    assert masses(torch.tensor([0.0, 1.0, 40.0]) / UNIT).tolist() == [1 << 40, 1 << 39, 1]
    assert masses(torch.tensor([41.0, 63.0, 64.0]) / UNIT).tolist() == [0, 0, 0]


def test_masses_are_the_references_to_the_last_unit() -> None:
    """Draws at the edge between two tokens: a fused product and sum would shift it."""
    distance = torch.linspace(0, 18, 20_001)
    near = masses(distance / UNIT)
    logits = torch.stack((-distance, torch.zeros_like(distance)), dim=1)
    whole = (near + masses(torch.zeros(1))).double()
    for step, token in ((-0.5, 0), (0.5, 1)):
        numbers = (1.0, 0.0, 1.0, math.inf)
        columns = [torch.full_like(whole, number) for number in numbers]
        parameters = torch.stack((*columns, (near.double() + step) / whole))
        for draw in (draw_tokens, *own_kernels(2, torch.float32)):
            drawn = draw(logits, argmax(logits), parameters, False)
            assert (drawn == token).all()


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 0.1, 2.0, 8.0]),
    levels=st.sampled_from([None, 1, 3]),
    scale=st.sampled_from([LOG2E, 0.25, 8.0]),
    top_k=st.sampled_from([0, 0, 1, 7, 500]),
    top_p=st.sampled_from([1e-6, 0.25, 0.5, 0.9, 0.999, 1.0]),
    farthest=st.sampled_from([0.0, 2.5, math.inf]),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_token_is_the_one_of_the_definition(
    seed, spread, levels, scale, top_k, top_p, farthest, uniform
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 120, generator=generator) * spread
    if levels is not None:
        logits = (logits * levels).round() / levels  # equal values
    numbers = [scale, top_k, top_p, farthest, uniform]
    parameters = torch.tensor(numbers, dtype=torch.float64)[:, None]
    wanted = by_definition(logits[0], numbers)
    for draw in (draw_tokens, *own_kernels(120, torch.float32)):
        assert int(draw(logits, argmax(logits), parameters, True)) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cuts", [False, True])
def test_the_cpu_kernel_draws_the_same_from_many_rows(dtype: torch.dtype, cuts: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, vocab = 40, 3001
    logits = (4 * torch.randn(rows, vocab + 7, generator=generator)).to(dtype)[:, :vocab]
    logits[::3] = logits[::3].round()
    logits[5] = math.nan
    logits[7, 1:] = -math.inf
    columns = (
        torch.tensor([LOG2E, 0.0, 0.5, 30.0] * 10).double(),
        torch.tensor([0.0, 5.0, 100.0, 10_000.0, 0.0] * 8).double() * cuts,
        torch.linspace(0.3, 1.0, rows).double() if cuts else torch.ones(rows).double(),
        torch.tensor([math.inf, 3.0] * 20).double(),
        torch.rand(rows, generator=generator, dtype=torch.float64),
    )
    parameters, best = torch.stack(columns), argmax(logits)
    wanted = draw_tokens(logits, best, parameters, cuts)
    for draw in own_kernels(vocab, dtype):
        assert torch.equal(draw(logits, best, parameters, cuts), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(12, 500, generator=generator)).to(dtype)
    columns = (
        torch.tensor([LOG2E, 0.0, 0.5] * 4).double(),
        torch.tensor([0.0, 5.0, 100.0, 0.0] * 3).double(),
        torch.linspace(0.3, 1.0, 12).double(),
        torch.tensor([math.inf, 3.0] * 6).double(),
        torch.rand(12, generator=generator, dtype=torch.float64),
    )
    parameters, best = torch.stack(columns), argmax(logits)
    together = draw_tokens(logits, best, parameters, True)
    for row in range(12):
        one = slice(row, row + 1)
        alone = draw_tokens(logits[one], best[one], parameters[:, one], True)
        assert alone[0] == together[row]


def test_tokens_are_stored_where_they_belong() -> None:
    logits = torch.tensor([[0.0, 9.0], [math.nan, 1.0]])
    table = torch.full((4,), -7, dtype=torch.int32)
    parameters = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.5]], dtype=torch.float64).T.repeat(1, 2)
    best = argmax(logits)
    tokens = draw_tokens(logits, best, parameters, False, table, torch.tensor([3, 0]))
    assert tokens.tolist() == [1, -1]
    assert table.tolist() == [0, -7, -7, 1]
