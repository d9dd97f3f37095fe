"""The cases of moe_route have one answer: no choice is as near as float32's roundings."""

from __future__ import annotations

import pytest
import torch

from gpu.expert_cases import LEAST_GAP, clear_logits, is_clear, route_cases
from llmfw.ops.kernel import DTYPE_NAMES
from llmfw.ops.reference_moe import moe_route

NEAR = LEAST_GAP / 10


def test_choices_that_are_near_are_not_clear() -> None:
    rows = torch.tensor(
        [
            [4.0, 3.0, 2.0, 1.0],
            [4.0, 4.0 - NEAR, 2.0, 1.0],  # the order of the chosen
            [4.0, 3.0, 3.0 - NEAR, 1.0],  # which is chosen
            [4.0, 3.0, 2.0, 2.0 - NEAR],  # neither is chosen
        ]
    )
    assert is_clear(rows, 2, "topk_softmax", None).tolist() == [True, False, False, True]
    assert is_clear(rows[:2], 2, "sigmoid", None).tolist() == [True, False]
    assert is_clear(rows[:1] * 6, 2, "sigmoid", None).tolist() == [False]  # both are nearly 1
    assert is_clear(rows[:2], 2, "softmax", None).tolist() == [True, False]
    assert is_clear(rows[:1, :1], 1, "softmax", None).tolist() == [True]


def test_groups_that_are_near_are_not_clear() -> None:
    groups = torch.zeros(6), 3, 2, 2
    rows = torch.tensor(
        [
            [9.0, 7.0, 5.0, 6.0, 1.0, 2.0],
            [9.0, 7.0, 5.0, 6.0, 3.0, 8.0 - NEAR],  # the second and third best group
            [9.0, 2.0, 5.0, 6.0, 1.0, 2.0],  # the best two, both of them chosen
            [9.0, 7.0, 5.0, 6.0, 1.0, 6.0],  # an expert of a group that is not chosen
        ]
    )
    assert is_clear(rows, 3, "topk_softmax", groups).tolist() == [True, False, True, True]
    lifted = torch.tensor([0, 0, 1.0, 0, 0, 0]), 3, 2, 2  # 5 + 1 beside 6
    assert is_clear(rows[:1], 3, "topk_softmax", lifted).tolist() == [False]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_draw_leaves_unclear_rows_out_and_repeats(scoring: str) -> None:
    groups = torch.rand(256, generator=torch.Generator().manual_seed(1)) / 512, 8, 2, 2
    first, second = (
        clear_logits(700, 256, 8, scoring, groups, torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.shape == (700, 256)
    assert is_clear(first, 8, scoring, groups).all()
    drawn = torch.rand(700, 256, generator=torch.Generator().manual_seed(0)).argsort(-1) / 32
    assert is_clear(drawn, 8, scoring, groups).float().mean() > 0.5  # few draws are enough


def test_choices_are_the_same_in_every_dtype() -> None:
    answers: dict[str, torch.Tensor] = {}
    for case in route_cases():
        generator = torch.Generator().manual_seed(0)
        args, kwargs = case.draw(torch.device("cpu"), DTYPE_NAMES[case.dtype], generator)
        experts = moe_route(*args, **kwargs)[1]
        key = f"{case.label} {dict(case.shape)}"
        assert torch.equal(experts, answers.setdefault(key, experts)), case
